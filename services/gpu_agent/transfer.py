"""The copy from host image to device, group by group in execution order, with its trace."""

import time
from dataclasses import dataclass

from schemas.state import LayerCopy
from services.gpu_agent.host_image import HostImage
from services.gpu_agent.pages import PagePool, Region


@dataclass(frozen=True)
class CopyReport:
    """``copy_s``: from before the first to after the last byte, as the host sees it."""

    num_bytes: int
    copy_s: float
    layers: tuple[LayerCopy, ...]


def copy_in(pool: PagePool, region: Region, image: HostImage) -> CopyReport:
    """Copy the whole ``image`` into the mapped ``region``; returns when all of it is there.

    Queued group by group without waiting in between, so that an asynchronous device never
    idles; the stamps between the groups are read after the last one is done.
    """
    began = time.perf_counter()
    stamps = [pool.stamp()]
    for group in image.layout.groups:
        region.copy_in(group.offset, image.tensor[group.offset : group.offset + group.num_bytes])
        stamps.append(pool.stamp())
    pool.join_copies()
    copy_s = time.perf_counter() - began
    layers = tuple(
        LayerCopy(group.name, group.num_bytes, after.seconds_since(before))
        for group, before, after in zip(image.layout.groups, stamps, stamps[1:], strict=False)
    )
    return CopyReport(sum(layer.num_bytes for layer in layers), copy_s, layers)
