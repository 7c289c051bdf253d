"""Swapped-in models against transformers' own, bit for bit."""

import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from schemas.state import ModelSpec
from services.gpu_agent.device_cpu import PAGE_BYTES, CpuPool
from services.gpu_agent.facts import kv_pages
from services.gpu_agent.hosted import BadCheckpoint, HostedModel, KVGeometry
from services.gpu_agent.pages import OutOfPages
from tests.unit import tiny_models


@pytest.fixture
def pool() -> Iterator[CpuPool]:
    pool = CpuPool(3)
    yield pool
    pool.close()


def no_progress(_done: int, _total: int) -> None:
    pass


def host(folder: Path, pool: CpuPool, family: str, **spec: object) -> HostedModel:
    path = tiny_models.write(folder / family, family)
    return HostedModel.inspect(ModelSpec(family, str(path), **spec), pool)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_logits_equal_transformers_bit_for_bit(tmp_path: Path, pool: CpuPool, family: str) -> None:
    model = host(tmp_path, pool, family)
    expected = tiny_models.reference(model.folder)
    model.load(no_progress)
    ids = tiny_models.prompt()
    for _ in range(2):
        model.swap_in()
        assert torch.equal(tiny_models.logits(model.module, ids), tiny_models.logits(expected, ids))
        model.swap_out()
        pool.free.give(pool.free.take(pool.free.num_free))  # nothing is kept
    assert torch.get_default_dtype() == torch.float32
    model.close()


def test_twenty_random_swaps_of_several_models(tmp_path: Path, pool: CpuPool) -> None:
    # Each takes one page of weights and one of KV: three pages hold one and a half of them.
    families = list(tiny_models.FAMILIES)
    models = [host(tmp_path, pool, family) for family in families]
    ids = tiny_models.prompt()
    expected = [tiny_models.logits(tiny_models.reference(m.folder), ids) for m in models]
    for model in models:
        model.load(no_progress)
    addresses = [[p.data_ptr() for p in m.module.parameters()] for m in models]
    modules = [m.module for m in models]
    resident: list[HostedModel] = []
    chance = random.Random(7)
    for _ in range(20):
        index = chance.randrange(len(models))
        for victim in resident:
            victim.swap_out()
        models[index].swap_in()
        resident = [models[index]]
        # Something else lives in the other pages, and scribbles over them.
        other = pool.free.take(pool.free.num_free)
        for page in other:
            pool.identity(torch.uint8)[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = 0xAB
        assert torch.equal(tiny_models.logits(models[index].module, ids), expected[index])
        pool.free.give(other)
    assert [[p.data_ptr() for p in m.module.parameters()] for m in models] == addresses
    assert [m.module for m in models] == modules
    for model in models:
        model.close()
    assert pool.free.num_free == pool.num_pages


def test_facts_and_geometry(tmp_path: Path, pool: CpuPool) -> None:
    model = host(tmp_path, pool, "llama_tied", max_batch=3)
    facts = model.facts
    assert (facts.architecture, facts.dtype) == ("LlamaForCausalLM", "bfloat16")
    assert (facts.max_model_len, facts.max_batch) == (tiny_models.MAX_LEN, 3)
    assert facts.num_parameters == sum(p.numel() for p in model.module.parameters())
    assert (facts.weight_bytes, facts.kv_bytes) == (PAGE_BYTES, PAGE_BYTES)
    assert model.geometry.bytes_per_token == 2 * 2 * 2 * 16 * 2
    assert (model.state, model.kv_pages) == ("cold", ())
    assert host(tmp_path, pool, "llama", max_model_len=100).facts.max_model_len == 100
    # 2 MiB hold 8192 tokens of 256 bytes
    assert host(tmp_path, pool, "llama_tied", kv_tokens=8193).facts.kv_bytes == 2 * PAGE_BYTES


@pytest.mark.parametrize(
    ("setting", "value", "cause"),
    [
        ("max_model_len", tiny_models.MAX_LEN + 1, "max_model_len = 257 is more than the 256"),
        ("max_model_len", 0, "max_model_len = 0 is not positive"),
        ("kv_tokens", 0, "kv_tokens = 0 is not positive"),
    ],
)
def test_settings_that_can_not_be(
    tmp_path: Path, pool: CpuPool, setting: str, value: int, cause: str
) -> None:
    with pytest.raises(BadCheckpoint, match=cause):
        host(tmp_path, pool, "llama", **{setting: value})


def test_a_token_must_fit_a_page(pool: CpuPool) -> None:
    wide = KVGeometry(1, 1, 2**20, torch.float32, (None,))
    with pytest.raises(BadCheckpoint, match="more than a page of 2097152: use larger pages"):
        kv_pages(ModelSpec("m", "nowhere"), wide, 256, pool)


def test_a_model_larger_than_the_pool_is_described_but_never_swapped_in(tmp_path: Path) -> None:
    pool = CpuPool(1)
    model = host(tmp_path, pool, "llama")
    assert model.facts.footprint_bytes == 2 * PAGE_BYTES
    model.load(no_progress)
    with pytest.raises(OutOfPages):
        model.swap_in()
    model.close()
    pool.close()


def test_the_trace_tells_bytes_and_groups(tmp_path: Path, pool: CpuPool) -> None:
    model = host(tmp_path, pool, "falcon_7b")
    model.load(no_progress)
    trace = model.swap_in()
    assert [layer.name for layer in trace.layers] == ["embed", "layer.0", "layer.1", "norm"]
    assert trace.num_bytes == sum(layer.num_bytes for layer in trace.layers)
    weights = sum(p.numel() * p.element_size() for p in model.module.parameters())
    assert weights <= trace.num_bytes <= model.layout.num_bytes
    assert trace.copy_s >= sum(layer.copy_s for layer in trace.layers) > 0
    assert trace.total_s >= trace.map_s + trace.copy_s
    out = model.swap_out()
    assert (out.num_bytes, out.copy_s, out.layers) == (0, 0, ())
    assert out.total_s > 0
    model.close()


def test_tied_weights_are_stored_once(tmp_path: Path, pool: CpuPool) -> None:
    tied, untied = host(tmp_path, pool, "llama_tied"), host(tmp_path, pool, "llama")
    assert tied.module.lm_head.weight is tied.module.model.embed_tokens.weight  # type: ignore[union-attr]
    assert untied.facts.num_parameters - tied.facts.num_parameters == 64 * tiny_models.VOCABULARY
    names = [slot.weight.name for slot in tied.layout]
    assert "lm_head.weight" not in names
    tied.load(no_progress)
    tied.swap_in()
    assert torch.equal(
        tied.module.lm_head.weight,  # type: ignore[arg-type, union-attr]
        tiny_models.reference(tied.folder).model.embed_tokens.weight,
    )
    tied.close()


def test_out_of_pages_changes_nothing(tmp_path: Path, pool: CpuPool) -> None:
    model = host(tmp_path, pool, "llama")
    model.load(no_progress)
    others = pool.free.take(2)
    for _ in range(2):
        with pytest.raises(OutOfPages, match="2 pages wanted, 1 free of 3"):
            model.swap_in()
        assert (model.state, model.kv_pages, pool.free.num_free) == ("host", (), 1)
    pool.free.give(others)
    model.swap_in()
    assert (model.state, model.kv_pages, pool.free.num_free) == ("resident", (0,), 1)
    model.close()


def test_states_are_guarded(tmp_path: Path, pool: CpuPool) -> None:
    model = host(tmp_path, pool, "llama")
    with pytest.raises(ValueError, match="is cold: only a host image swaps in"):
        model.swap_in()
    with pytest.raises(ValueError, match="is cold, not resident"):
        model.swap_out()
    model.unload()
    seen: list[tuple[int, int]] = []
    assert model.load(no_progress) == model.load(lambda *at: seen.append(at))
    assert seen == [(model.layout.num_bytes,) * 2]
    model.swap_in()
    with pytest.raises(ValueError, match="is resident: only"):
        model.swap_in()
    with pytest.raises(ValueError, match="is resident: swap it out first"):
        model.unload()
    model.swap_out()
    model.unload()
    assert model.state == "cold"
    model.load(no_progress)
    model.swap_in()
    assert torch.isfinite(tiny_models.logits(model.module, tiny_models.prompt())).all()
    model.close()


def test_a_fresh_process_faults_on_a_swapped_out_model(tmp_path: Path) -> None:
    folder = tiny_models.write(tmp_path / "m", "llama")
    script = f"""
        from schemas.state import ModelSpec
        from services.gpu_agent.device_cpu import CpuPool
        from services.gpu_agent.hosted import HostedModel
        from tests.unit import tiny_models
        model = HostedModel.inspect(ModelSpec("m", {str(folder)!r}), CpuPool(2))
        model.load(lambda *_: None)
        model.swap_in(); tiny_models.logits(model.module, tiny_models.prompt()); model.swap_out()
        print("alive", flush=True)
        tiny_models.logits(model.module, tiny_models.prompt())
        print("survived", flush=True)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout == "alive\n", done.stderr
    assert done.returncode == -signal.SIGSEGV
