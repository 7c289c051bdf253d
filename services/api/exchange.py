"""What all routes do with HTTP requests and answers."""

from typing import Any, TypeAlias

import msgspec
from litestar import Request, Response
from litestar.datastructures import State
from litestar.exceptions import InternalServerException

from services.api.errors import ApiError

HttpRequest: TypeAlias = Request[Any, Any, State]


async def read_body(request: HttpRequest) -> bytes:
    """All of the body. Raises ApiError where the client leaves before."""
    try:
        return await request.body()
    except InternalServerException as error:  # what the framework raises for it
        raise ApiError(400, "client_left", "The client left before the body was here.") from error


def json_answer(
    body: msgspec.Struct, status: int = 200, headers: dict[str, str] | None = None
) -> Response[bytes]:
    """``body`` as a JSON answer."""
    data = msgspec.json.encode(body)
    return Response(data, status_code=status, headers=headers, media_type="application/json")
