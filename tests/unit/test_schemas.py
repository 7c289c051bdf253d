"""Names on the bus, and the AsyncAPI document that describes it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas import asyncapi, names
from schemas.state import ModelSpec

DOCUMENT = Path(__file__).parents[2] / "docs" / "asyncapi.json"
TOKEN = re.compile(r"[A-Za-z0-9_=-]+")
any_name = st.text(min_size=1)


@given(any_name)
def test_unescape_undoes_escape(name: str) -> None:
    token = names.escape(name)
    assert TOKEN.fullmatch(token)
    assert names.unescape(token) == name


@given(any_name, any_name)
def test_two_names_never_share_a_token(one: str, other: str) -> None:
    assert (names.escape(one) == names.escape(other)) == (one == other)


def test_an_escaped_name_reads_well() -> None:
    assert names.escape("Qwen/Qwen2.5-7B") == "Qwen=2FQwen2=2E5-7B"
    assert names.unescape("Qwen=2FQwen2=2E5-7B") == "Qwen/Qwen2.5-7B"


@pytest.mark.parametrize("token", ["a.b", "a b", "*", ">", "é", "=", "=2", "=2f", "=GG", "x=4"])
def test_unescape_names_what_is_wrong(token: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(token))):
        names.unescape(token)


def test_unescape_rejects_bytes_that_are_no_text() -> None:
    with pytest.raises(ValueError, match="utf-8"):
        names.unescape("=FF")


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        names.escape("")


@given(any_name)
def test_subjects_give_the_model_back(model: str) -> None:
    assert names.model_of_subject(names.request_subject("batch", model)) == model
    assert names.model_of_subject(names.demand_subject("batch", model)) == model


def test_subject_positions_do_not_move() -> None:
    assert names.event_subject("leader_elected") == "hs.v1.events.leader_elected.-.-"
    assert names.event_subject("swap_in_completed", "gpu0", "a.b").count(".") == 5
    assert names.replica_key("gpu0", "a.b") == "gpu0.a=2Eb"
    assert TOKEN.fullmatch(names.consumer_name("Qwen/Qwen2.5-7B"))


def test_a_model_without_scheduling_settings_is_as_older_services_write_it() -> None:
    old = b'{"name":"m","source":"/m"}'
    spec = msgspec.json.decode(old, type=ModelSpec)
    assert spec == ModelSpec("m", "/m")
    assert (spec.pinned, spec.gpus, spec.priority, spec.exclusive_group) == (False, (), 0, "")
    assert (spec.ttft_target_s, spec.token_target_s, spec.ttl_s) == (None, None, 0.0)
    assert msgspec.json.encode(ModelSpec("m", "/m")) == old


# -- AsyncAPI ----------------------------------------------------------------------------


def _refs(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        for child in node.values():
            yield from _refs(child)
    elif isinstance(node, list):
        for child in node:
            yield from _refs(child)


def _resolve(document: Any, ref: str) -> Any:
    assert ref.startswith("#/")
    for part in ref[2:].split("/"):
        document = document[part]
    return document


@pytest.fixture(scope="module")
def document() -> asyncapi.Json:
    return asyncapi.build()


def test_the_document_is_up_to_date() -> None:
    assert asyncapi.main(["--check", str(DOCUMENT)]) == 0


def test_check_tells_what_to_do_about_a_stale_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "asyncapi.json"
    assert asyncapi.main(["--check", str(file)]) == 1
    assert "does not exist" in capsys.readouterr().err
    file.write_text("{}")
    assert asyncapi.main(["--check", str(file)]) == 1
    assert f"python -m schemas.asyncapi {file}" in capsys.readouterr().err
    assert file.read_text() == "{}"
    assert asyncapi.main([str(file)]) == 0
    assert asyncapi.main(["--check", str(file)]) == 0


def test_every_reference_resolves(document: asyncapi.Json) -> None:
    refs = set(_refs(document))
    assert refs
    for ref in refs:
        _resolve(document, ref)


def test_required_fields_and_key_forms_of_asyncapi_3(document: asyncapi.Json) -> None:
    assert document["asyncapi"] == "3.0.0"
    assert {"title", "version"} <= document["info"].keys()
    key = re.compile(r"[a-zA-Z0-9._-]+")
    for keyed in (document["channels"], document["operations"], *document["components"].values()):
        assert all(key.fullmatch(name) for name in keyed)
    for operation in document["operations"].values():
        assert operation["action"] in {"send", "receive"}
    for schema in document["components"]["schemas"].values():
        assert "discriminator" not in schema or isinstance(schema["discriminator"], str)


def test_address_parameters_are_the_declared_ones(document: asyncapi.Json) -> None:
    for name, channel in document["channels"].items():
        used = re.findall(r"\{(\w+)\}", channel["address"] or "")
        assert used == sorted(used, key=used.index), name
        assert set(used) == channel.get("parameters", {}).keys(), name
    assert document["channels"]["requests"]["address"] == "hs.v1.requests.{class}.{model}"
    assert document["channels"]["events"]["address"] == "hs.v1.events.{kind}.{gpu}.{model}"


def test_operations_use_messages_of_their_channel_and_use_them_all(
    document: asyncapi.Json,
) -> None:
    used = set()
    for operation in document["operations"].values():
        channel = operation["channel"]["$ref"]
        for message in operation["messages"]:
            assert message["$ref"].startswith(f"{channel}/messages/")
            used.add(_resolve(document, message["$ref"])["$ref"])
    assert used == {f"#/components/messages/{name}" for name in document["components"]["messages"]}


def test_every_message_is_sent_and_received_by_someone_who_may(document: asyncapi.Json) -> None:
    senders: dict[str, set[str]] = {}
    for operation in document["operations"].values():
        if operation["action"] == "send":
            for message in operation["messages"]:
                senders.setdefault(message["$ref"].rsplit("/", 1)[1], set()).update(
                    tag["name"] for tag in operation["tags"]
                )
    shared = {name for name, services in senders.items() if len(services) > 1}
    # One writer per message, and per lease key. Keys are changed by who names their revision.
    assert shared == {"LeaseRecord", "KeyRecord"}
    # The request stream itself publishes the demand.
    assert set(document["components"]["messages"]) - senders.keys() == {asyncapi.DEMAND}
