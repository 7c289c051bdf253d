"""Files and batches: records of the apis, who alone read and write them.

A batch is a file of requests, one per line, that are answered into another file. Its requests are
those of class batch (`schemas.requests`), one per line; they are answered on
`names.result_subject`.
"""

from typing import Literal, TypeAlias

import msgspec

BatchEndpoint: TypeAlias = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
BatchStatus: TypeAlias = Literal[
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
]
FilePurpose: TypeAlias = Literal["batch", "batch_output"]


class FileRecord(msgspec.Struct, frozen=True, tag="hotswap.state.v1.file"):
    """HS_FILES/<file>: written once what it holds is there, in HS_FILE_DATA.

    Times are unix seconds.
    """

    file: str
    filename: str
    purpose: FilePurpose
    num_bytes: int
    created_at: int
    expires_at: int
    tenant: str = ""  # whose it is, as in requests


class BatchError(msgspec.Struct, frozen=True):
    """Why a batch failed before it began. ``line``: of the input file, from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchRecord(msgspec.Struct, frozen=True, tag="hotswap.state.v1.batch"):
    """HS_BATCHES/<batch>. The api that holds the lease ``batches.leader`` moves it on; any may ask
    for it to be cancelled.

    ``reached``: when it came into each status (unix seconds).
    """

    batch: str
    endpoint: BatchEndpoint
    input_file: str
    completion_window: str
    created_at: int
    expires_at: int
    status: BatchStatus
    reached: dict[str, int] = {}
    metadata: dict[str, str] | None = None
    tenant: str = ""
    num_requests: int = 0
    num_completed: int = 0
    num_failed: int = 0
    output_file: str = ""
    error_file: str = ""
    errors: tuple[BatchError, ...] = ()
