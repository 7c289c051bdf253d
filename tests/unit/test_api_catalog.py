"""What the api says about models, from the records of the scheduler and the agents."""

import asyncio
from typing import Any, cast

import pytest

from schemas import names
from schemas.state import (
    DeploymentRecord,
    LeaseRecord,
    ModelSpec,
    ReplicaState,
    ResidencyRecord,
)
from services.api.catalog import Catalog
from services.api.errors import ApiError
from services.bus import Bus

LEASE = LeaseRecord(holder="x")


class Gone(list[tuple[str, str]]):
    """The deployments reported as unavailable."""

    def __call__(self, model: str, reason: str) -> None:
        self.append((model, reason))


@pytest.fixture
def gone() -> Gone:
    return Gone()


@pytest.fixture
def catalog(gone: Gone) -> Catalog:
    return Catalog(cast(Bus, None), gone)  # never started: the tests put records in


def deploy(catalog: Catalog, model: str, *, failed: str = "") -> None:
    spec = ModelSpec(name=model, source="/m", max_model_len=99)
    record = DeploymentRecord(spec=spec, status="failed" if failed else "ready", reason=failed)
    catalog._deployments.values[names.escape(model)] = record
    catalog._on_deployment(names.escape(model), record)


def place(catalog: Catalog, gpu: str, model: str, state: ReplicaState) -> None:
    record = ResidencyRecord(gpu, model, state, generation=1, changed_at=0.0)
    catalog._residency.values[names.replica_key(gpu, model)] = record


def live(catalog: Catalog, gpu: str) -> None:
    catalog._leases.values[names.agent_lease_key(gpu)] = LEASE


def test_the_nearest_replica_counts(catalog: Catalog) -> None:
    deploy(catalog, "a/b")
    assert catalog.model("a/b").hotswap.state == "cold"
    for gpu, state in (("g0", "host"), ("g1", "resident"), ("g2", "failed")):
        place(catalog, gpu, "a/b", cast(ReplicaState, state))
        live(catalog, gpu)
    info = catalog.model("a/b").hotswap
    assert info.state == "resident"
    assert info.gpus == {"g0": "host", "g1": "resident", "g2": "failed"}
    assert (info.weight_bytes, info.max_model_len) == (None, 99)


def test_what_a_dead_agent_wrote_does_not_count(catalog: Catalog) -> None:
    deploy(catalog, "m")
    place(catalog, "g0", "m", "resident")
    assert catalog.model("m").hotswap.state == "cold"


def test_require(catalog: Catalog, gone: Gone) -> None:
    deploy(catalog, "good")
    deploy(catalog, "bad", failed="too large")
    catalog.require("good")
    with pytest.raises(ApiError, match="too large") as caught:
        catalog.require("bad")
    assert caught.value.status == 503
    for unknown in ("", "x" * 10_000):
        with pytest.raises(ApiError, match="Models here: bad, good") as caught:
            catalog.require(unknown)
        assert caught.value.status == 404
        assert len(str(caught.value)) < 400
    assert gone == [("bad", "too large")]


def test_a_removed_deployment_is_reported(catalog: Catalog, gone: Gone) -> None:
    catalog._on_deployment(names.escape("a/b"), None)
    assert gone == [("a/b", "its deployment was removed")]


def test_missing(catalog: Catalog) -> None:
    assert catalog.missing() == ["no scheduler leads", "no GPU agent is alive"]
    catalog._leases.values[names.LEADER_KEY] = LEASE
    live(catalog, "g0")
    assert catalog.missing() == []


def alias(catalog: Catalog, model: str, *aliases: str, **more: Any) -> None:
    spec = ModelSpec(name=model, source="/m", aliases=aliases, **more)
    record = DeploymentRecord(spec=spec, status="ready")
    catalog._deployments.values[names.escape(model)] = record
    catalog._on_deployment(names.escape(model), record)


def test_an_alias_is_the_deployment_by_another_name(catalog: Catalog) -> None:
    alias(catalog, "a/b", "gpt-4o", "x")
    assert catalog.require("gpt-4o") == catalog.require("a/b") == "a/b"
    assert [model.id for model in catalog.models()] == ["a/b", "gpt-4o", "x"]
    assert catalog.model("x").hotswap.alias_of == "a/b"
    assert catalog.record("a/b").spec.aliases == ("gpt-4o", "x")
    with pytest.raises(ApiError, match="no deployment 'x'"):
        catalog.record("x")


def test_an_alias_that_was_taken_back_means_nothing(catalog: Catalog) -> None:
    alias(catalog, "a", "x", "y")
    alias(catalog, "a", "y")
    alias(catalog, "b", "x")
    assert (catalog.require("x"), catalog.require("y")) == ("b", "a")
    del catalog._deployments.values["b"]
    catalog._on_deployment("b", None)
    with pytest.raises(ApiError, match="'x' does not exist"):
        catalog.require("x")


def test_a_drained_deployment_takes_no_requests(catalog: Catalog) -> None:
    alias(catalog, "a", drained=True)
    with pytest.raises(ApiError, match="an operator has drained it") as caught:
        catalog.require("a")
    assert caught.value.status == 503


def test_a_body_is_prepared_by_the_settings_of_its_deployment(catalog: Catalog) -> None:
    alias(catalog, "a", "x", defaults={"top_k": 3})
    assert catalog.prepare({"model": "x"}, "chat") == {"model": "x", "top_k": 3}
    assert catalog.prepare({"model": "other"}, "chat") == {"model": "other"}
    assert catalog.prepare({"model": 7}, "chat") == {"model": 7}


async def test_whoever_waits_for_a_change_is_woken(catalog: Catalog) -> None:
    waiting = asyncio.create_task(catalog.until(lambda: catalog.find("a") is not None, 10))
    await asyncio.sleep(0)
    alias(catalog, "a")
    assert await waiting
    assert not await catalog.until(lambda: False, 0.0)


def test_requests_of_a_removed_deployment_have_until_nobody_has_it(gone: Gone) -> None:
    lost = Gone()
    catalog = Catalog(cast(Bus, None), gone, on_gone=lost)
    deploy(catalog, "m")
    place(catalog, "g0", "m", "draining")
    live(catalog, "g0")
    del catalog._deployments.values["m"]
    catalog._on_deployment("m", None)
    assert (gone, lost) == ([("m", "its deployment was removed")], [])
    place(catalog, "g0", "m", "cold")  # its worker died
    catalog._moved()
    assert lost == [("m", "its deployment was removed")]
    catalog._moved()
    assert len(lost) == 1


def test_a_deployment_that_came_back_in_time_goes_on_with_them(gone: Gone) -> None:
    lost = Gone()
    catalog = Catalog(cast(Bus, None), gone, on_gone=lost)
    place(catalog, "g0", "m", "draining")
    live(catalog, "g0")
    catalog._on_deployment("m", None)
    deploy(catalog, "m")
    place(catalog, "g0", "m", "cold")
    catalog._moved()
    assert lost == []
