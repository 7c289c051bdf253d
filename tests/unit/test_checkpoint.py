"""Files that can not be trusted end in one error that names file and cause."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from schemas.state import ModelSpec
from services.gpu_agent import checkpoint
from services.gpu_agent.checkpoint import BadCheckpoint


def spec(source: object) -> ModelSpec:
    return ModelSpec("m", str(source))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(
        {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)},
        tmp_path / "model.safetensors",
    )
    return tmp_path


def header_of(file: Path) -> dict[str, dict[str, object]]:
    data = file.read_bytes()
    header: dict[str, dict[str, object]] = json.loads(
        data[8 : 8 + int.from_bytes(data[:8], "little")]
    )
    return header


def rewrite(file: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def test_headers_say_where_every_tensor_lies(folder: Path) -> None:
    found = checkpoint.read(folder)
    tensor = found.tensors["a"]
    assert (tensor.shape, tensor.dtype, tensor.num_bytes) == ((2, 3), torch.float32, 24)
    data = (folder / "model.safetensors").read_bytes()[tensor.start : tensor.start + 24]
    assert torch.frombuffer(bytearray(data), dtype=torch.float32).tolist() == [0, 1, 2, 3, 4, 5]
    found.check_unchanged()


def test_a_changed_file_is_noticed(folder: Path) -> None:
    found = checkpoint.read(folder)
    rewrite(folder / "model.safetensors", lambda header: header)
    with pytest.raises(BadCheckpoint, match=r"model\.safetensors was changed after"):
        found.check_unchanged()
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match="can not be read"):
        found.check_unchanged()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda f: f.write_bytes(b""), "no safetensors file, or cut short"),
    "cut": (lambda f: f.write_bytes(f.read_bytes()[:-5]), "is cut short"),
    "cut in the header": (lambda f: f.write_bytes(f.read_bytes()[:40]), "cut short"),
    "longer": (lambda f: f.write_bytes(f.read_bytes() + b"x"), "longer than its header says"),
    "html": (lambda f: f.write_text("<!DOCTYPE html><html>404</html>"), "no safetensors file"),
    "garbage": (
        lambda f: f.write_bytes(f.read_bytes()[:8] + b"\xff" * (len(f.read_bytes()) - 8)),
        "corrupt safetensors header",
    ),
    "a list": (lambda f: f.write_bytes((2).to_bytes(8, "little") + b"[]"), "not an object"),
    "deep": (
        lambda f: f.write_bytes((90000).to_bytes(8, "little") + b"[" * 90000),
        "corrupt safetensors header",
    ),
    "no offsets": (lambda f: rewrite(f, lambda h: h["a"].pop("data_offsets")), "'a' is corrupt"),
    "entry no object": (lambda f: rewrite(f, lambda h: h.update(a={})), "'a' is corrupt"),
    "dtype": (lambda f: rewrite(f, lambda h: h["a"].update(dtype="F4")), "dtype F4"),
    "shape": (lambda f: rewrite(f, lambda h: h["a"].update(shape=[3, 3])), r"shape \(3, 3\)"),
    "negative": (lambda f: rewrite(f, lambda h: h["a"].update(shape=[-2, -3])), "shape"),
    "overlap": (
        lambda f: rewrite(
            f, lambda h: h["b"].update(data_offsets=h["a"]["data_offsets"], shape=[12])
        ),
        "overlaps another or leaves a gap",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_named_with_their_cause(folder: Path, damage: str) -> None:
    act, cause = DAMAGES[damage]
    file = folder / "model.safetensors"
    act(file)
    with pytest.raises(BadCheckpoint, match=cause) as caught:
        checkpoint.read(folder)
    assert str(file) in str(caught.value)


def sharded(folder: Path, weight_map: dict[str, str]) -> Path:
    (folder / "model.safetensors").unlink(missing_ok=True)
    for number in (1, 2):
        save_file({f"t{number}": torch.ones(3)}, folder / f"shard-{number}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_shards_are_read_through_their_index(folder: Path) -> None:
    shards = {"t1": "shard-1.safetensors", "t2": "shard-2.safetensors"}
    assert sorted(checkpoint.read(sharded(folder, shards)).tensors) == ["t1", "t2"]


@pytest.mark.parametrize(
    ("weight_map", "cause"),
    [
        ({"t1": "shard-1.safetensors", "t3": "shard-3.safetensors"}, "names shard-3.safetensors"),
        ({"t1": "../elsewhere.safetensors"}, "no safetensors file beside it"),
        ({"t1": "shard-1.bin"}, "no safetensors file beside it"),
        ({"t2": "shard-1.safetensors"}, "says that shard-1.safetensors holds 't2'"),
    ],
)
def test_a_wrong_index_is_named(folder: Path, weight_map: dict[str, str], cause: str) -> None:
    with pytest.raises(BadCheckpoint, match=cause) as caught:
        checkpoint.read(sharded(folder, weight_map))
    assert "model.safetensors.index.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": 3}', '{"weight_map": null}'])
def test_a_corrupt_index(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(BadCheckpoint, match=r"index\.json is corrupt"):
        checkpoint.read(folder)


def test_only_safetensors(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=r"holds no model\.safetensors"):
        checkpoint.read(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(BadCheckpoint, match="only safetensors are loaded"):
        checkpoint.read(tmp_path)
    for name in ("x.safetensors", "y.safetensors"):
        save_file({"a": torch.ones(1)}, tmp_path / name)
    with pytest.raises(BadCheckpoint, match="2 safetensors files and no"):
        checkpoint.read(tmp_path)


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    assert checkpoint.find(spec(tmp_path)) == tmp_path
    with pytest.raises(BadCheckpoint, match="there is no such folder"):
        checkpoint.find(spec(tmp_path / "nowhere"))
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(BadCheckpoint, match="is a file: give the folder"):
        checkpoint.find(spec(file))


def test_a_hub_download_fetches_the_small_files_first_then_only_the_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def snapshot(repo: str, *, allow_patterns: list[str]) -> str:
        assert repo == "some/model"
        asked.append(allow_patterns)
        return str(tmp_path)

    sharded(tmp_path, {"t1": "shard-1.safetensors", "t2": "shard-2.safetensors"})
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert checkpoint.find(spec("some/model")) == tmp_path
    assert asked[1] == ["shard-1.safetensors", "shard-2.safetensors"]
    assert "*.json" in asked[0]
    assert not any(pattern.endswith((".py", ".bin", "safetensors")) for pattern in asked[0])


def test_hub_failures_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    failures: list[tuple[Exception, str]] = [
        (LocalEntryNotFoundError("offline"), "check the network, or give a local folder"),
        (HFValidationError("bad name"), "Check the name; a gated model needs"),
        (OSError("disk full"), "can not be downloaded.*disk full"),
    ]
    for failure, remedy in failures:

        def fail(*_: object, _failure: Exception = failure, **__: object) -> str:
            raise _failure

        monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
        with pytest.raises(BadCheckpoint, match=remedy):
            checkpoint.find(spec("some/model"))
