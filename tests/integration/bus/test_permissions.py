"""Who may do what, on a real nats-server: what is refused, and what has to work."""

import time

import pytest

from schemas import names
from schemas.admin import AdminAnswer, SwapOutDeployment
from schemas.commands import Command, SwapIn
from schemas.events import (
    DecisionMade,
    Event,
    LeaderElected,
    LoadProgressed,
    RequestWithdrawn,
    kind_of,
)
from schemas.keys import KeyRecord
from schemas.requests import CancelRequest
from schemas.state import (
    AgentStatus,
    DeploymentRecord,
    LeaseRecord,
    ModelSpec,
    PlacementRecord,
    PredictedWait,
    ResidencyRecord,
)
from schemas.stream import ResumeFrom, Tokens
from schemas.tokenize import Detokenized, DetokenizeRequest, TokenizeAnswer
from services.bus import (
    Bucket,
    Delivery,
    Lease,
    NoResponder,
    Puller,
    WorkQueue,
    declare,
)
from services.bus.connection import RawMessage
from tests.integration.bus.kit import MODEL, Box, Parties, errors, request, tap

CHUNK = Tokens("r1", 1, 0, (7,), "x")
STATUS = AgentStatus("g0", "i", 1, "cpu", "cpu", 1, 0, 1)
COMMAND = SwapIn("g0", MODEL, epoch=1, generation=1)

FORBIDDEN_TO_PUBLISH = [
    ("api", names.command_subject("g0")),
    ("api", "$KV.HS_MODELS.x"),
    ("api", "$KV.HS_DEPLOYMENTS.x"),
    ("api", "$KV.HS_LEASES.scheduler.leader"),
    ("scheduler", "$KV.HS_KEYS.x"),
    ("scheduler", "$JS.API.STREAM.MSG.GET.KV_HS_KEYS"),
    ("agent", "$KV.HS_KEYS.x"),
    ("agent", "$JS.API.CONSUMER.CREATE.KV_HS_KEYS"),
    ("api", "_INBOX_agent.x"),
    ("api", "$JS.API.STREAM.DELETE.HS_REQUESTS"),
    ("api", names.wait_subject(MODEL)),
    ("api", names.event_subject("decision_made", "g0", MODEL)),
    ("api", names.result_subject("batch_1", 1)),
    ("api", f"$JS.API.CONSUMER.CREATE.HS_BATCH.{names.consumer_name(MODEL)}"),
    ("scheduler", names.request_subject("interactive", MODEL)),
    ("scheduler", names.request_subject("batch", MODEL)),
    ("scheduler", f"$JS.API.DIRECT.GET.HS_BATCH.{names.request_subject('batch', MODEL)}"),
    ("scheduler", "$JS.API.DIRECT.GET.HS_BATCH"),
    ("scheduler", "$JS.API.CONSUMER.CREATE.HS_RESULTS"),
    ("scheduler", names.file_subject("file-1")),
    ("scheduler", "_INBOX_api.x"),
    ("scheduler", names.tokenize_subject(MODEL)),
    ("agent", names.tokenize_subject(MODEL)),
    ("scheduler", f"$JS.API.CONSUMER.CREATE.HS_REQUESTS.{names.consumer_name(MODEL)}"),
    ("scheduler", "$JS.API.STREAM.MSG.GET.HS_REQUESTS"),
    ("scheduler", f"$JS.API.DIRECT.GET.HS_REQUESTS.{names.request_subject('batch', MODEL)}"),
    ("scheduler", "$KV.HS_RESIDENCY.x"),
    ("agent", names.command_subject("g0")),
    ("agent", "$KV.HS_MODELS.x"),
    ("agent", "$KV.HS_DEPLOYMENTS.x"),
    ("agent", names.admin_subject("delete", MODEL)),
    ("agent", "$KV.HS_LEASES.scheduler.leader"),
    ("agent", names.event_subject("leader_elected")),
    ("agent", names.event_subject("decision_made", "g0", MODEL)),
    ("agent", names.wait_subject(MODEL)),
    ("agent", "$JS.API.STREAM.PURGE.HS_REQUESTS"),
    ("agent", "$JS.API.STREAM.PURGE.HS_RESULTS"),
    ("agent", names.request_subject("batch", MODEL)),
    ("agent", names.file_subject("file-1")),
    ("agent", "$KV.HS_BATCHES.batch_1"),
    ("agent", "$JS.API.DIRECT.GET.HS_FILE_DATA"),
]
FORBIDDEN_TO_SUBSCRIBE = [
    ("scheduler", "hs.v1.requests.>"),
    ("scheduler", "_INBOX_api.>"),
    ("scheduler", ">"),
    ("api", "hs.v1.agent.*.command"),
    ("api", names.events_subject()),
    ("api", names.events_subject("request_ended")),
    ("api", "_INBOX_agent.>"),
    ("scheduler", "hs.v1.results.>"),
    ("scheduler", "hs.v1.files.>"),
    ("agent", "hs.v1.results.>"),
    ("api", names.tokenize_subject()),
    ("scheduler", names.tokenize_subject()),
    ("agent", "_INBOX_api.>"),
    ("agent", "hs.v1.requests.>"),
    ("agent", "hs.v1.admin.>"),
    ("api", "hs.v1.admin.>"),
]


async def test_what_is_forbidden_is_refused_and_loud(
    party: Parties, caplog: pytest.LogCaptureFixture
) -> None:
    everything = await tap(await party("admin"), ">")
    users = {name: await party(name) for name in ("api", "scheduler", "agent")}

    leaked: Box[object] = Box()

    for user, subject in FORBIDDEN_TO_PUBLISH:
        caplog.clear()
        await users[user].publish_raw(subject, b"{}")
        await users[user].flush()  # the server's refusal comes before its answer to this
        assert errors(caplog), f"{user} may publish to {subject}"
        # nats-py gives the server's words in lower case
        assert f'permissions violation for publish to "{subject.lower()}"' in errors(caplog)[0]
    for user, subject in FORBIDDEN_TO_SUBSCRIBE:
        caplog.clear()
        await users[user].subscribe_raw(subject, leaked.put)
        await users[user].flush()
        assert errors(caplog), f"{user} may subscribe to {subject}"
        assert "permissions violation for subscription" in errors(caplog)[0]
    await users["api"].publish(names.cancel_subject(MODEL), CancelRequest("r", MODEL))
    await everything.until(lambda seen: any("cancel" in raw.subject for raw in seen))
    assert not {raw.subject for raw in everything.all} & {s for _, s in FORBIDDEN_TO_PUBLISH}
    for bus in users.values():
        await bus.flush()
    assert not leaked.all


async def test_every_service_can_do_what_it_needs(
    party: Parties, caplog: pytest.LogCaptureFixture
) -> None:
    api, scheduler, agent = await party("api"), await party("scheduler"), await party("agent")
    for bus in (api, scheduler, agent):
        await declare(bus)
    heard: Box[object] = Box()
    chunks = await tap(api, f"{api.inbox}.r.*")
    demand = await tap(scheduler, names.demand_subject())
    for bus, subject, kind in (
        (scheduler, f"{names.PREFIX}.events.>", Event),
        (scheduler, names.status_subject(), AgentStatus),
        (api, names.wait_subject(), PredictedWait),
        (api, names.events_subject("load_progressed"), LoadProgressed),
        (agent, f"{agent.inbox}.resume.*", ResumeFrom),
        (agent, names.command_subject("g0"), Command),
        (agent, names.cancel_subject(), CancelRequest),
        (agent, names.event_subject("leader_elected"), LeaderElected),
    ):
        await bus.subscribe(subject, kind, lambda message: heard.put(message.body))
        await bus.flush()

    # the scheduler leads, writes records, commands, counts
    leader = Lease(scheduler, names.LEADER_KEY, "s", ttl_s=5)
    assert await leader.try_acquire()
    await leader.renew()
    models = Bucket(scheduler, names.BUCKET_MODELS, DeploymentRecord)
    placement = Bucket(scheduler, names.BUCKET_PLACEMENT, PlacementRecord)
    key = names.escape(MODEL)
    await models.put(key, DeploymentRecord(ModelSpec(MODEL, "/x"), "ready"))
    await placement.put(f"g0.{key}", PlacementRecord("g0", MODEL, "resident", 1, 1))
    assert list(await models.items()) == [key]
    elected = LeaderElected("s", leader.epoch, time.time())
    decided = DecisionMade(MODEL, "g0", "claim", time.time(), "no room")
    wait = PredictedWait(MODEL, time.time(), 0.5, 1, 0, time.time(), 1)
    sent: list[object] = [elected, elected, COMMAND, decided, wait]  # agents hear who leads, too
    await scheduler.publish(names.event_subject(kind_of(elected)), elected)
    await scheduler.publish(names.command_subject("g0"), COMMAND)
    await scheduler.publish(names.event_subject(kind_of(decided), "g0", MODEL), decided)
    await scheduler.publish(names.wait_subject(MODEL), wait)

    # the agent holds its lease, tells, serves
    held = Lease(agent, names.agent_lease_key("g0"), "a", ttl_s=5)
    assert await held.try_acquire()
    residency = Bucket(agent, names.BUCKET_RESIDENCY, ResidencyRecord)
    await residency.put("g0.x", ResidencyRecord("g0", "x", "resident", 1, 0.0))
    await residency.delete("g0.x")
    await residency.put("g0.y", ResidencyRecord("g0", "y", "resident", 1, 0.0))
    assert list(await residency.items()) == ["g0.y"]
    await agent.publish(names.status_subject("g0"), STATUS)

    async def serve(delivery: Delivery) -> None:
        await agent.publish(delivery.request.reply_to, CHUNK, reply=f"{agent.inbox}.gone.x")
        await delivery.in_progress()
        await delivery.ack()

    puller = Puller(agent, MODEL, serve)
    await puller.start()
    await puller.want(1)

    async def tokenize(raw: RawMessage) -> None:
        await agent.publish(raw.reply, Detokenized("x"))

    await agent.subscribe_raw(names.tokenize_subject(MODEL), tokenize, queue=names.TOKENIZE_GROUP)
    await agent.flush()

    # the api sees state, queues, withdraws, cancels, asks for tokens
    question = DetokenizeRequest(MODEL, (7,))
    subject = names.tokenize_subject(MODEL)
    assert await api.request(subject, question, TokenizeAnswer, 5.0) == Detokenized("x")
    assert await Bucket(api, names.BUCKET_MODELS, DeploymentRecord).items()
    assert await Bucket(api, names.BUCKET_RESIDENCY, ResidencyRecord).items()
    assert await Bucket(api, names.BUCKET_LEASES, LeaseRecord).items()
    keys = Bucket(api, names.BUCKET_KEYS, KeyRecord)
    await keys.put("k", KeyRecord("k", "ada", "0"))
    assert list(await keys.items()) == ["k"]
    queue = WorkQueue(api)
    await queue.enqueue(request(reply_to=f"{api.inbox}.r.1"))
    assert await queue.withdraw(await queue.enqueue(request("other")))
    withdrawn = RequestWithdrawn("other", "r", time.time(), "client_left")
    await api.publish(names.event_subject(kind_of(withdrawn), model="other"), withdrawn)
    await api.publish(names.cancel_subject(MODEL), CancelRequest("r", MODEL))
    known = ResumeFrom("r", "run", (1, 2))
    await api.publish(f"{agent.inbox}.resume.r", known)
    seq = await queue.enqueue(request("other", request_id="held"))
    assert await queue.holds(seq, "held")
    assert not await queue.holds(seq, "another")
    assert await queue.withdraw(seq)
    assert not await queue.holds(seq, "held")
    load = LoadProgressed("g0", MODEL, time.time(), 1, 2)
    await agent.publish(names.event_subject(kind_of(load), "g0", MODEL), load)
    sent += [STATUS, withdrawn, CancelRequest("r", MODEL), known, load, load]

    await chunks.count(1)
    await demand.count(3)
    await heard.count(len(sent))
    assert sorted(map(repr, heard.all)) == sorted(map(repr, sent))
    assert (await WorkQueue(scheduler).depths())[0].get("other") is None
    for lease in (leader, held):
        await lease.release()
    puller.stop()
    for bus in (api, scheduler, agent):
        await bus.flush()
    assert not errors(caplog)


async def test_the_scheduler_answers_whoever_asks_and_nobody_else(
    party: Parties, caplog: pytest.LogCaptureFixture
) -> None:
    api, scheduler = await party("api"), await party("scheduler")
    subject = names.admin_subject("swap_out", MODEL)
    with pytest.raises(NoResponder, match="nobody answers"):
        await api.request(subject, SwapOutDeployment(MODEL), AdminAnswer)

    async def answer(raw: RawMessage) -> None:
        await scheduler.publish(raw.reply, AdminAnswer("done", "as asked"))

    await scheduler.subscribe_raw(names.admin_subject(), answer)
    await scheduler.flush()
    told = await api.request(subject, SwapOutDeployment(MODEL), AdminAnswer)
    assert told == AdminAnswer("done", "as asked")
    assert not errors(caplog)
    await scheduler.publish(f"{api.inbox}.r.x", CHUNK)
    await scheduler.flush()
    assert "permissions violation" in errors(caplog)[0]
