"""The vectors of one request, put together from the chunks of one or more runs of it.

Those of two runs need not be equal to the last bit, because a vector depends a little on what
else was in its forward pass. Whatever came last is kept.
"""

from schemas.requests import EmbedRequest
from schemas.stream import Vectors

FLOAT_BYTES = 4


class VectorAnswer:
    """Pure bookkeeping: chunks in, one vector per input out."""

    def __init__(self, request: EmbedRequest) -> None:
        self._vectors: list[bytes | None] = [None] * len(request.inputs)

    def add(self, chunk: Vectors) -> None:
        """Keep what ``chunk`` holds; nothing of one that does not fit the request."""
        size = chunk.dimensions * FLOAT_BYTES
        num_vectors = len(chunk.data) // size if size > 0 else 0
        if 0 <= chunk.index <= len(self._vectors) - num_vectors:
            for i in range(num_vectors):
                self._vectors[chunk.index + i] = chunk.data[i * size : (i + 1) * size]

    @property
    def num_missing(self) -> int:
        return self._vectors.count(None)

    def whole(self) -> list[bytes]:
        """One per input, little-endian float32. Only once none is missing."""
        return [vector for vector in self._vectors if vector is not None]
