"""The streams and buckets, as JetStream configs, declared idempotently by every service.

| stream      | storage | kept                                                              |
| HS_REQUESTS | memory  | until acknowledged (work queue); full subjects refuse new messages |
| HS_EVENTS   | file    | the newest, by count and age                                      |
| KV_HS_*     | file    | the last value per key                                            |

HS_LEASES is a file bucket too: a lease's fencing epoch is its stream sequence, which must
not start again from 1 when the server restarts.
"""

from typing import Any

from schemas import names
from services.bus.connection import Bus, JetStreamError

NS = 10**9  # JetStream durations are nanoseconds
_STREAM_NAME_IN_USE = 10058

MAX_QUEUED_PER_MODEL = 1000


def request_stream(max_queued_per_model: int = MAX_QUEUED_PER_MODEL) -> dict[str, Any]:
    return {
        "name": names.STREAM_REQUESTS,
        "subjects": [f"{names.PREFIX}.requests.>"],
        "retention": "workqueue",
        "storage": "memory",
        "discard": "new",
        "discard_new_per_subject": True,
        "max_msgs_per_subject": max_queued_per_model,
        "max_bytes": 1 << 30,
        "allow_msg_ttl": True,
        "allow_direct": True,
        "duplicate_window": 120 * NS,
        # Demand for the scheduler: headers only, it never sees a prompt.
        "republish": {
            "src": f"{names.PREFIX}.requests.>",
            "dest": f"{names.PREFIX}.demand.>",
            "headers_only": True,
        },
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
)


async def declare(bus: Bus, max_queued_per_model: int = MAX_QUEUED_PER_MODEL) -> None:
    """Make every stream and bucket exist; again after each reconnect, by itself."""
    configs = [request_stream(max_queued_per_model), event_stream()]
    configs += [bucket_stream(bucket) for bucket in BUCKETS]

    async def assert_streams() -> None:
        for config in configs:
            try:
                await bus.jetstream(f"STREAM.CREATE.{config['name']}", config)
            except JetStreamError as error:
                # In use with another config: somebody tuned it by hand, or another service
                # has another limit. It exists, which is all we need.
                if error.code != _STREAM_NAME_IN_USE:
                    raise

    await assert_streams()
    bus.on_reconnect(assert_streams)
