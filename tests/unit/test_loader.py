"""Files to host image: converted, sharded, tied, renamed, and broken on the way."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig

from schemas.state import ModelSpec
from services.gpu_agent import reading
from services.gpu_agent.device_cpu import CpuPool
from services.gpu_agent.hosted import BadCheckpoint, HostedModel
from tests.unit import tiny_models


@pytest.fixture(scope="module")
def pool() -> Iterator[CpuPool]:
    pool = CpuPool(4)
    yield pool
    pool.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_models.write(tmp_path / "m", "llama")


def no_progress(_done: int, _total: int) -> None:
    pass


def inspected(folder: Path, pool: CpuPool, **settings: object) -> HostedModel:
    return HostedModel.inspect(ModelSpec("m", str(folder), **settings), pool)  # type: ignore[arg-type]


def assert_same_logits(model: HostedModel, reference: object) -> None:
    ids = tiny_models.prompt()
    model.swap_in()
    assert torch.equal(tiny_models.logits(model.module, ids), tiny_models.logits(reference, ids))
    model.close()


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors; ``__`` in a name stands for a dot."""
    file = folder / "model.safetensors"
    held = dict(load_file(file))
    for name, tensor in tensors.items():
        if tensor is None:
            del held[name.replace("__", ".")]
        else:
            held[name.replace("__", ".")] = tensor
    save_file(held, file, {"format": "pt"})


def test_small_pieces_shards_and_progress(
    tmp_path: Path, pool: CpuPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "CHUNK_BYTES", 1000)
    folder = tiny_models.write(tmp_path / "s", "llama", max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    model = inspected(folder, pool)
    seen: list[tuple[int, int]] = []
    threads: set[int] = set()

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        threads.add(threading.get_ident())

    assert model.load(progress) == model.layout.num_bytes
    total = sum(slot.weight.num_bytes for slot in model.layout)
    assert (seen[0], seen[-1]) == ((0, total), (total, total))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert threads == {threading.get_ident()}
    assert_same_logits(model, tiny_models.reference(folder))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype_is_converted(
    folder: Path, pool: CpuPool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "CHUNK_BYTES", 1000)
    model = inspected(folder, pool, dtype=dtype)
    assert model.facts.dtype == dtype
    model.load(no_progress)
    expected = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    assert_same_logits(model, expected.eval())


def test_loading_in_a_thread_leaves_torch_alone(folder: Path, pool: CpuPool) -> None:
    model = inspected(folder, pool, dtype="bfloat16")
    seen: list[torch.dtype] = []
    thread = threading.Thread(
        target=model.load, args=(lambda *_: seen.append(torch.get_default_dtype()),)
    )
    thread.start()
    thread.join()
    assert set(seen) == {torch.float32}
    assert model.state == "host"
    model.close()


def test_a_tied_head_may_be_stored_under_either_name_or_twice(
    tmp_path: Path, pool: CpuPool
) -> None:
    folder = tiny_models.write(tmp_path / "t", "llama_tied")
    expected = tiny_models.reference(folder)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change(folder, lm_head__weight=embedding.clone())
    model = inspected(folder, pool)
    model.load(no_progress)
    assert_same_logits(model, expected)
    change(folder, model__embed_tokens__weight=None)
    model = inspected(folder, pool)
    model.load(no_progress)
    assert_same_logits(model, expected)


def test_a_tied_head_that_differs_is_refused(tmp_path: Path, pool: CpuPool) -> None:
    folder = tiny_models.write(tmp_path / "t", "llama_tied")
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change(folder, lm_head__weight=embedding + 1)
    model = inspected(folder, pool)
    with pytest.raises(BadCheckpoint, match=r'"tie_word_embeddings": false'):
        model.load(no_progress)
    assert model.state == "cold"


def test_missing_and_misshapen_tensors_are_found_before_anything_is_read(
    folder: Path, pool: CpuPool
) -> None:
    change(folder, model__layers__1__mlp__up_proj__weight=torch.ones(3, 3))
    with pytest.raises(BadCheckpoint, match=r"model\.safetensors: tensor .*up_proj.* \(3, 3\)"):
        inspected(folder, pool)
    change(folder, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(BadCheckpoint, match=r"lacks 1 of \d+ tensors, the first is .*up_proj"):
        inspected(folder, pool)
    change(folder, unrelated=torch.ones(2))
    with pytest.raises(BadCheckpoint, match="lacks 1 of"):
        inspected(folder, pool)


def test_a_config_that_is_missing_broken_or_unknown(folder: Path, pool: CpuPool) -> None:
    cases = {
        "{": "config.json can not be used",
        "[]": "config.json can not be used",
        '{"model_type": "nothing_like_it"}': "config.json can not be used",
        '{"model_type": "clip"}': "can not be built as a causal language model",
        '{"model_type": "llama", "hidden_size": "many"}': "config.json can not be used",
    }
    for text, cause in cases.items():
        (folder / "config.json").write_text(text)
        with pytest.raises(BadCheckpoint, match=cause):
            inspected(folder, pool)
    (folder / "config.json").unlink()
    with pytest.raises(BadCheckpoint, match=r"holds no config\.json"):
        inspected(folder, pool)


def test_quantized_checkpoints_are_refused(folder: Path, pool: CpuPool) -> None:
    tiny_models.edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(BadCheckpoint, match="quantized"):
        inspected(folder, pool)


def test_code_beside_a_checkpoint_does_not_run_unless_allowed(folder: Path, pool: CpuPool) -> None:
    mark = folder / "it-ran"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass C: pass\n")
    tiny_models.edit_config(
        folder,
        model_type="not_in_transformers",
        auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"},
    )
    with pytest.raises(BadCheckpoint, match="trust_remote_code"):
        inspected(folder, pool)
    assert not mark.exists()


def test_a_file_changed_or_cut_after_registration(
    folder: Path, pool: CpuPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    model = inspected(folder, pool)
    stamp = file.stat()
    file.write_bytes(whole[:-1000])
    with pytest.raises(BadCheckpoint, match="was changed after the model was registered"):
        model.load(no_progress)
    # Cut while it is read: the stamp still fits at the start.
    monkeypatch.setattr(type(model._plan.checkpoint), "check_unchanged", lambda _self: None)
    with pytest.raises(BadCheckpoint, match=r"model\.safetensors was cut short while"):
        model.load(no_progress)
    assert (model.state, pool.free.num_free) == ("cold", pool.num_pages)
    monkeypatch.undo()
    file.write_bytes(whole)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    model.load(no_progress)
    assert_same_logits(model, tiny_models.reference(folder))


def test_nothing_stays_open_or_allocated_after_failures(folder: Path, pool: CpuPool) -> None:
    model = inspected(folder, pool)
    file = folder / "model.safetensors"
    file.rename(folder / "away")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        with pytest.raises(BadCheckpoint, match="can not be read"):
            model.load(no_progress)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert model.state == "cold"
    model.close()


def test_experts_stored_one_by_one_are_converted_outside(tmp_path: Path, pool: CpuPool) -> None:
    config = MixtralConfig(**tiny_models.LLAMA_LIKE, num_local_experts=3)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert any("experts.2." in name for name in names)
    model = inspected(tmp_path, pool)
    assert model.load(no_progress) == model.layout.num_bytes
    assert_same_logits(model, tiny_models.reference(tmp_path))
    removed = next(name for name in names if "experts.2." in name)
    change(tmp_path, **{removed.replace(".", "__"): None})
    model = inspected(tmp_path, pool)
    with pytest.raises(BadCheckpoint, match="could not be converted"):
        model.load(no_progress)
    assert model.state == "cold"
