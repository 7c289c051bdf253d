"""A model in an object store: from a real HTTP server, through the native reader, to the image."""

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from schemas.state import ModelSpec
from services import settings
from services.gpu_agent import checkpoint, loader, object_stream, reading
from services.gpu_agent.device_cpu import CpuPool
from services.gpu_agent.engine.library import EngineOptions, Library
from services.gpu_agent.hosted import BadCheckpoint, HostedModel
from services.gpu_agent.ipc import Loaded, OpFailed, Registered
from tests.integration import s3_server
from tests.unit import tiny_models

URI = "s3://models/some/llama"


@pytest.fixture(scope="module")
def pool() -> Iterator[CpuPool]:
    pool = CpuPool(4)
    yield pool
    pool.close()


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """The server's root, with a model at URI; the server runs."""
    root = tmp_path / "store"
    tiny_models.write(root / "models" / "some" / "llama", "llama", max_shard_size="100KB")
    with s3_server.running(root) as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_REGION", "eu-central-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        yield root


@pytest.fixture
def folder(root: Path) -> Path:
    return root / "models" / "some" / "llama"


def inspected(pool: CpuPool, **options: Any) -> HostedModel:
    return HostedModel.inspect(ModelSpec("m", URI, **options), pool)


def no_progress(_done: int, _total: int) -> None:
    pass


def assert_same_logits(model: HostedModel, reference: object) -> None:
    ids = tiny_models.prompt()
    model.swap_in()
    assert torch.equal(tiny_models.logits(model.module, ids), tiny_models.logits(reference, ids))
    model.close()


def test_it_is_the_same_model_as_from_local_files(
    folder: Path, pool: CpuPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(loader, "_BATCH_BYTES", 50_000)
    monkeypatch.setattr(object_stream, "_PROGRESS_S", 0.001)
    model = inspected(pool)
    cached = list(model.folder.iterdir())
    assert sum(file.stat().st_size for file in cached if file.suffix == ".safetensors") < 10_000
    seen: list[tuple[int, int]] = []
    assert model.load(lambda *now: seen.append(now)) == model.layout.num_bytes
    total = sum(slot.weight.num_bytes for slot in model.layout)
    assert (seen[0], seen[-1]) == ((0, total), (total, total))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len({done for done, _ in seen}) > 3
    local = HostedModel.inspect(ModelSpec("m", str(folder)), pool)
    local.load(no_progress)
    assert local._image is not None
    assert model._image is not None
    assert torch.equal(model._image.tensor, local._image.tensor)
    assert model._image.checksums == local._image.checksums
    local.close()
    assert_same_logits(model, tiny_models.reference(folder))


def test_another_dtype_is_converted_on_the_way(folder: Path, pool: CpuPool) -> None:
    model = inspected(pool, dtype="bfloat16")
    model.load(no_progress)
    expected = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    assert_same_logits(model, expected.eval())


def test_a_tensor_that_is_tied_may_be_stored_twice(folder: Path, pool: CpuPool) -> None:
    tiny_models.edit_config(folder, tie_word_embeddings=True)
    model = inspected(pool)
    with pytest.raises(BadCheckpoint, match=f'{URI}/model.*"tie_word_embeddings": false'):
        model.load(no_progress)
    model.close()


def test_a_checkpoint_that_must_be_converted_is_refused(root: Path, pool: CpuPool) -> None:
    config = MixtralConfig(**tiny_models.LLAMA_LIKE, num_local_experts=3)
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "models" / "mixtral")
    with pytest.raises(BadCheckpoint, match="s3://models/mixtral names or packs its tensors"):
        HostedModel.inspect(ModelSpec("m", "s3://models/mixtral"), pool)


def test_the_cache_is_kept_by_version_and_shared(folder: Path) -> None:
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(checkpoint.find(ModelSpec("m", URI + "/"))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert list(found[0].parent.iterdir()) == [found[0]]
    before = checkpoint.read(found[0])
    before.check_unchanged()
    tiny_models.edit_config(folder, bos_token_id=7)
    with pytest.raises(BadCheckpoint, match=rf"{URI}/config\.json was changed"):
        before.check_unchanged()
    after = checkpoint.find(ModelSpec("m", URI))
    assert after != found[0]
    assert (after / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_what_is_not_there_is_named(folder: Path, pool: CpuPool) -> None:
    sources = {
        "s3://elsewhere/some/llama": r"s3://elsewhere/some/llama can not be read.*NoSuchBucket",
        "s3://models/some/other": "s3://models/some/other holds no model",
        "s3://": "of object stores only S3",
        "gs://models/some": "of object stores only S3",
    }
    for source, cause in sources.items():
        with pytest.raises(BadCheckpoint, match=cause):
            checkpoint.find(ModelSpec("m", source))
    shard = sorted(folder.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-5])
    with pytest.raises(BadCheckpoint, match=f"{URI}/{shard.name} is cut short"):
        inspected(pool)
    shard.write_bytes(whole[:5])
    with pytest.raises(BadCheckpoint, match=f"{URI}/{shard.name} is no safetensors file"):
        inspected(pool)
    shard.unlink()
    with pytest.raises(BadCheckpoint, match=rf"{URI}/model\.safetensors\.index\.json names"):
        inspected(pool)


def test_settings_take_it_as_it_is(tmp_path: Path) -> None:
    def source(text: str) -> str:
        raw = {"models": {"m": {"source": text}}}
        return settings.parse(raw, origin="here", folder=tmp_path).models["m"].source

    assert source(URI) == URI
    with pytest.raises(settings.SettingsError, match=r"'gs://models'.*only s3:// is read"):
        source("gs://models")


def test_credentials_are_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(BadCheckpoint, match="credentials"):
        checkpoint.find(ModelSpec("m", URI))


def test_objects_that_change_while_they_are_read(
    folder: Path, pool: CpuPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = inspected(pool)
    shard = sorted(folder.glob("*.safetensors"))[0]
    whole, stamp = shard.read_bytes(), shard.stat()
    shard.write_bytes(whole[:-1000])
    with pytest.raises(BadCheckpoint, match=f"{URI}/{shard.name} was changed after"):
        model.load(no_progress)
    monkeypatch.setattr(type(model._plan.checkpoint), "check_unchanged", lambda _self: None)
    with pytest.raises(BadCheckpoint, match=f"{URI}/{shard.name} can not be read at byte.*trunc"):
        model.load(no_progress)
    shard.unlink()
    with pytest.raises(BadCheckpoint, match=f"{URI}/{shard.name} can not .*no such object any"):
        model.load(no_progress)
    assert (model.state, pool.free.num_free) == ("cold", pool.num_pages)
    monkeypatch.undo()
    shard.write_bytes(whole)
    os.utime(shard, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    model.load(no_progress)
    assert_same_logits(model, tiny_models.reference(folder))


def test_a_server_that_dies_fails_one_load_and_nothing_else(
    root: Path, folder: Path, pool: CpuPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Library(pool, EngineOptions())
    monkeypatch.setattr(library, "_text_of", lambda _hosted: None)
    spec = ModelSpec("m", URI)

    def register() -> Registered | OpFailed:
        assert library.needs_files(spec)
        found = library.find_files(spec)
        return found if isinstance(found, OpFailed) else library.register(spec, found)

    def load() -> Loaded | OpFailed:
        job = library.load("m")
        assert not isinstance(job, OpFailed)
        return library.end_load(job.run(no_progress))

    assert isinstance(register(), Registered)
    hosted = library.registered("m")
    (root / s3_server.DEADLY).write_text("200000")
    failed = load()
    assert isinstance(failed, OpFailed)
    assert f"{URI}/model-0" in failed.reason
    assert hosted.state == "cold"
    again = register()
    assert isinstance(again, OpFailed)
    assert f"{URI} can not be read" in again.reason
    (root / s3_server.DEADLY).unlink()
    with s3_server.running(root) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        assert isinstance(register(), Registered)
        assert isinstance(load(), Loaded)
        assert not library.needs_files(spec)
        assert_same_logits(library.registered("m"), tiny_models.reference(folder))


@pytest.mark.parametrize("package", ["botocore", "runai_model_streamer"])
def test_without_the_packages_it_says_what_to_install(
    folder: Path, pool: CpuPool, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BadCheckpoint, match=rf"{package}.*: pip install 'hotswap\[object-store\]'"):
        inspected(pool).load(no_progress)
