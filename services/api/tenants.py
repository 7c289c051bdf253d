"""Who a request is for: the id of the API key that came with it.

The key itself goes no further than this file and `keyring`, which checks it.
"""

from services.keys import key_id


def bearer_of(authorization: str | None) -> str:
    """The key in ``Bearer KEY``; "" where there is none."""
    scheme, _, key = (authorization or "").strip().partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def tenant_of(authorization: str | None) -> str:
    """``Bearer KEY`` -> the id in the key, or the start of its SHA-256; "" without a key."""
    key = bearer_of(authorization)
    return key_id(key) if key else ""
