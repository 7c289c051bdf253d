"""Parts of a GPU run that move bytes: rates, calls, kept pages, read-only images, page sizes."""

import ctypes
import mmap
import os
import time
from typing import Any, Final

import numpy as np
import torch

from bench._gpu_models import MemoryModel, checksums_of, fill, plan
from bench._gpu_report import Part
from bench._gpu_stage import MIB, Calls, Stage
from services.gpu_agent.host_image import HostImage, fill_file
from services.gpu_agent.pages import DeviceError, PagePool
from services.gpu_agent.transfer import PIECE_BYTES

OF_RAW_AT_LEAST: Final = 0.95
OUT_MS_AT_MOST: Final = 15.0
OUT_BYTES: Final = 16e9
SLOW_S: Final = 0.1
SHARES: Final = (0.0, 0.25, 0.5, 0.75, 1.0)
TEST_BYTES: Final = 256 * MIB  # of what is registered in different ways

# What no swap may do: ask for memory or for driver objects, or pin.
_ASKING: Final = ("Create", "Alloc", "Reserve", "Register", "Release", "Free", "Destroy")
_PROT_READ: Final = 1


# -- rates -------------------------------------------------------------------------------------


def rates(stage: Stage, part: Part, *names: str) -> None:
    """Swap-in against raw copies of the same image to the same pages; swap-out; calls counted."""
    for model in stage.pair(part, *names):
        _rates_of(stage, part, model)
    part.value("ceiling", stage.pool.ceiling_gb_per_s, "GB/s")


def _rates_of(stage: Stage, part: Part, model: MemoryModel) -> None:
    name, num_bytes = model.spec.name, model.layout.num_bytes
    model.swap_in()  # the first one also runs the canary
    model.swap_out()
    took: dict[str, list[float]] = {
        step: []
        for step in ("swap-in", "map", "copy", "check", "swap-out", "raw", "raw, in pieces")
    }
    links: list[Any] = []
    ins, outs = Calls(), Calls()
    segments = _torch_segments(stage)
    for _ in range(stage.sizes.rounds):
        stage.keep(model, 0.0)
        with stage.calls() as calls:
            trace = model.swap_in()
        ins.add(calls)
        took["swap-in"].append(trace.total_s)
        took["map"].append(trace.map_s)
        took["copy"].append(trace.copy_s)
        took["check"].append(trace.verify_s)
        took["raw"].append(raw_copy(stage.pool, model, num_bytes, links))
        took["raw, in pieces"].append(raw_copy(stage.pool, model, PIECE_BYTES["cuda"]))
        links.append(trace.link)
        stage.synchronize()
        with stage.calls() as calls:
            took["swap-out"].append(model.swap_out().total_s)
        outs.add(calls)
    samples = {step: part.taken(f"{name}: {step}", taken) for step, taken in took.items()}
    raw = num_bytes / min(took["raw"]) / 1e9
    part.value(f"{name}: raw copy, best", raw, "GB/s")
    for step in ("swap-in", "copy"):
        part.value(f"{name}: {step} rate", num_bytes / samples[step].median / 1e9, "GB/s")
    part.value(f"{name}: swap-in of raw, both best", min(took["raw"]) / min(took["swap-in"]), "x")
    of_raw = min(took["raw"]) / samples["swap-in"].median  # rate over rate
    part.speed(f"{name}: swap-in of the raw copy's rate", of_raw, at_least=OF_RAW_AT_LEAST)
    out_ms = samples["swap-out"].median * 1e3 * OUT_BYTES / num_bytes
    part.speed(f"{name}: swap-out of 16 GB", out_ms, "ms", at_most=OUT_MS_AT_MOST)
    back = sum(n for call, n in outs.copied.items() if "DtoH" in call)
    part.holds(f"{name}: swap-out copies nothing back", back == 0 and not outs.matching("Memcpy"))
    asked = ins.matching(*_ASKING) + outs.matching(*_ASKING) + _torch_segments(stage) - segments
    part.value(f"{name}: calls that ask for memory", asked)
    part.holds(f"{name}: swaps create, allocate and pin nothing", asked == 0)
    part.details[f"{name}: calls of {stage.sizes.rounds} swap-ins"] = _shown(ins)
    part.details[f"{name}: calls of {stage.sizes.rounds} swap-outs"] = _shown(outs)
    part.details[f"{name}: link under load"] = links


def raw_copy(
    pool: PagePool, model: MemoryModel, piece_bytes: int, links: list[Any] | None = None
) -> float:
    """Seconds to copy the image over the resident model, in pieces; ``links`` gets the link."""
    source = model.image.tensor
    began = time.perf_counter()
    for start in range(0, source.numel(), piece_bytes):
        model.region.copy_in(start, source[start : start + piece_bytes])
    stamp = pool.stamp()
    if links is not None:
        links.append(pool.read_link())
    stamp.wait()
    return time.perf_counter() - began


def _torch_segments(stage: Stage) -> int:
    """How often torch asked the driver for memory."""
    return int(torch.cuda.memory_stats()["segment.all.allocated"]) if stage.is_on_gpu else 0


def _shown(calls: Calls) -> dict[str, Any]:
    return {
        name: {"calls": n, "seconds": calls.seconds[name], "bytes": calls.copied[name]}
        for name, n in calls.num.most_common()
    }


# -- what is kept ------------------------------------------------------------------------------


def partial(stage: Stage, part: Part, *names: str) -> None:
    """Swap-ins of a model of which a share is still on the device."""
    model = stage.pair(part, *names)[0]
    model.swap_in()
    expected = stage.logits(model, stage.sizes.prompts[0])
    whole_s = 0.0
    for share in SHARES:
        taken: list[float] = []
        for _ in range(2):
            stage.keep(model, share)
            trace = model.swap_in()
            taken.append(trace.total_s)
        whole_s = whole_s or min(taken)
        part.taken(f"{share:.0%} there: swap-in", taken)
        part.value(f"{share:.0%} there: of a whole one", min(taken) / whole_s, "x")
        part.value(f"{share:.0%} there: kept", trace.kept_bytes / 1e9, "GB")
        same = torch.equal(stage.logits(model, stage.sizes.prompts[0]), expected)
        part.holds(f"{share:.0%} there: same logits", same)
    part.holds("every page is as loaded", model.verify() > 0)


def call_off(stage: Stage, part: Part, *names: str) -> None:
    """Swap-ins that are called off on their way: how soon they end, and what of them is kept."""
    model = stage.pair(part, *names)[0]
    model.swap_in()
    expected = stage.logits(model, stage.sizes.prompts[0])
    if stage.pool.kind == "cpu":  # there a tiny model is copied before anybody can call it off
        stage.pool.link_bytes_per_s = model.layout.num_bytes / SLOW_S
    stage.keep(model, 0.0)
    copy_s = model.swap_in().copy_s
    for share in (0.1, 0.5, 0.9):
        stage.keep(model, 0.0)
        model.begin_swap_in()
        time.sleep(share * copy_s)
        began = time.perf_counter()
        called_off = model.call_off_swap_in()
        name = f"called off at {share:.0%}"
        part.value(f"{name}: ended after", time.perf_counter() - began, "s")
        part.value(f"{name}: copied", called_off.num_bytes / 1e9, "GB")
        part.value(f"{name}: kept", model.cached_bytes / 1e9, "GB")
        stage.pool.free.validate()
        kept = model.cached_bytes
        again = model.swap_in()
        part.value(f"{name}: swap-in after it", again.total_s, "s")
        page_bytes = stage.pool.page_bytes
        part.holds(f"{name}: nothing kept is copied", again.kept_bytes >= kept - page_bytes)
        same = torch.equal(stage.logits(model, stage.sizes.prompts[0]), expected)
        part.holds(f"{name}: same logits", same)
    stage.pool.link_bytes_per_s = 0.0


# -- read-only images --------------------------------------------------------------------------


def read_only(stage: Stage, part: Part, *names: str) -> None:
    """A sealed image in a memory file, mapped read-only and pinned, against an anonymous one."""
    stage.pair(part, *names)
    part.details["registering"] = _ways_to_register(stage.pool)
    shape = stage.shapes["llama-slim"]
    planned = plan(shape)

    def fill_it(image: HostImage) -> None:
        fill(image, shape.seed, stage.pool.torch_device)
        image.checksums = checksums_of(image, stage.pool.page_bytes)

    file = fill_file(shape.name, planned.layout, fill_it)
    try:
        shared = HostImage.over(file, planned.layout, lambda: None)
    finally:
        os.close(file)
    own = HostImage(planned.layout)
    fill_it(own)
    logits: list[torch.Tensor] = []
    for name, image, one in (("shared", shared, planned), ("own", own, plan(shape))):
        began = time.perf_counter()
        image.pin(stage.pool)
        part.value(f"{name}: pin", time.perf_counter() - began, "s")
        is_pinned = image._pinned_by is not None or stage.pool.kind == "cpu"
        part.holds(f"{name} image can be pinned", is_pinned)
        model = MemoryModel.make(one, stage.pool, image, "off")
        taken: list[float] = []
        for _ in range(stage.sizes.rounds):
            stage.keep_pages(0)
            taken.append(model.swap_in().copy_s)
            model.swap_out()
        model.swap_in()
        logits.append(stage.logits(model, stage.sizes.prompts[0]))
        part.value(f"{name}: copy", planned.layout.num_bytes / min(taken) / 1e9, "GB/s")
        part.holds(f"{name}: every page is as loaded", model.verify() > 0)
        model.close()
        image.free()
    part.holds("same logits from both", torch.equal(*logits))


def _ways_to_register(pool: PagePool) -> dict[str, Any]:
    """Which mappings of a memory file the driver registers: seconds and rate, or its refusal."""
    both, read = mmap.PROT_READ | mmap.PROT_WRITE, mmap.PROT_READ
    ways: dict[str, tuple[int, bool, bool]] = {
        "writable": (both, False, False),
        "writable, flag READ_ONLY": (both, True, False),
        "writable, made read-only once registered": (both, False, True),
        "read-only": (read, False, False),
        "read-only, flag READ_ONLY": (read, True, False),
    }
    num_bytes = min(TEST_BYTES, pool.budget_bytes // 4 // pool.page_bytes * pool.page_bytes)
    file = os.memfd_create("registering")
    try:
        os.ftruncate(file, num_bytes)
        os.pwrite(file, bytes(num_bytes), 0)
        return {
            name: _register(pool, mmap.mmap(file, num_bytes, mmap.MAP_SHARED, prot), flag, protect)
            for name, (prot, flag, protect) in ways.items()
        }
    finally:
        os.close(file)


def _register(pool: PagePool, memory: mmap.mmap, flag: bool, protect: bool) -> Any:
    address, size = np.frombuffer(memory, dtype=np.uint8).ctypes.data, len(memory)
    began = time.perf_counter()
    try:
        pool.pin_host(address, size, read_only=flag)
    except DeviceError as error:
        return str(error)
    took = time.perf_counter() - began
    try:
        if protect:
            ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), _PROT_READ)
        return {"seconds": took, "GB/s": _rate_from(pool, address, size)}
    finally:
        pool.unpin_host(address)


def _rate_from(pool: PagePool, address: int, num_bytes: int) -> float:
    """GB/s of a copy from there to free pages."""
    source = torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(address), dtype=torch.uint8)
    region = pool.reserve(num_bytes)
    pages = pool.free.take(pool.pages_for(num_bytes))
    region.map(pages)
    taken: list[float] = []
    try:
        for _ in range(3):
            began = time.perf_counter()
            region.copy_in(0, source)
            pool.stamp().wait()
            taken.append(time.perf_counter() - began)
    finally:
        region.unmap()
        pool.free.give(pages)
        region.release()
    return num_bytes / min(taken) / 1e9


# -- page sizes --------------------------------------------------------------------------------


def pages(stage: Stage, part: Part, name: str) -> None:
    """The same model on pages of several sizes: what map, unmap and swap-in cost."""
    for page_bytes in stage.sizes.sweep:
        size = f"{page_bytes // MIB} MiB"
        model = stage.alone(part, name, page_bytes)
        model.swap_in()
        model.swap_out()
        took: dict[str, list[float]] = {step: [] for step in ("map", "copy", "swap-in", "unmap")}
        total = Calls()
        for _ in range(stage.sizes.rounds):
            stage.keep(model, 0.0)
            with stage.calls() as calls:
                trace = model.swap_in()
                took["map"].append(trace.map_s)
                took["copy"].append(trace.copy_s)
                took["swap-in"].append(trace.total_s)
                stage.synchronize()
                took["unmap"].append(model.swap_out().total_s)
            total.add(calls)
        samples = {step: part.taken(f"{size}: {step}", taken) for step, taken in took.items()}
        rate = model.layout.num_bytes / samples["swap-in"].median / 1e9
        part.value(f"{size}: swap-in rate", rate, "GB/s")
        part.details[f"{size}: calls of {stage.sizes.rounds} swaps"] = _shown(total)
