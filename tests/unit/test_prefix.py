"""Keys of KV blocks."""

from transformers import LlamaConfig

from services.gpu_agent.engine.prefix import are_prefixes_shareable, extend_keys


def keys_of(ids: list[int], salt: bytes = b"") -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, ids, 4, salt)
    return keys


def test_only_full_blocks_have_keys_and_they_stand_for_all_tokens_before() -> None:
    ids = list(range(11))
    assert len(keys_of(ids)) == 2
    assert keys_of(ids)[:1] == keys_of(ids[:4])
    changed = [99, *ids[1:]]
    assert not set(keys_of(ids)) & set(keys_of(changed))
    assert keys_of(ids)[0] == keys_of([*ids[:4], 7, 7, 7, 7])[0]


def test_keys_grow_with_the_row() -> None:
    ids = list(range(16))
    keys = keys_of(ids[:6])
    extend_keys(keys, ids, 4)
    assert keys == keys_of(ids)


def test_with_salts_nothing_is_shared() -> None:
    ids = list(range(8))
    assert not set(keys_of(ids, b"1")) & set(keys_of(ids, b"2"))


def test_rotary_frequencies_that_follow_the_length_forbid_sharing() -> None:
    assert are_prefixes_shareable(LlamaConfig())
    stretched = {"rope_theta": 1e4, "factor": 4.0}
    linear = LlamaConfig(rope_parameters={**stretched, "rope_type": "linear"})
    dynamic = LlamaConfig(rope_parameters={**stretched, "rope_type": "dynamic"})
    assert are_prefixes_shareable(linear)
    assert not are_prefixes_shareable(dynamic)
