"""Who a request is for, by its Authorization header."""

import hashlib

import pytest

from services.api.tenants import tenant_of

HASH = hashlib.sha256(b"sk-1").hexdigest()[:16]


@pytest.mark.parametrize("header", ["Bearer sk-1", "bearer sk-1", " BEARER   sk-1 "])
def test_a_key_is_known_by_its_hash(header: str) -> None:
    assert tenant_of(header) == HASH


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic sk-1", "sk-1"])
def test_without_a_key_there_is_nobody(header: str | None) -> None:
    assert tenant_of(header) == ""


def test_other_keys_are_others() -> None:
    assert tenant_of("Bearer sk-2") not in (HASH, "")
    assert tenant_of("Bearer \udcff") != ""  # as the framework hands over what is no text
