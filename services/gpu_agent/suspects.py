"""Which requests may have killed the engine worker, and how they are tried again.

When a worker dies, every request it worked on is a suspect, and at most one is guilty:

    deaths    next time
    1         together with others: most deaths (out of memory, kill) are no request's fault
    2         alone in the worker, so that another death shows who it was
    3         not at all: it fails, and everybody else goes on

A request that ends any other way is cleared.
"""

from collections import OrderedDict
from collections.abc import Collection

ALONE_AFTER = 2
MAX_CRASHES = 3
_REMEMBERED = 4096


class Suspects:
    def __init__(self) -> None:
        self._deaths: OrderedDict[str, int] = OrderedDict()

    def blame(self, request_id: str) -> bool:
        """The worker died with this request in it. True where it is not to be tried again."""
        deaths = self._deaths[request_id] = self._deaths.get(request_id, 0) + 1
        self._deaths.move_to_end(request_id)
        while len(self._deaths) > _REMEMBERED:
            self._deaths.popitem(last=False)
        return deaths >= MAX_CRASHES

    def clear(self, request_id: str) -> None:
        self._deaths.pop(request_id, None)

    def may_join(self, request_id: str, running: Collection[str]) -> bool:
        """Whether the request may be given to a worker that works on ``running``."""
        return not running or not any(map(self._runs_alone, (request_id, *running)))

    def _runs_alone(self, request_id: str) -> bool:
        return self._deaths.get(request_id, 0) >= ALONE_AFTER
