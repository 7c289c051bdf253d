"""The scheduler's desk over a real nats-server: changes stored, versions, and a new leader."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from schemas import names
from schemas.admin import (
    AdminAnswer,
    AdminRequest,
    DeleteDeployment,
    MoveDeployment,
    PutDeployment,
    SwapInDeployment,
    SwapOutDeployment,
    action_of,
)
from schemas.commands import Load, Register, SwapIn, SwapOut, Unload
from schemas.events import DeploymentChanged, LeaderElected
from schemas.state import DeploymentRecord, DesiredDeployment, ModelSpec
from services.bus import Bucket, Bus, NoResponder, declare
from services.scheduler import service
from services.settings import GpuSettings, ModelSettings, SchedulerSettings, Settings
from tests.integration.agent_kit import Watcher, connected, eventually
from tests.integration.nats_process import NatsServer
from tests.integration.scripted_gpu import GPU, ScriptedGpu

A = ModelSpec("a", "/models/a")
NEW = ModelSpec("team/new", "/models/new")


def config(**models: ModelSettings) -> Settings:
    knobs = SchedulerSettings(lease_ttl_s=1, run_quantum_s=0.05, reconcile_s=0.2)
    return Settings(scheduler=knobs, gpus=(GpuSettings(GPU),), models=models)


class Desk:
    """An operator's side of schedulers, and one GPU."""

    def __init__(self, nats: NatsServer, buses: dict[str, Bus], watcher: Watcher) -> None:
        self.events = watcher.events
        self.gpu = ScriptedGpu(buses["agent"])
        self._nats = nats
        self._api = buses["api"]
        self.records = Bucket(buses["admin"], names.BUCKET_MODELS, DeploymentRecord)
        self.desired = Bucket(buses["admin"], names.BUCKET_DEPLOYMENTS, DesiredDeployment)

    @contextlib.asynccontextmanager
    async def scheduler(self, settings: Settings) -> AsyncIterator[None]:
        """One that leads, and is stopped in order."""
        num_before = len(self.events.items)
        stop = asyncio.Event()
        options = self._nats.credentials["scheduler"]
        running = asyncio.create_task(service.run(settings, options, stop=stop))
        await self.events.until(LeaderElected, num_before)
        try:
            yield
        finally:
            stop.set()
            await asyncio.wait_for(running, 15)

    async def ask(self, request: AdminRequest) -> AdminAnswer:
        """As soon as somebody leads."""
        subject = names.admin_subject(action_of(request), request.model)
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(NoResponder):
                    answer: AdminAnswer = await self._api.request(subject, request, AdminAnswer)
                    return answer
                await asyncio.sleep(0.02)

    async def deployed(self, *expected: str) -> dict[str, DeploymentRecord]:
        """Wait until HS_MODELS has these models, all of them ready."""
        found: dict[str, DeploymentRecord] = {}

        async def are() -> bool:
            records = (await self.records.items()).values()
            found.clear()
            found.update({record.spec.name: record for record in records})
            ready = {name for name, record in found.items() if record.status == "ready"}
            return set(found) == ready == set(expected)

        await eventually(are, f"deployments {expected}")
        return found


@pytest.fixture
async def desk(nats_server: NatsServer) -> AsyncIterator[Desk]:
    async with connected(nats_server, "admin", "agent", "api") as buses:
        await declare(buses["admin"])
        watcher = Watcher(buses["admin"])
        await watcher.start()
        desk = Desk(nats_server, buses, watcher)
        await desk.gpu.start()
        yield desk
        await desk.gpu.stop()


async def test_deployments_are_made_changed_and_removed_while_it_leads(desk: Desk) -> None:
    async with desk.scheduler(config(a=ModelSettings("/models/a"))):
        made = await desk.ask(PutDeployment(NEW, "me"))
        assert (made.outcome, made.created) == ("done", True)
        records = await desk.deployed("a", "team/new")
        assert records["team/new"].revision == made.revision
        assert (records["team/new"].origin, records["a"].origin) == ("api", "file")
        registered = await desk.gpu.commands.until(Register, model="team/new")
        assert registered.spec == NEW

        again = await desk.ask(PutDeployment(NEW, "me"))
        assert again == msgspec.structs.replace(made, created=False)

        smaller = msgspec.structs.replace(NEW, max_batch=2, aliases=("x",))
        await desk.gpu.commands.until(Load, model="team/new")
        changed = await desk.ask(PutDeployment(smaller, "me", (made.revision,)))
        assert changed.revision > made.revision
        await desk.gpu.commands.until(Unload, model="team/new")
        await desk.gpu.commands.until(Register, model="team/new", spec=smaller.for_agents())

        gone = await desk.ask(DeleteDeployment("team/new", "me"))
        assert gone.outcome == "accepted"
        await desk.deployed("a")
        await desk.gpu.commands.until_true(
            lambda: desk.gpu.count(Unload, "team/new") == 2, "a second unload"
        )
        assert (await desk.ask(DeleteDeployment("team/new"))).outcome == "not_found"
    events = desk.events.all(DeploymentChanged)
    assert [(one.model, one.action, one.who) for one in events] == [
        ("a", "created", "hotswap.toml"),
        ("team/new", "created", "me"),
        ("team/new", "updated", "me"),
        ("team/new", "deleted", "me"),
    ]
    assert events[2].detail == "max_batch = 2, aliases = ('x',)"


async def test_of_two_changes_of_one_version_one_wins(desk: Desk) -> None:
    async with desk.scheduler(config()):
        made = await desk.ask(PutDeployment(NEW))
        changes = [msgspec.structs.replace(NEW, priority=number) for number in (1, 2)]
        answers = await asyncio.gather(
            *(desk.ask(PutDeployment(spec, if_match=(made.revision,))) for spec in changes)
        )
        assert sorted(one.outcome for one in answers) == ["done", "precondition_failed"]
        assert len({one.revision for one in answers}) == 1  # the loser is told the winner's
        for refused in (
            PutDeployment(NEW, must_be_new=True),
            PutDeployment(A, if_match=()),
            DeleteDeployment("team/new", if_match=(made.revision,)),
        ):
            assert (await desk.ask(refused)).outcome == "precondition_failed"


@pytest.mark.parametrize(
    ("settings", "outcome", "words"),
    [
        ({"aliases": ("a",)}, "conflict", "'a' is a name of model 'a' already"),
        ({"gpus": ("gpu7",)}, "invalid", "no [[gpus]] has the name 'gpu7'"),
    ],
)
async def test_what_can_not_stand_beside_the_others_is_refused(
    desk: Desk, settings: dict[str, Any], outcome: str, words: str
) -> None:
    async with desk.scheduler(config(a=ModelSettings("/models/a"))):
        answer = await desk.ask(PutDeployment(msgspec.structs.replace(NEW, **settings)))
        assert answer.outcome == outcome
        assert words in answer.reason
        await desk.deployed("a")


async def test_the_next_leader_sees_the_same_until_the_file_changes(desk: Desk) -> None:
    first = config(a=ModelSettings("/models/a"), b=ModelSettings("/models/b"))
    async with desk.scheduler(first):
        await desk.ask(PutDeployment(NEW))
        await desk.ask(PutDeployment(msgspec.structs.replace(A, priority=5)))
        await desk.ask(DeleteDeployment("b"))
        before = await desk.deployed("a", "team/new")
    async with desk.scheduler(first):
        await desk.ask(SwapOutDeployment("a"))  # it has taken over
        after = await desk.deployed("a", "team/new")
        assert {name: one.revision for name, one in after.items()} == {
            name: one.revision for name, one in before.items()
        }
        assert after["a"].spec.priority == 5
    changed = config(a=ModelSettings("/models/a", priority=7), b=ModelSettings("/models/b2"))
    async with desk.scheduler(changed):
        records = await desk.deployed("a", "b", "team/new")
        assert records["a"].spec.priority == 7
        assert records["b"].spec.source == "/models/b2"
    async with desk.scheduler(config()):
        await desk.deployed("team/new")
        assert [one.spec.name for one in (await desk.desired.items()).values()] == ["team/new"]


async def test_operators_bring_models_in_and_out(desk: Desk) -> None:
    models = {"a": ModelSettings("/models/a"), "b": ModelSettings("/models/b", pinned=True)}
    async with desk.scheduler(config(**models)):
        await desk.deployed("a", "b")
        await desk.gpu.commands.until(SwapIn, model="b")
        await desk.gpu.commands.until(Load, model="a")
        until = 4e9
        refused = await desk.ask(SwapInDeployment("a", until))
        assert refused.outcome == "conflict"
        assert "pinned models (b) hold" in refused.reason
        unpinned = ModelSpec("b", "/models/b")
        await desk.ask(PutDeployment(unpinned))
        assert (await desk.ask(SwapInDeployment("a", until))).outcome == "accepted"
        await desk.gpu.commands.until(SwapOut, model="b")
        await desk.gpu.commands.until(SwapIn, model="a")

        async def is_out() -> bool:
            return (await desk.ask(SwapOutDeployment("a"))).outcome == "accepted"

        await eventually(is_out, "a to be swapped out")
        await desk.gpu.commands.until(SwapOut, model="a")
        assert (await desk.ask(MoveDeployment("a", GPU, "gpu7", until))).outcome == "invalid"
        assert (await desk.ask(SwapInDeployment("nobody", until))).outcome == "not_found"
