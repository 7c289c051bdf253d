"""Two devices on one machine: each with its agent, sharing host images."""

import asyncio
import re
from pathlib import Path

import psutil

from services.ops.status import take
from tests.integration.system_kit import MIB, System, write_models

GPU = """
[[gpus]]
name = "{name}"
device = "cpu"
memory = "{memory}B"
threads = 1
share_images = true
"""


def images_of(worker: psutil.Process) -> dict[str, set[int]]:
    """Memory files of host images: name -> inodes mapped, read-only."""
    found: dict[str, set[int]] = {}
    for line in Path(f"/proc/{worker.pid}/maps").read_text().splitlines():
        match = re.search(r" (r..s) \S+ \S+ (\d+) +/memfd:(hotswap-\S+)", line)
        if match:
            assert match[1] == "r--s"
            found.setdefault(match[3], set()).add(int(match[2]))
    return found


def test_two_agents_hold_one_copy_of_each_host_image(tmp_path: Path) -> None:
    models = write_models(tmp_path / "models")
    gpus = "".join(GPU.format(name=name, memory=56 * MIB) for name in ("cpu0", "cpu1"))
    tables = "".join(f'[models.{name}]\nsource = "{path}"\n' for name, path in models.items())
    with System(tmp_path, gpus + tables) as system:

        def is_loaded() -> bool:
            agents = asyncio.run(take(system.admin)).agents
            return len(agents) == 2 and all(
                len(agent.replicas) == len(models)
                and all(replica.state in ("host", "resident") for replica in agent.replicas)
                for agent in agents.values()
            )

        system.wait(is_loaded, "both agents to hold all host images")
        workers = [p for p in system.family() if "services.gpu_agent.worker" in p.cmdline()]
        one, other = (images_of(worker) for worker in workers)
        assert len(one) == len(models)
        assert one == other  # the same files, by inode
        for model in models:
            assert system.complete(model)[0] == 200
        # The one that filled an image may die: the other's copy stays.
        workers[0].kill()
        for model in models:
            assert system.complete(model)[0] == 200
        system.wait(is_loaded, "the new worker to borrow what the other one holds")
        workers = [p for p in system.family() if "services.gpu_agent.worker" in p.cmdline()]
        assert [images_of(worker) for worker in workers] == [one, one]
