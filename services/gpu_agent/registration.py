"""Registering a model: from its spec to a module bound to device addresses; no weight is read.

files -> config -> module (meta) -> trial run -> layout -> region, buffers, bound parameters
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from schemas.state import ModelFacts, ModelSpec, Runner
from services.gpu_agent import checkpoint, loader, probe, skeleton
from services.gpu_agent.facts import find_facts
from services.gpu_agent.host_image import Layout, plan_layout
from services.gpu_agent.loader import LoadPlan
from services.gpu_agent.pages import PagePool, Region
from services.gpu_agent.probe import Examined, KVGeometry
from services.gpu_agent.runner import Pooling, find_pooling


@dataclass(frozen=True)
class Registration:
    """What is known of a model, and was made for it once and for all.

    ``guards``: module name -> end of the image bytes that its forward needs. ``pooling``: how it
    embeds; None where it generates.
    """

    spec: ModelSpec
    config: Any
    facts: ModelFacts
    geometry: KVGeometry
    module: nn.Module
    plan: LoadPlan
    region: Region
    guards: dict[str, int]
    pooling: Pooling | None = None


def register(spec: ModelSpec, pool: PagePool) -> Registration:
    """Find and check ``spec``'s files and build the module. Raises BadCheckpoint.

    Works for models larger than the pool: ``facts`` tell.
    """
    found = checkpoint.read(checkpoint.find(spec))
    config = skeleton.read_config(found.folder, spec)
    stored = (tensor.dtype for tensor in found.tensors.values())
    dtype = skeleton.choose_dtype(config, spec, stored)
    pooling = find_pooling(found.folder, config, spec)
    runner: Runner = "embed" if pooling else "generate"
    module = skeleton.build(config, spec, dtype, runner)
    examined = probe.examine(module, config, spec, runner)
    plan = loader.plan_load(spec, found, plan_layout(examined.weights), module, dtype, runner)
    return assemble(spec, config, module, examined, plan, pool, pooling)


def assemble(
    spec: ModelSpec,
    config: Any,
    module: nn.Module,
    examined: Examined,
    plan: LoadPlan,
    pool: PagePool,
    pooling: Pooling | None = None,
) -> Registration:
    """Bind ``module``, which can be done once, to a region of ``pool``. Raises BadCheckpoint."""
    facts = find_facts(spec, config, module, examined, plan, pool, pooling)
    region = pool.reserve(plan.layout.num_bytes)
    try:
        skeleton.make_buffers_real(module, pool.torch_device, spec)
        skeleton.bind(module, plan.layout, region.tensor)
    except BaseException:
        region.release()
        raise
    guards = _guard_ends(examined.guards, plan.layout)
    geometry = examined.geometry
    return Registration(spec, config, facts, geometry, module, plan, region, guards, pooling)


def _guard_ends(guards: dict[str, str], layout: Layout) -> dict[str, int]:
    ends: dict[str, int] = {}
    for slot in layout:
        module = guards[slot.weight.name]
        ends[module] = max(ends.get(module, 0), slot.offset + slot.weight.num_bytes)
    return ends
