"""vLLM as a rival: a process of its own environment, which imports nothing of this project.

    ENV/bin/python bench/_engine_vllm.py MODEL_FOLDER --threads 2 --rows 8 --max-len 1024

One JSON object per line on standard output, first {"vllm": version, "torch": version}; then, for
each line {"jobs": [[prompt ids, number of tokens], ...]} on standard input, {"seconds": s} after
all of them were generated. Ends with its input. vLLM's own messages go to standard error.

Settings are vLLM's defaults for a CPU (compiled, chunked prefill), with the same dtype, threads
and rows as its rivals; prefix caching is off, because no two prompts share anything.
"""

import argparse
import json
import os
import sys
import time
from typing import Any

KV_GIB = 1


def main(argv: list[str]) -> None:
    """Serve until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--max-len", type=int, required=True)
    args = parser.parse_args(argv)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed, by compilers and workers too
    cores = sorted(os.sched_getaffinity(0))[: args.threads]
    os.environ |= {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }

    # After the settings, which it reads once, and not where this is checked: another environment.
    import torch
    import vllm  # type: ignore[import-not-found,unused-ignore]

    engine: Any = vllm.LLM(
        args.model,
        dtype="bfloat16",
        max_model_len=args.max_len,
        max_num_seqs=args.rows,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    print(json.dumps({"vllm": vllm.__version__, "torch": torch.__version__}), file=answers)
    answers.flush()
    for line in sys.stdin:
        jobs = json.loads(line)["jobs"]
        prompts = [{"prompt_token_ids": ids} for ids, _ in jobs]
        params = [
            vllm.SamplingParams(
                temperature=0.0, max_tokens=num, min_tokens=num, ignore_eos=True, detokenize=False
            )
            for _, num in jobs
        ]
        began = time.perf_counter()
        ended = engine.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        found = [len(one.outputs[0].token_ids) for one in ended]
        if found != [num for _, num in jobs]:
            raise RuntimeError(f"vLLM generated {found} tokens")
        print(json.dumps({"seconds": seconds}), file=answers)
        answers.flush()


if __name__ == "__main__":  # its workers import this file again
    main(sys.argv[1:])
