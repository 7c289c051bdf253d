"""What is deployed: hotswap.toml and HS_DEPLOYMENTS merged, names, and settings over HTTP."""

from typing import Any

import msgspec
import pytest

from schemas.state import DesiredDeployment, ModelSpec
from services.api.deployment_settings import parse, patched, settings_of
from services.api.errors import ApiError
from services.scheduler.deployments import FILE, merge
from services.settings import ModelSettings, check_names

NOW = 1000.0
A = ModelSpec("a", "/models/a")
CHANGED = msgspec.structs.replace(A, priority=3)


def stored(
    spec: ModelSpec, declared: ModelSpec | None = None, removed: bool = False
) -> dict[str, DesiredDeployment]:
    return {spec.name: DesiredDeployment(spec, declared, removed, 7, 8.0, "somebody")}


def from_file(spec: ModelSpec, created_at: int = 1000) -> DesiredDeployment:
    return DesiredDeployment(spec, spec, False, created_at, NOW, FILE)


# -- the file and what is stored -------------------------------------------------------------


def test_the_file_seeds_what_is_not_there() -> None:
    assert merge([A], {}, NOW) == {"a": from_file(A)}


def test_what_was_changed_through_the_api_outlives_a_restart() -> None:
    assert merge([A], stored(CHANGED, declared=A), NOW) == {}
    assert merge([A], stored(A, declared=A, removed=True), NOW) == {}


def test_a_changed_file_wins() -> None:
    other = msgspec.structs.replace(A, source="/models/other")
    assert merge([other], stored(CHANGED, declared=A), NOW) == {"a": from_file(other, 7)}
    assert merge([other], stored(A, declared=A, removed=True), NOW) == {"a": from_file(other)}


def test_a_table_that_is_taken_out_of_the_file_is_a_removal() -> None:
    assert merge([], stored(CHANGED, declared=A), NOW) == {"a": None}
    assert merge([], stored(A, declared=A, removed=True), NOW) == {"a": None}


def test_what_the_api_made_is_none_of_the_files_business() -> None:
    assert merge([], stored(A), NOW) == {}


def test_a_file_that_names_what_the_api_made_takes_it_over() -> None:
    assert merge([CHANGED], stored(A), NOW) == {"a": from_file(CHANGED, 7)}


def test_what_was_merged_once_is_merged() -> None:
    merged = {name: one for name, one in merge([A], stored(CHANGED), NOW).items() if one}
    assert merge([A], merged, NOW + 1) == {}


# -- names -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("aliases", "other", "words"),
    [
        (("b",), (), "'b' is a name of model 'b' already"),
        (("x",), ("x",), "'x' is a name of model 'a' already"),
        (("a",), (), "'a' is a name of model 'a' already"),
    ],
)
def test_a_name_or_alias_means_one_model(
    aliases: tuple[str, ...], other: tuple[str, ...], words: str
) -> None:
    models = {"a": ModelSettings("/a", aliases=aliases), "b": ModelSettings("/b", aliases=other)}
    with pytest.raises(ValueError, match=words):
        check_names(models)


def test_aliases_of_their_own_are_fine() -> None:
    check_names(
        {"a": ModelSettings("/a", aliases=("x",)), "b": ModelSettings("/b", aliases=("y",))}
    )


# -- settings over HTTP ----------------------------------------------------------------------


def test_settings_are_those_of_the_file() -> None:
    raw: dict[str, Any] = {"source": "org/model", "gpus": ["g0"], "overrides": {"seed": None}}
    spec = parse("team/a", raw)
    assert spec == ModelSpec("team/a", "org/model", gpus=("g0",), overrides={"seed": None})
    assert parse("team/a", settings_of(spec)) == spec


def test_a_patch_replaces_what_it_names_and_null_is_the_default() -> None:
    spec = ModelSpec("a", "/a", priority=3, max_batch=2, defaults={"seed": 1})
    changes = {"priority": None, "max_batch": 4, "defaults": {"top_k": 2}}
    assert parse("a", patched(spec, changes)) == ModelSpec(
        "a", "/a", max_batch=4, defaults={"top_k": 2}
    )


@pytest.mark.parametrize(
    ("raw", "param", "words"),
    [
        ({"source": "/a", "max_bacth": 4}, "max_bacth", "did you mean 'max_batch'?"),
        ({"source": "/a", "max_batch": "4"}, "max_batch", "max_batch = '4'"),
        ({"source": "/a", "max_batch": 0}, "max_batch", "must be greater than 0"),
        ({"source": "/a", "priority": 101}, "priority", "from -100 to 100"),
        ({"max_batch": 4}, "source", "source is required"),
        ({"source": "./a"}, "source", "absolute path"),
        ({"source": "/a", "aliases": ["x", "x"]}, "aliases", "named twice"),
        ({"source": "/a", "defaults": {"top_p": 0}}, "defaults.top_p", "leaves no token"),
        ({"source": "/a", "defaults": {"seed": 1}, "overrides": {"seed": 2}}, None, "one of them"),
    ],
)
def test_a_refusal_names_key_and_value(raw: Any, param: str | None, words: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse("a", raw)
    assert (caught.value.status, caught.value.info.param) == (400, param)
    assert words in caught.value.info.message


@pytest.mark.parametrize("name", ["", " ", "/a", "a/", "x" * 201])
def test_a_name_that_can_not_be(name: str) -> None:
    with pytest.raises(ApiError, match="1 to 200 characters"):
        parse(name, {"source": "/a"})


def test_agents_are_told_what_they_need_and_no_more() -> None:
    spec = ModelSpec("a", "/a", max_batch=4, preemption="drain", aliases=("x",), pinned=True)
    assert spec.for_agents() == ModelSpec("a", "/a", max_batch=4)
    assert spec.fingerprint() == ModelSpec("a", "/a", max_batch=4).fingerprint()
    assert spec.fingerprint() != ModelSpec("a", "/a", max_batch=5).fingerprint()
