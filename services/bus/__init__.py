"""A thin, typed layer over NATS: what the services use instead of nats-py.

connection   connect, publish, subscribe, JetStream API calls; the only file that imports nats
topology     the streams and buckets, declared idempotently
work_queue   enqueue, pull by free slots, withdraw, depths
kv           typed buckets with watches, and leases
history      what a stream still holds, and what comes
blobs        files in a stream, in chunks
"""

from services.bus.connection import (
    Bus,
    BusError,
    BusOptions,
    BusUnavailable,
    JetStreamError,
    Message,
    NoResponder,
)
from services.bus.kv import Bucket, Entry, Lease, LeaseLost, Writer
from services.bus.topology import declare
from services.bus.work_queue import Delivery, Puller, QueueFull, WorkQueue

__all__ = [
    "Bucket",
    "Bus",
    "BusError",
    "BusOptions",
    "BusUnavailable",
    "Delivery",
    "Entry",
    "JetStreamError",
    "Lease",
    "LeaseLost",
    "Message",
    "NoResponder",
    "Puller",
    "QueueFull",
    "WorkQueue",
    "Writer",
    "declare",
]
