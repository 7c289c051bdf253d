"""API keys: how they look, what is kept, what they allow."""

import hashlib
from typing import Any

import pytest

from schemas.keys import KeyRecord
from services import keys
from services.api.tenants import tenant_of
from services.keys import BadKey

OLD = "sk-somebody-elses-0123456789"


def test_a_new_key_shows_its_id_and_is_kept_as_a_hash() -> None:
    key, record = keys.make("ada")
    assert key.startswith(f"hs-{record.id}-")
    assert len(key) > 60
    assert record.hash == hashlib.sha256(key.encode()).hexdigest()
    assert key.removeprefix(f"hs-{record.id}-") not in repr(record)
    assert (record.role, record.models, record.requests_per_minute) == ("user", (), None)
    assert keys.make("ada")[0] != key


def test_the_tenant_of_a_key_is_its_id() -> None:
    key, record = keys.make("ada")
    assert tenant_of(f"Bearer {key}") == record.id
    _, old = keys.make("old", key=OLD)
    assert tenant_of(f"Bearer {OLD}") == old.id == old.hash[: keys.ID_DIGITS]


def test_only_the_whole_key_is_right() -> None:
    key, record = keys.make("ada")
    other, _ = keys.make("eve")
    forged = f"hs-{record.id}-{other.rsplit('-', 1)[1]}"
    assert keys.is_right(key, record)
    for wrong in (forged, other, key[:-1], key + "x", "", f"hs-{record.id}-", "é\udcff"):
        assert not keys.is_right(wrong, record)
    assert not keys.is_right(key, None)


@pytest.mark.parametrize(
    ("models", "model", "allowed"),
    [
        ((), "anything", True),
        (("llama",), "llama", True),
        (("llama",), "llama2", False),
        (("llama*", "x"), "llama2", True),
        (("Qwen/*",), "Qwen/Qwen2.5-7B", True),
        (("Qwen/*",), "qwen/Qwen2.5-7B", False),
        (("a[1]",), "a[1]", True),  # a name comes before a pattern
        (("llama",), "", False),
    ],
)
def test_models_are_names_or_patterns(models: tuple[str, ...], model: str, allowed: bool) -> None:
    record = KeyRecord("i", "n", "h", models=models)
    assert keys.allows(record, model) is allowed
    assert keys.allows(None, model)


def test_a_key_expires_at_its_time() -> None:
    record = KeyRecord("i", "n", "h", expires_at=100)
    assert [keys.has_expired(record, now) for now in (99.9, 100.0, 101.0)] == [False, True, True]
    assert not keys.has_expired(KeyRecord("i", "n", "h"), 1e12)


@pytest.mark.parametrize(
    ("fields", "field", "says"),
    [
        ({"name": " "}, "name", "name = ' ' must have 1 to 100 printable characters"),
        ({"name": "a\nb"}, "name", "printable"),
        ({"models": ("a", "")}, "models", "models = ['a', '']"),
        ({"requests_per_minute": 0}, "requests_per_minute", "requests_per_minute = 0 must be from"),
        ({"tokens_per_minute": -1}, "tokens_per_minute", "tokens_per_minute = -1"),
        ({"max_concurrent": 10**10}, "max_concurrent", "max_concurrent = 10000000000"),
        ({"expires_at": 5}, "expires_at", "expires_at = 5 is before the key was made"),
        ({"key": "short"}, "key", "24 to 512 characters"),
        ({"key": "spaces " * 5}, "key", "must not hold spaces"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(
    fields: dict[str, Any], field: str, says: str
) -> None:
    with pytest.raises(BadKey) as caught:
        keys.make(**{"name": "ada", **fields})
    assert caught.value.field == field
    assert says in str(caught.value)


def test_a_change_leaves_the_rest() -> None:
    _, record = keys.make("ada", models=("m",), max_concurrent=2)
    other = keys.changed(record, max_concurrent=None, disabled=True)
    assert (other.models, other.max_concurrent, other.disabled) == (("m",), None, True)
    assert (other.id, other.hash) == (record.id, record.hash)


def test_found_by_id_or_name() -> None:
    one, two = KeyRecord("1", "ada", "h"), KeyRecord("2", "ada", "h")
    odd = KeyRecord("3", "1", "h")  # a name that is another one's id
    assert keys.by_name([one, two, odd], "1") == [one]
    assert keys.by_name([one, two, odd], "ada") == [one, two]
    assert keys.by_name([one], "eve") == []
