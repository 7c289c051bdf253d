"""A part of a GPU run: how near decoding comes to what the device's memory allows.

A decode step reads every weight once, whatever the number of rows, so

    floor of a step = bytes of weights / rate at which the device reads its memory

and tokens per second of one row can not be more than its inverse. Steps are taken kernel by kernel
and recorded (decode_graph.py), before and after a swap with another model in between.
"""

import time
from typing import Final

import torch

from bench._gpu_models import MAX_ROWS, MemoryModel
from bench._gpu_report import Part
from bench._gpu_serving import Client, end, serve
from bench._gpu_stage import Stage
from services.gpu_agent.engine.decode_graph import Recorder, record_cuda

OF_THE_FLOOR_AT_LEAST: Final = 0.60  # one row, recorded
COPY_BYTES: Final = 2**30
COPIES: Final = 5


def floors(stage: Stage, part: Part, *names: str) -> None:
    """Decode rates of one row and of many, and their shares of the floor."""
    model, other = stage.pair(part, *names)
    rate = _memory_rate(stage)
    part.value("device memory, read and written", rate / 1e9, "GB/s")
    floor_s = model.layout.num_bytes / rate
    part.value("floor of a decode step", floor_s, "s")
    recorder: Recorder = record_cuda if stage.is_on_gpu else lambda run: run
    for label, used in (("kernel by kernel", None), ("recorded", recorder)):
        client = Client(serve(stage, [model, other], used))
        client.swap_in(model.spec.name)
        for rows in (1, MAX_ROWS):
            share = _rates(stage, part, client, model, other, rows, label) * floor_s / rows
            name = f"{rows} rows, {label}: of the floor"
            if rows == 1 and used is not None:
                part.speed(name, share, at_least=OF_THE_FLOOR_AT_LEAST)
            else:
                part.value(name, share, "x")
        client.swap_out(model.spec.name)


def _rates(
    stage: Stage,
    part: Part,
    client: Client,
    model: MemoryModel,
    other: MemoryModel,
    rows: int,
    label: str,
) -> float:
    """Tokens per second of all rows together, median, after swaps."""
    num_prompt, num_tokens = stage.sizes.prompts[0], stage.sizes.decode_tokens
    before, after = [], []
    client.decode(model, num_prompt, num_tokens, rows)  # warms up, and records
    for _ in range(stage.sizes.decode_rounds):
        before.append(client.decode(model, num_prompt, num_tokens, rows))
        client.swap_out(model.spec.name)
        client.swap_in(other.spec.name)
        end(client, other)
        client.swap_out(other.spec.name)
        client.swap_in(model.spec.name)
        end(client, model)
        after.append(client.decode(model, num_prompt, num_tokens, rows))
    part.taken(f"{rows} rows, {label}: tokens/s before swaps", before, "/s")
    return part.taken(f"{rows} rows, {label}: tokens/s after swaps", after, "/s").median


def _memory_rate(stage: Stage) -> float:
    """Bytes per second that the device reads and writes, best of some large copies."""
    device = stage.pool.torch_device
    size = COPY_BYTES if stage.is_on_gpu else COPY_BYTES // 64
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(COPIES):
        stage.synchronize()
        began = time.perf_counter()
        target.copy_(source)
        stage.synchronize()
        best = max(best, 2 * size / (time.perf_counter() - began))
    return best
