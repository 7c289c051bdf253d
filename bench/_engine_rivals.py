"""What the engine is compared with, on the same requests: each gives the seconds they took.

static        `generate` of transformers, batches in arrival order, each until its longest is done
continuous    transformers' own continuous batching
vLLM          in a process of an environment of its own (see _engine_vllm.py)
"""

import ctypes.util
import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final

import torch
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig

from bench import _engine_models
from bench._engine_rig import THREADS, Job

ROWS: Final = 8
BLOCK_TOKENS: Final = 32
CHUNK_TOKENS: Final = 512  # of a forward, as ours
PATIENCE_S: Final = 60.0


class Static:
    """Left-padded batches through `generate`, sdpa, with a cache."""

    def __init__(self, place: Path, dtype: torch.dtype) -> None:
        self.model = _engine_models.reference(place, dtype)

    def __call__(self, jobs: Sequence[Job]) -> float:
        began = time.perf_counter()
        for start in range(0, len(jobs), ROWS):
            batch = jobs[start : start + ROWS]
            ids, mask = _left_padded([job.prompt for job in batch])
            num = max(job.num_tokens for job in batch)
            with torch.inference_mode():
                self.model.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=num,
                    min_new_tokens=num,
                    do_sample=False,
                    use_cache=True,
                    eos_token_id=None,
                    pad_token_id=0,
                )
        return time.perf_counter() - began

    def decoding(self, prompts: Sequence[Sequence[int]]) -> Callable[[], float]:
        """A call that makes one decode step of these rows and gives its seconds."""
        ids, mask = _left_padded(prompts)
        cache = DynamicCache(config=self.model.config)
        state = {"mask": mask, "next": self._forward(ids, mask, cache)}

        def step() -> float:
            began = time.perf_counter()
            mask = torch.cat((state["mask"], torch.ones((len(prompts), 1), dtype=torch.int64)), 1)
            state.update(mask=mask, next=self._forward(state["next"], mask, cache))
            return time.perf_counter() - began

        return step

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, cache: Any) -> torch.Tensor:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with torch.inference_mode():
            logits: torch.Tensor = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
        return logits[:, -1].argmax(-1, keepdim=True)


class Continuous:
    """transformers' continuous batching: its manager, kept running.

    Fair to it on a CPU: blocks and a batch of the sizes that ours has, room in its cache for all
    rows at once, no graphs, nothing shared between prompts because nothing is alike.
    """

    def __init__(self, place: Path, dtype: torch.dtype, max_len: int) -> None:
        self._model = _engine_models.reference(place, dtype)
        self._manager = self._model.init_continuous_batching(
            generation_config=GenerationConfig(
                do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=max_len
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                block_size=BLOCK_TOKENS,
                num_blocks=ROWS * -(-max_len // BLOCK_TOKENS),
                max_batch_tokens=CHUNK_TOKENS,
                max_requests_per_batch=ROWS,
                allow_block_sharing=False,
                use_cuda_graph=False,
                use_async_batching=False,
            ),
        )
        self._manager.start()

    def __call__(self, jobs: Sequence[Job]) -> float:
        began = time.perf_counter()
        waits = {
            self._manager.add_request(list(job.prompt), max_new_tokens=job.num_tokens): job
            for job in jobs
        }
        while waits:
            result = self._manager.get_result(timeout=PATIENCE_S)
            if result is None:
                raise RuntimeError("transformers' continuous batching gives no more results")
            if not result.is_finished():
                continue
            job = waits.pop(result.request_id)
            if result.error or len(result.generated_tokens) != job.num_tokens:
                raise RuntimeError(f"transformers' continuous batching: {result.error or result}")
        return time.perf_counter() - began

    def close(self) -> None:
        self._manager.stop(block=True, timeout=PATIENCE_S)


class VLLM:
    """A process in the environment ``env``; a context manager that ends it."""

    def __init__(self, env: Path, place: Path, max_len: int) -> None:
        script = Path(__file__).with_name("_engine_vllm.py")
        command = [str(env / "bin" / "python"), str(script), str(place)]
        command += ["--threads", str(THREADS), "--rows", str(ROWS), "--max-len", str(max_len)]
        self._log = Path(place).parent / "vllm.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_environment(env),
                text=True,
            )
        self.versions = self._read()

    def __call__(self, jobs: Sequence[Job]) -> float:
        line = json.dumps({"jobs": [[job.prompt, job.num_tokens] for job in jobs]})
        print(line, file=self._pipe(self._process.stdin), flush=True)
        return float(self._read()["seconds"])

    def _read(self) -> dict[str, Any]:
        line = self._pipe(self._process.stdout).readline()
        if not line:
            story = self._log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"vLLM ended with status {self._process.wait()}:\n{story}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe

    def __enter__(self) -> "VLLM":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        story: TracebackType | None,
    ) -> None:
        with suppress(BrokenPipeError):
            self._pipe(self._process.stdin).close()
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _environment(env: Path) -> dict[str, str]:
    """As vLLM's manual asks for: Intel's OpenMP (it comes with vLLM), and tcmalloc if it is here.

    None of what our own process was tuned with.
    """
    ours = ("OMP_WAIT_POLICY", "GLIBC_TUNABLES")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    first = [str(path) for path in [env / "lib" / "libiomp5.so"] if path.exists()]
    if allocator := ctypes.util.find_library("tcmalloc_minimal"):
        first.append(allocator)
    return environment | {"LD_PRELOAD": ":".join(first), "OMP_NUM_THREADS": str(THREADS)}


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, int64, both (rows, longest)."""
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask
