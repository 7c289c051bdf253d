"""The streams and buckets, as JetStream configs, declared idempotently by every service.

| stream      | storage | kept                                                              |
| HS_REQUESTS | memory  | until acknowledged (work queue); full subjects refuse new messages |
| HS_BATCH    | file    | likewise: requests that outlive every process                      |
| HS_RESULTS  | file    | answers to these, until their batch is written out                 |
| HS_FILE_DATA| file    | uploaded files and those of results, in chunks                     |
| HS_EVENTS   | file    | the newest, by count and age                                       |
| KV_HS_*     | file    | the last value per key                                             |

HS_LEASES is a file bucket too: a lease's fencing epoch is its stream sequence, which must
not start again from 1 when the server restarts.
"""

from typing import Any

from schemas import names
from services.bus.connection import Bus, BusError, JetStreamError

NS = 10**9  # JetStream durations are nanoseconds
_STREAM_NAME_IN_USE = 10058
_SUBJECTS_OVERLAP = 10065

MAX_QUEUED_PER_MODEL = 1000
MAX_BATCH_QUEUED_PER_MODEL = 10_000  # batches feed a few at a time; this is for what others may do
KEPT_S = 30 * 24 * 3600  # files, and batches that have ended


def request_stream(
    max_queued_per_model: int = MAX_QUEUED_PER_MODEL, klass: names.RequestClass = "interactive"
) -> dict[str, Any]:
    """The work queue of one class: interactive in memory, batch in files."""
    subjects = f"{names.PREFIX}.requests.{klass}.>"
    return {
        "name": names.request_stream(klass),
        "subjects": [subjects],
        "retention": "workqueue",
        "storage": "file" if klass == "batch" else "memory",
        "discard": "new",
        "discard_new_per_subject": True,
        "max_msgs_per_subject": max_queued_per_model,
        "max_bytes": 1 << 30,
        "allow_msg_ttl": True,
        "allow_direct": True,
        "duplicate_window": 120 * NS,
        # Demand for the scheduler: headers only, it never sees a prompt.
        "republish": {
            "src": subjects,
            "dest": f"{names.PREFIX}.demand.{klass}.>",
            "headers_only": True,
        },
    }


def result_stream() -> dict[str, Any]:
    """Full, it refuses: an answer that is not kept is made again, a lost one never would be."""
    return {
        "name": names.STREAM_RESULTS,
        "subjects": [names.result_subject()],
        "retention": "limits",
        "storage": "file",
        "discard": "new",
        "max_bytes": 2 << 30,
        "max_age": KEPT_S * NS,
        "allow_direct": True,
    }


def file_stream() -> dict[str, Any]:
    return {
        "name": names.STREAM_FILES,
        "subjects": [names.file_subject("*")],
        "retention": "limits",
        "storage": "file",
        "discard": "new",
        "max_bytes": 4 << 30,
        "max_age": KEPT_S * NS,
        "allow_direct": True,
    }


def event_stream() -> dict[str, Any]:
    return {
        "name": names.STREAM_EVENTS,
        "subjects": [names.events_subject()],
        "retention": "limits",
        "storage": "file",
        "discard": "old",
        "max_msgs": 200_000,
        "max_bytes": 256 << 20,
        "max_age": 7 * 24 * 3600 * NS,
        "allow_direct": True,
    }


def bucket_stream(bucket: str, history: int = 1) -> dict[str, Any]:
    """The stream that is a KV bucket (NATS ADR-8); per-key TTL as in ADR-43."""
    return {
        "name": f"KV_{bucket}",
        "subjects": [f"$KV.{bucket}.>"],
        "retention": "limits",
        "storage": "file",
        "discard": "new",
        "max_msgs_per_subject": history,
        "max_bytes": 64 << 20,
        "allow_rollup_hdrs": True,
        "allow_direct": True,
        "deny_delete": True,
        "allow_msg_ttl": True,
        "subject_delete_marker_ttl": 60 * NS,
    }


BUCKETS = (
    names.BUCKET_DEPLOYMENTS,
    names.BUCKET_MODELS,
    names.BUCKET_PLACEMENT,
    names.BUCKET_RESIDENCY,
    names.BUCKET_LEASES,
    names.BUCKET_FILES,
    names.BUCKET_BATCHES,
    names.BUCKET_KEYS,
)


async def declare(bus: Bus, max_queued_per_model: int = MAX_QUEUED_PER_MODEL) -> None:
    """Make every stream and bucket exist; again after each reconnect, by itself."""
    configs = [request_stream(max_queued_per_model), event_stream()]
    configs += [request_stream(MAX_BATCH_QUEUED_PER_MODEL, "batch"), result_stream(), file_stream()]
    configs += [bucket_stream(bucket) for bucket in BUCKETS]

    async def assert_streams() -> None:
        for config in configs:
            await _assert(bus, config)

    await assert_streams()
    bus.on_reconnect(assert_streams)


async def declare_bucket(bus: Bus, bucket: str) -> None:
    """Make this one exist."""
    await _assert(bus, bucket_stream(bucket))


async def _assert(bus: Bus, config: dict[str, Any]) -> None:
    try:
        await bus.jetstream(f"STREAM.CREATE.{config['name']}", config)
    except JetStreamError as error:
        # In use with another config: somebody tuned it by hand, or another service
        # has another limit. It exists, which is all we need.
        if error.code == _SUBJECTS_OVERLAP:
            raise BusError(
                f"{config['name']} can not be made: another stream has its subjects, most "
                f"likely {names.STREAM_REQUESTS} of an earlier version. It is in memory "
                "only: restart nats-server, or delete it (nats stream rm)"
            ) from error
        if error.code != _STREAM_NAME_IN_USE:
            raise
