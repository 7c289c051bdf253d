"""`hotswap.toml` as frozen, validated structs, read once.

Every key is known by name; an unknown key, a wrong type or a value out of range raises
SettingsError with the key, the value and what would be right. `deploy/config.example.toml`
shows every key with its default; a test keeps the two in step.
"""

import difflib
import ipaddress
import math
import os
import re
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import tomli_w

from schemas.state import DType, ModelSpec, Preemption

T = TypeVar("T")
S = TypeVar("S", bound="_Section")

UNSET_WORD = "unset"  # in overrides of a TOML file: takes the field out
_MAX_NAME = 200  # characters in a model name
_MAX_PRIORITY = 100  # of a model, either way
_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[f"{_letter}B"] = 1000**_power
    _UNITS[f"{_letter}IB"] = 1024**_power


class SettingsError(Exception):
    """The configuration can not be used; the message names key and value."""


def parse_bytes(text: str | int) -> int:
    """``"1.5GiB"``, ``"800 MB"`` or a number of bytes, as bytes. Raises ValueError."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if not match or unit is None:
        raise ValueError(f"{text!r} is not a size; write it like 24GiB, 800MB or 1073741824")
    return int(float(match[1]) * unit)


def _positive(owner: object, *keys: str) -> None:
    for key in keys:
        value = getattr(owner, key)
        if value is not None and not value > 0:  # so that nan is refused, too
            raise ValueError(f"{key} = {value!r} must be greater than 0")


def _not_negative(owner: object, *keys: str) -> None:
    for key in keys:
        value = getattr(owner, key)
        if not value >= 0:
            raise ValueError(f"{key} = {value!r} must not be negative")


def _finite(owner: object, *keys: str) -> None:
    """For what goes to other services: JSON has no inf and no nan."""
    for key in keys:
        value = getattr(owner, key)
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{key} = {value!r} must be a finite number")


def _port(owner: object, key: str = "port") -> None:
    value = getattr(owner, key)
    if not 0 <= value <= 65535:
        raise ValueError(f"{key} = {value} is not a port number (0-65535)")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``. A name other than localhost: it may be more."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _tls_pair(owner: object) -> None:
    cert, key = getattr(owner, "tls_cert"), getattr(owner, "tls_key")  # noqa: B009
    if bool(cert) != bool(key):
        raise ValueError(f"tls_cert = {cert!r} and tls_key = {key!r}: give both, or neither")


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class ApiSettings(_Section, frozen=True):
    host: str = "127.0.0.1"
    port: int = 8000
    request_timeout_s: float = 600.0
    max_body_bytes: int = 4 * 2**20
    max_queued_per_model: int = 1000
    progress_after_s: float = 1.0  # a stream that waits longer tells of its wait; 0: never
    max_file_bytes: int = 100 * 2**20  # of one that is uploaded for a batch
    auth: Literal["auto", "on", "off"] = "auto"  # API keys; auto: off on loopback, else on
    tls_cert: str = ""  # PEM files; both: HTTPS
    tls_key: str = ""
    max_prompt_chars: int = 2_000_000
    max_open_requests: int = 2000
    max_open_body_bytes: int = 512 * 2**20  # of all open requests together
    max_connections: int = 4000
    read_timeout_s: float = 30.0  # for a request's head, and for its body to begin
    write_timeout_s: float = 30.0  # a client that takes nothing for so long is cut off
    keep_alive_s: int = 75  # a connection without requests is closed then

    def __post_init__(self) -> None:
        _port(self)
        _positive(self, "request_timeout_s", "max_body_bytes", "max_queued_per_model")
        _not_negative(self, "progress_after_s")
        _positive(self, "max_file_bytes")
        _positive(self, "max_prompt_chars", "max_open_requests", "max_open_body_bytes")
        _positive(self, "max_connections", "read_timeout_s", "write_timeout_s", "keep_alive_s")
        _tls_pair(self)

    @property
    def requires_keys(self) -> bool:
        return self.auth == "on" or (self.auth == "auto" and not is_loopback(self.host))


class NatsSettings(_Section, frozen=True):
    """Empty ``url``: an embedded server, on loopback by default, with generated credentials."""

    url: str = ""
    creds: str = ""  # JSON file with user, password and inbox_prefix
    port: int = 4222  # of the embedded server; another free one is taken if it is in use
    http_port: int = 8222
    host: str = "127.0.0.1"  # where the embedded server listens; beyond loopback it needs TLS
    advertised_host: str = ""  # a name in its certificate that services reach it by; empty: host
    tls_cert: str = ""  # PEM files of the embedded server
    tls_key: str = ""
    tls_ca: str = (
        ""  # PEM file that clients check the server's certificate with; empty: the system's
    )

    def __post_init__(self) -> None:
        _port(self)
        _port(self, "http_port")
        _tls_pair(self)
        if not self.url and not is_loopback(self.host) and not self.tls_cert:
            raise ValueError(
                f"host = {self.host!r} is not loopback: the embedded NATS server needs tls_cert "
                "and tls_key there (and tls_ca, unless the system knows who signed them)"
            )
        if self.url and self.tls_cert:
            raise ValueError("tls_cert is of the embedded server, and url names another one")
        if self.url and not re.match(r"(nats|tls|ws|wss)://", self.url):
            raise ValueError(f"url = {self.url!r} must look like nats://host:4222")


class GpuSettings(_Section, frozen=True):
    """One device, and so one agent."""

    name: str
    device: Literal["auto", "cpu", "cuda"] = "auto"
    index: int = 0  # CUDA device index
    memory: str = (
        "auto"  # budget for weights and KV; auto: 90 % of a GPU, 25 % of RAM (<= 8GiB) on CPU
    )
    page: str = "auto"
    threads: int = 0  # compute threads on CPU; 0: all cores
    host_memory: str = "auto"  # budget for host images; auto: 70 % of what is free at start
    host_kv_memory: str = "auto"  # for KV of suspended requests and known prompts; auto: 10 %
    share_images: bool = False  # one copy of each host image for all agents of this machine
    verify: Literal["sampled", "all", "off"] = "sampled"  # pages checked at each swap-in
    cuda_graphs: bool = True  # CUDA: record decode steps and replay them
    link_gb_per_s: float = 0.0  # CPU only: swap in no faster than this; 0: as fast as it goes

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise ValueError(f"name = {self.name!r} may hold letters, digits, - and _ only")
        for key in ("memory", "page", "host_memory", "host_kv_memory"):
            if getattr(self, key) != "auto":
                parse_bytes(getattr(self, key))
        _not_negative(self, "index", "threads", "link_gb_per_s")


class SchedulerSettings(_Section, frozen=True):
    run_quantum_s: float = 1.0  # a busy model gives way to a waiting one no sooner than this
    lease_ttl_s: int = 2  # a dead scheduler's successor waits this long at most
    reconcile_s: float = 1.0
    retry_failed_s: float = 10.0  # first retry of a model that failed; doubles up to 5 minutes
    ttft_target_s: float = 2.0  # time to first token aimed at, where a model names none
    token_target_s: float = 0.1  # time per output token aimed at, where a model names none
    preemption: Literal["slack", "off"] = "slack"  # busy models with slack give way; off: none does
    replicate: bool = True  # a model that is too busy for one GPU may be on several
    prefetch: bool = False  # bring in what may be wanted next, into memory that nobody uses
    migrate: bool = False  # a model of a GPU where too much runs moves to another one
    starvation_s: float = 3.0  # a model that waited this long goes first, whatever else
    fair_shares: bool = True  # who used more of the GPUs than others waits behind them

    def __post_init__(self) -> None:
        _positive(self, "run_quantum_s", "lease_ttl_s", "reconcile_s", "retry_failed_s")
        _positive(self, "ttft_target_s", "token_target_s", "starvation_s")


class TelemetrySettings(_Section, frozen=True):
    otlp_endpoint: str = (
        ""  # e.g. http://127.0.0.1:4318; empty: OTEL_EXPORTER_OTLP_ENDPOINT, else off
    )
    span_files: bool = True  # <state_dir>/spans/<service>.jsonl
    log_level: Literal["debug", "info", "warning", "error"] = "info"


class ModelSettings(_Section, frozen=True):
    """One deployment. Its name is the table's: ``[models."qwen2.5-7b"]``.

    An object store needs ``pip install 'hotswap[object-store]'``. Credentials and server come from
    the environment of the agents: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN (or
    AWS_PROFILE), AWS_REGION, and AWS_ENDPOINT_URL where it is not Amazon's.
    """

    source: str  # local folder, hub id, or s3://bucket/prefix (see above)
    dtype: DType = "auto"
    max_model_len: int | None = None
    max_batch: int = 8
    kv_tokens: int | None = None
    preload: bool = True
    trust_remote_code: bool = False
    runner: Literal["auto", "generate", "embed"] = "auto"
    prefix_caching: bool = True  # requests use what others computed of the same tokens
    preemption: Preemption = "preserve"  # of its running requests, for another model's
    pinned: bool = False  # brought in unasked and never swapped out for another model
    gpus: tuple[str, ...] = ()  # names of the GPUs it may use; empty: any
    priority: int = 0  # of waiting models the higher one goes first; -100..100
    ttft_target_s: float | None = None  # time to first token aimed at; None: [scheduler]'s
    token_target_s: float | None = None  # time per output token aimed at; None: [scheduler]'s
    exclusive_group: str = ""  # of the models that name the same, one at most is on a GPU at a time
    ttl_s: float = 0.0  # swapped out after so many idle seconds; 0: stays until room is needed
    min_residency_s: float = 0.0  # what just came in leaves for no other model before this
    drained: bool = False  # takes no new requests, and leaves when those it has have ended
    aliases: tuple[str, ...] = ()  # other names that clients may call it by
    # Fields of request bodies: where the client leaves them out, and whatever it says.
    defaults: dict[str, Any] = {}
    overrides: dict[str, Any] = {}  # a null (in TOML: "unset") takes the field out

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError("source = '' must name a local folder, a hub id or s3://bucket/prefix")
        if "://" in self.source and not self.source.startswith("s3://"):
            raise ValueError(f"source = {self.source!r}: of object stores only s3:// is read")
        _finite(self, "ttft_target_s", "token_target_s", "ttl_s", "min_residency_s")
        _positive(self, "max_model_len", "max_batch", "kv_tokens")
        _positive(self, "ttft_target_s", "token_target_s")
        _not_negative(self, "ttl_s", "min_residency_s")
        if abs(self.priority) > _MAX_PRIORITY:
            raise ValueError(
                f"priority = {self.priority} must be from -{_MAX_PRIORITY} to {_MAX_PRIORITY}"
            )
        for gpu in self.gpus:
            if self.gpus.count(gpu) > 1:
                raise ValueError(f"gpus = {list(self.gpus)}: {gpu!r} is named twice")
        for alias in self.aliases:
            if not is_name(alias):
                raise ValueError(f"aliases: {alias!r} must have 1 to {_MAX_NAME} characters")
            if self.aliases.count(alias) > 1:
                raise ValueError(f"aliases = {list(self.aliases)}: {alias!r} is named twice")
        if both := sorted(self.defaults.keys() & self.overrides.keys()):
            raise ValueError(f"{both[0]!r} is in defaults and in overrides: one of them is enough")

    def spec(self, name: str) -> ModelSpec:
        """As the other services know it."""
        return ModelSpec(name=name, **{key: getattr(self, key) for key in self.__struct_fields__})


def is_name(name: str) -> bool:
    """Whether a deployment or an alias may be called so."""
    return bool(name.strip()) and len(name) <= _MAX_NAME


class Settings(_Section, frozen=True):
    state_dir: str = ".hotswap"
    api: ApiSettings = ApiSettings()
    nats: NatsSettings = NatsSettings()
    gpus: tuple[GpuSettings, ...] = ()  # empty: what the machine has
    scheduler: SchedulerSettings = SchedulerSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    models: dict[str, ModelSettings] = {}

    def __post_init__(self) -> None:
        gpu_names = [gpu.name for gpu in self.gpus]
        for name in gpu_names:
            if gpu_names.count(name) > 1:
                raise ValueError(f"gpus: name = {name!r} is used twice")
        check_together(self.models, gpu_names)

    @property
    def state_path(self) -> Path:
        return Path(self.state_dir).expanduser().absolute()

    def model_specs(self) -> list[ModelSpec]:
        """The deployments, in the order of the file."""
        return [model.spec(name) for name, model in self.models.items()]


def check_together(
    models: Mapping[str, ModelSettings | ModelSpec], gpu_names: Sequence[str]
) -> None:
    """Raise ValueError where ``models``, by name, can not all be deployed.

    ``gpu_names``: the configured ones; none where the machine is asked for its GPUs later.
    """
    for name, model in models.items():
        check_gpus(name, model, gpu_names)
    check_groups(models, gpu_names)
    check_names(models)


def check_names(models: Mapping[str, ModelSettings | ModelSpec]) -> None:
    """Raise ValueError where a name or an alias would mean two of ``models``."""
    owners: dict[str, str] = {}
    for name, model in models.items():
        for alias in model.aliases:
            owner = owners.setdefault(alias, name)
            if alias in models or owner != name:
                other = alias if alias in models else owner
                raise ValueError(
                    f"models.{name}: aliases = {list(model.aliases)}: {alias!r} is a name of "
                    f"model {other!r} already"
                )


def check_gpus(name: str, model: ModelSettings | ModelSpec, gpu_names: Sequence[str]) -> None:
    """``gpu_names``: the configured ones; none where the machine is asked for its GPUs later."""
    for gpu in model.gpus:
        if gpu_names and gpu not in gpu_names:
            raise ValueError(
                f"models.{name}: gpus = {list(model.gpus)}: no [[gpus]] has the name {gpu!r}; "
                f"known names: {', '.join(gpu_names)}"
            )


def check_groups(models: Mapping[str, ModelSettings | ModelSpec], gpu_names: Sequence[str]) -> None:
    """Each pinned model of an exclusive group needs a GPU that no other of them is on."""
    groups: dict[str, list[str]] = {}
    for name, model in models.items():
        if model.pinned and model.exclusive_group:
            groups.setdefault(model.exclusive_group, []).append(name)
    for group, pinned in groups.items():
        usable = [models[name].gpus or gpu_names for name in pinned]
        gpus = list(dict.fromkeys(gpu for names in usable for gpu in names))
        if all(usable) and len(pinned) > len(gpus):  # where one has none, any the machine has
            raise ValueError(
                f"models: {', '.join(pinned)} have pinned = true and exclusive_group = {group!r}, "
                f"so each needs a GPU of its own, but they may use only: {', '.join(gpus)}"
            )


def load(path: Path) -> Settings:
    """Read ``path``. Relative model folders and state_dir are taken from its folder."""
    try:
        raw = tomllib.loads(path.read_text())
    except OSError as error:
        raise SettingsError(f"can not read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not valid TOML: {error}") from error
    return parse(raw, origin=str(path), folder=path.absolute().parent)


def parse(raw: dict[str, Any], *, origin: str, folder: Path) -> Settings:
    """``raw`` (parsed TOML) as Settings. Raises SettingsError."""
    rest = {key: value for key, value in raw.items() if key != "models"}
    settings = _convert(rest, Settings, origin, ())
    tables = raw.get("models", {})
    if not isinstance(tables, dict):
        raise SettingsError(f"{origin}: models = {tables!r}: write each model as [models.NAME]")
    models: dict[str, ModelSettings] = {}
    for name, table in tables.items():
        if not is_name(name):
            raise SettingsError(f"{origin}: models: {name!r} must have 1 to {_MAX_NAME} characters")
        model = _convert(_with_nulls(table), ModelSettings, origin, ("models", name))
        models[name] = msgspec.structs.replace(model, source=_resolve(model.source, folder))
    state_dir = str(folder / Path(settings.state_dir).expanduser())
    api, nats = _tls_paths(settings.api, folder), _tls_paths(settings.nats, folder)
    try:
        return msgspec.structs.replace(
            settings, models=models, state_dir=state_dir, api=api, nats=nats
        )
    except ValueError as error:  # a check across sections
        raise SettingsError(f"{origin}: {error}") from error


def parse_model(raw: Any, prefix: tuple[str, ...] = ()) -> ModelSettings:
    """``raw`` (plain values) as the settings of one deployment. Raises SettingsError, whose words
    name the key, below ``prefix``, and its value.
    """
    try:
        return msgspec.convert(raw, ModelSettings)
    except msgspec.ValidationError as error:
        raise SettingsError(_explain(error, raw, ModelSettings, prefix)) from error


def _with_nulls(table: Any) -> Any:
    """TOML has no null: in overrides "unset" stands for it."""
    overrides = table.get("overrides") if isinstance(table, dict) else None
    if not isinstance(overrides, dict):
        return table
    nulls = {key: None if value == UNSET_WORD else value for key, value in overrides.items()}
    return table | {"overrides": nulls}


def dump(settings: Settings) -> str:
    """``settings`` as TOML that `load` reads back."""

    def no_nulls(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: no_nulls(v) for k, v in value.items() if v is not None}
        return [no_nulls(v) for v in value] if isinstance(value, list | tuple) else value

    plain = msgspec.to_builtins(settings)
    for model in plain["models"].values():
        overrides = model["overrides"]
        model["overrides"] = {k: UNSET_WORD if v is None else v for k, v in overrides.items()}
    return tomli_w.dumps(no_nulls(plain))


def _tls_paths(section: S, folder: Path) -> S:
    """The section with its files taken from ``folder``."""
    given = {key: getattr(section, key, "") for key in ("tls_cert", "tls_key", "tls_ca")}
    found = {key: str(folder / Path(file).expanduser()) for key, file in given.items() if file}
    return msgspec.structs.replace(section, **found)


def _resolve(source: str, folder: Path) -> str:
    """A path (it exists, or starts with / . ~) made absolute; a hub id or a URI as it is."""
    if "://" in source:
        return source
    local = folder / Path(source).expanduser()
    looks_local = source.startswith((".", "/", "~")) or local.exists()
    return os.path.normpath(local) if looks_local else source


def _convert(raw: Any, kind: type[T], origin: str, prefix: tuple[str, ...]) -> T:
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise SettingsError(f"{origin}: {_explain(error, raw, kind, prefix)}") from error


def _explain(error: msgspec.ValidationError, raw: Any, kind: Any, prefix: tuple[str, ...]) -> str:
    """msgspec's words, plus the key as the file has it, its value, and a likely correction."""
    words, _, where = str(error).partition(" - at `$")
    path = re.findall(r"\w+", where)  # ``$.gpus[0].memory`` -> gpus, 0, memory
    value = raw
    for part in path:
        value = value[int(part)] if isinstance(value, list) else value[part]
        if not part.isdigit():
            kind = _section_type(kind, part)
    dotted = ".".join((*prefix, *path))
    if unknown := re.search(r"unknown field `(.+?)`", words):
        known = kind.__struct_fields__
        near = difflib.get_close_matches(unknown[1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        dotted = f"{dotted}.{unknown[1]}" if dotted else unknown[1]
        return f"unknown key {dotted} = {value[unknown[1]]!r}; {hint}"
    if isinstance(value, dict):  # a check of the whole section: its words name key and value
        return f"{dotted}: {words}" if dotted else words
    return f"{dotted} = {value!r}: {words}"


def _section_type(kind: Any, key: str) -> Any:
    """The struct type of the section ``key`` in ``kind``, else ``kind`` itself."""
    if kind is Settings and key == "gpus":
        return GpuSettings
    found = typing.get_type_hints(kind).get(key)
    return found if hasattr(found, "__struct_fields__") else kind
