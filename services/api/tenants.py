"""Who a request is for: the API key that came with it, as a hash.

The key itself goes no further than this file. Keys are not checked here.
"""

import hashlib

HASH_DIGITS = 16


def tenant_of(authorization: str | None) -> str:
    """``Bearer KEY`` -> the first digits of the key's SHA-256; "" where there is no key."""
    scheme, _, key = (authorization or "").strip().partition(" ")
    key = key.strip()
    if scheme.lower() != "bearer" or not key:
        return ""
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:HASH_DIGITS]
