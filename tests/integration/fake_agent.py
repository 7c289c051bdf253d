"""The agent as a process of its own, over the fake engine worker.

python fake_agent.py CREDS_FILE STATE_DIR
"""

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from services.bus import BusOptions
from services.gpu_agent import service, worker_link
from services.ops.supervisor import stop_on_signals
from services.settings import GpuSettings, Settings


def _command(self: worker_link.WorkerLink, descriptor: int) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name("fake_worker.py")), str(descriptor)]


async def main() -> None:
    options = BusOptions.read(Path(sys.argv[1]))
    settings = Settings(state_dir=sys.argv[2])
    await service.run(settings, GpuSettings(name="gpu0"), options, stop=stop_on_signals())


if __name__ == "__main__":
    worker_link.WorkerLink._command = _command  # type: ignore[method-assign]
    asyncio.run(main())
