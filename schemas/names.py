"""Names on the bus: escaping of model names, and every subject, stream and bucket.

A NATS subject token, a consumer name and a KV key all have to stay inside
``[A-Za-z0-9_-]``. Model names do not (``Qwen/Qwen2.5-7B``), so each byte outside that
set is written ``=HH``: reversible, readable, and ``=`` itself is escaped, so two names
never collide.
"""

from typing import Literal, TypeAlias

RequestClass: TypeAlias = Literal["interactive", "batch"]

PREFIX = "hs.v1"
NO_TOKEN = "-"  # fills a subject token that does not apply, so that positions never move

STREAM_REQUESTS = "HS_REQUESTS"
STREAM_BATCH = "HS_BATCH"  # requests of class "batch"
STREAM_RESULTS = "HS_RESULTS"  # what is answered to these
STREAM_FILES = "HS_FILE_DATA"
STREAM_EVENTS = "HS_EVENTS"
BUCKET_DEPLOYMENTS = "HS_DEPLOYMENTS"
BUCKET_MODELS = "HS_MODELS"
BUCKET_PLACEMENT = "HS_PLACEMENT"
BUCKET_RESIDENCY = "HS_RESIDENCY"
BUCKET_LEASES = "HS_LEASES"
BUCKET_FILES = "HS_FILES"
BUCKET_BATCHES = "HS_BATCHES"
BUCKET_KEYS = "HS_KEYS"

LEADER_KEY = "scheduler.leader"
BATCHES_KEY = "batches.leader"

TOKENIZE_GROUP = "tokenizers"  # one of its members answers

HEADER_TENANT = "Hotswap-Tenant"  # of queued requests, and so of demand; left out where it is ""

_SAFE = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")
_HEX = frozenset("0123456789ABCDEF")


def escape(name: str) -> str:
    """``name`` as one subject token: ``Qwen/Qwen2.5-7B`` -> ``Qwen=2FQwen2=2E5-7B``."""
    if not name:
        raise ValueError("an empty name can not be a subject token")
    return "".join(chr(b) if b in _SAFE else f"={b:02X}" for b in name.encode())


def is_key(text: str) -> bool:
    """Whether ``text`` may stand as it is where a name is escaped."""
    return bool(text) and _SAFE.issuperset(text.encode())


def unescape(token: str) -> str:
    """The name that `escape` wrote as ``token``. Raises ValueError for anything else."""
    out = bytearray()
    rest = iter(token)
    for char in rest:
        if char == "=":
            digits = next(rest, "") + next(rest, "")
            if len(digits) != 2 or not _HEX.issuperset(digits):
                raise ValueError(f"not an escaped name: {token!r} (bad escape ={digits})")
            out.append(int(digits, 16))
        elif char.isascii() and ord(char) in _SAFE:
            out.append(ord(char))
        else:
            raise ValueError(f"not an escaped name: {token!r} (bare {char!r})")
    return out.decode()


def request_subject(klass: RequestClass, model: str) -> str:
    return f"{PREFIX}.requests.{klass}.{escape(model)}"


def request_stream(klass: RequestClass) -> str:
    """The stream that requests of this class wait in."""
    return STREAM_BATCH if klass == "batch" else STREAM_REQUESTS


def result_subject(batch: str = "*", line: int | str = "*") -> str:
    """Where the request made of one line of a batch is answered: kept by HS_RESULTS."""
    return f"{PREFIX}.results.{batch}.{line}"


def file_subject(file: str) -> str:
    return f"{PREFIX}.files.{file}"


def demand_subject(klass: str = "*", model: str | None = None) -> str:
    return f"{PREFIX}.demand.{klass}.{escape(model) if model else '*'}"


def model_of_subject(subject: str) -> str:
    """The model in a request or demand subject (its last token)."""
    return unescape(subject.rsplit(".", 1)[1])


def cancel_subject(model: str | None = None) -> str:
    return f"{PREFIX}.cancel.{escape(model) if model else '*'}"


def command_subject(gpu: str) -> str:
    return f"{PREFIX}.agent.{escape(gpu)}.command"


def verify_subject(gpu: str | None = None) -> str:
    return f"{PREFIX}.agent.{escape(gpu) if gpu else '*'}.verify"


def status_subject(gpu: str | None = None) -> str:
    return f"{PREFIX}.agent.{escape(gpu) if gpu else '*'}.status"


def event_subject(kind: str, gpu: str = "", model: str = "") -> str:
    gpu_token = escape(gpu) if gpu else NO_TOKEN
    model_token = escape(model) if model else NO_TOKEN
    return f"{PREFIX}.events.{kind}.{gpu_token}.{model_token}"


def events_subject(kind: str = "") -> str:
    """All events, or those of one kind."""
    return f"{PREFIX}.events.{kind}.>" if kind else f"{PREFIX}.events.>"


def admin_subject(action: str = "*", model: str | None = None) -> str:
    """Requests to the leader: ``action`` is the last part of the message's tag."""
    return f"{PREFIX}.admin.{action}.{escape(model) if model else '*'}"


def wait_subject(model: str | None = None) -> str:
    return f"{PREFIX}.waits.{escape(model) if model else '*'}"


def tokenize_subject(model: str | None = None) -> str:
    return f"{PREFIX}.tokenize.{escape(model) if model else '*'}"


def consumer_name(model: str) -> str:
    """The work-queue consumer that all replicas of ``model`` share."""
    return f"model-{escape(model)}"


def replica_key(gpu: str, model: str) -> str:
    return f"{escape(gpu)}.{escape(model)}"


def agent_lease_key(gpu: str) -> str:
    return f"agent.{escape(gpu)}"
