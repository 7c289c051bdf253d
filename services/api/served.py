"""How a request was served, for who asked: response headers, and `hotswap` beside `usage`.

The headers leave with the first byte. Of a stream that began with words about its wait they could
not tell; the last chunk, or a comment at its end, does.
"""

from services.api.call import Call
from services.api.fields import ignored_header
from services.api.openai import Served


def served(call: Call) -> Served | None:
    """None where no agent has begun with it."""
    first, newest = call.first_started, call.started
    if first is None or newest is None:
        return None
    swap = first.swap
    return Served(
        start=first.start,
        gpu=newest.gpu,
        waited_s=round(call.waited_s, 6),
        swap_s=round(swap.total_s, 6) if swap else None,
        swap_bytes=swap.num_bytes if swap else None,
        num_resumed=call.num_resumed,
    )


def answer_headers(ignored: list[str], call: Call) -> dict[str, str]:
    """What this server adds: how the request was started, and what a swap cost."""
    headers = ignored_header(ignored)
    if told := served(call):
        headers["x-hotswap-start"] = told.start
        headers["x-hotswap-gpu"] = told.gpu
        headers["x-hotswap-wait-seconds"] = f"{told.waited_s:.6f}"
        if told.swap_s is not None:
            headers["x-hotswap-swap-bytes"] = str(told.swap_bytes)
            headers["x-hotswap-swap-seconds"] = f"{told.swap_s:.6f}"
    return headers
