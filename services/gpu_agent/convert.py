"""Checkpoints under other names or in another packing: let transformers convert them.

``from_pretrained`` sets torch's default dtype for the whole process while it runs and holds
the interpreter lock for long, so it gets a process of its own:

    stdin    {"folder", "dtype", "trust_remote_code", "runner",
              "weights": [[name, shape, dtype], ...]}
    stdout   the weights' bytes, one after another in that order
    stderr   what went wrong, in one line; exit status 1
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Final

import torch

from schemas.state import ModelSpec, Runner
from services.gpu_agent.checkpoint import BadCheckpoint
from services.gpu_agent.host_image import HostImage

_CHUNK_BYTES: Final = 16 * 2**20
_PROGRESS_S: Final = 0.1


def load(
    spec: ModelSpec,
    folder: Path,
    dtype: torch.dtype,
    image: HostImage,
    on_progress: Callable[[int, int], None],
    runner: Runner = "generate",
) -> None:
    """Fill ``image`` from the converting child. Raises BadCheckpoint."""
    order = {
        "folder": str(folder),
        "dtype": _name(dtype),
        "trust_remote_code": spec.trust_remote_code,
        "runner": runner,
        "weights": [[s.weight.name, s.weight.shape, _name(s.weight.dtype)] for s in image.layout],
    }
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            [sys.executable, "-m", "services.gpu_agent.convert"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": path},
        ) as child,
    ):
        try:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(json.dumps(order).encode())
            child.stdin.close()
            complete = _receive(child.stdout, image, on_progress)
            complete = child.wait() == 0 and complete
        except BrokenPipeError:
            complete = False
        finally:
            child.kill()
        if not complete:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            raise BadCheckpoint(
                f"{folder} could not be converted to the installed transformers' layout: "
                f"{lines[-1] if lines else 'the converter died, probably for lack of memory'}"
            )


def _receive(stream: IO[bytes], image: HostImage, on_progress: Callable[[int, int], None]) -> bool:
    """Read all weights to their places. False if the stream ended early."""
    total = sum(slot.weight.num_bytes for slot in image.layout)
    done, reported_at = 0, 0.0
    for slot in image.layout:
        left = image.writable[slot.offset : slot.offset + slot.weight.num_bytes]
        while left:
            got = os.readv(stream.fileno(), [left[:_CHUNK_BYTES]])
            if got == 0:
                return False
            left = left[got:]
            done += got
            now = time.monotonic()
            if now - reported_at >= _PROGRESS_S:
                reported_at = now
                on_progress(done, total)
    on_progress(done, total)
    return True


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- the child ---------------------------------------------------------------------------


def _convert(order: dict[str, Any], out: IO[bytes]) -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    auto = AutoModel if order["runner"] == "embed" else AutoModelForCausalLM
    module, info = auto.from_pretrained(
        order["folder"],
        dtype=getattr(torch, order["dtype"]),
        trust_remote_code=order["trust_remote_code"],
        use_safetensors=True,
        output_loading_info=True,
    )
    missing = set(info["missing_keys"])
    if order["runner"] == "embed":  # nobody misses the pooler
        missing &= {name for name, _, _ in order["weights"]}
    if missing:
        raise ValueError(f"missing tensors: {sorted(missing)[:5]}")
    tensors = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    for name, shape, dtype in order["weights"]:
        tensor = tensors[name].detach().contiguous()
        if list(tensor.shape) != shape or _name(tensor.dtype) != dtype:
            raise ValueError(
                f"{name!r} became {tuple(tensor.shape)} {tensor.dtype}, expected {shape} {dtype}"
            )
        out.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))


def main() -> int:
    """Read the order, write the weights. The exit status says whether all went well."""
    # Whatever a library prints must not end up among the weights.
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)
        try:
            _convert(json.loads(sys.stdin.buffer.read()), out)
            out.flush()
        except Exception as error:  # any modelling code may run here
            print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
