"""API keys as they are kept: what a key may do, and a hash of it, never the key."""

from typing import Literal, TypeAlias

import msgspec

Role: TypeAlias = Literal["user", "admin"]


class KeyRecord(msgspec.Struct, frozen=True, omit_defaults=True, tag="hotswap.state.v1.key"):
    """HS_KEYS/<id>: one API key. Written by the api and by `hotswap keys`.

    ``models``: names of deployments, or patterns such as "llama-*"; empty: all. A limit that is
    None does not apply.
    """

    id: str  # 16 hex digits, part of the key; also the tenant of its requests
    name: str
    hash: str  # SHA-256 of the whole key, as hex
    role: Role = "user"
    models: tuple[str, ...] = ()
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # of prompts and answers together
    max_concurrent: int | None = None  # requests at once
    created_at: int = 0  # unix seconds
    expires_at: int | None = None  # unix seconds; None: never
    disabled: bool = False
