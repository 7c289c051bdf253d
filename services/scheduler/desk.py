"""Where operators' requests arrive at the leader (`schemas.admin`), one after the other.

What changes deployments is stored first, and told to `decide` when it is; what is to be done now is
`decide`'s to accept or refuse. Either way it ends in one answer, and in one DeploymentChanged.
"""

import asyncio
import logging
import time
from collections.abc import Callable

import msgspec

from schemas import names
from schemas.admin import (
    AdminAnswer,
    AdminRequest,
    Ask,
    DeleteDeployment,
    MoveDeployment,
    PutDeployment,
    SwapInDeployment,
    SwapOutDeployment,
)
from schemas.events import ChangeAction, DeploymentChanged
from services.bus import Bus, BusError
from services.bus.connection import Hook, RawMessage
from services.scheduler.deployments import FILE, Conflict, Deployments
from services.scheduler.inputs import Asked, DeploymentAdded, DeploymentRemoved, Input
from services.scheduler.state import ClusterState
from services.scheduler.telling import Teller

log = logging.getLogger(__name__)

_VERDICT_S = 5.0  # `decide` runs all the time: a verdict takes milliseconds
_REMOVED = "its deployment was removed by an operator"


class Desk:
    """``tell``: into the queue of `decide`. ``is_held``: whether we still lead."""

    def __init__(
        self,
        bus: Bus,
        state: ClusterState,
        deployments: Deployments,
        teller: Teller,
        tell: Callable[[Input], None],
        is_held: Callable[[], bool],
        gpu_names: list[str],
    ) -> None:
        self._bus = bus
        self._state = state
        self._deployments = deployments
        self._teller = teller
        self._tell = tell
        self._is_held = is_held
        self._gpu_names = gpu_names
        self._asked: dict[int, asyncio.Future[AdminAnswer]] = {}
        self._num_asked = 0
        self._decoder = msgspec.json.Decoder(AdminRequest)

    async def store_file(self) -> None:
        """What hotswap.toml changed, which is in force already. Raises BusError."""
        try:
            for name, desired, is_new in await self._deployments.write_file():
                self._teller.touch(name)  # its revision is known now
                action: ChangeAction = (
                    "deleted" if desired is None else "created" if is_new else "updated"
                )
                version = self._deployments.get(name)
                revision = version.revision if version else 0
                await self._teller.announce(
                    DeploymentChanged(name, time.time(), action, FILE, revision=revision)
                )
        except Conflict as error:
            log.error("another scheduler writes deployments, too: %s", error)
            raise

    async def open(self) -> Hook:
        """Take requests. Returns the undo."""
        return await self._bus.subscribe_raw(names.admin_subject(), self._on_request)

    def announce_verdicts(self) -> None:
        """Those that `decide` has made since this was called last."""
        verdicts, self._state.verdicts = self._state.verdicts, []
        for verdict in verdicts:
            waiting = self._asked.get(verdict.number)
            if waiting and not waiting.done():
                waiting.set_result(verdict.answer)

    async def _on_request(self, raw: RawMessage) -> None:
        if not self._is_held():
            return  # whoever leads by now answers
        try:
            request: AdminRequest = self._decoder.decode(raw.data)
        except msgspec.DecodeError as error:
            answer = AdminAnswer("invalid", f"the scheduler does not know this request: {error}")
        else:
            try:
                answer = await self._handle(request)
            except (BusError, TimeoutError) as error:
                log.error("%s was not done: %s", request, error)
                answer = AdminAnswer("unavailable", f"the scheduler could not do it: {error}")
        if raw.reply:
            await self._bus.publish(raw.reply, answer)

    async def _handle(self, request: AdminRequest) -> AdminAnswer:
        match request:
            case PutDeployment():
                return await self._put(request)
            case DeleteDeployment():
                return await self._delete(request)
            case _:
                return await self._ask(request)

    async def _put(self, request: PutDeployment) -> AdminAnswer:
        before = self._deployments.get(request.model)
        gpus = list(dict.fromkeys([*self._gpu_names, *self._state.agents]))
        answer = await self._deployments.put(request, gpus, time.time())
        version = self._deployments.get(request.model)
        if version is None or version == before:
            return answer
        self._tell(DeploymentAdded(version.desired.spec))
        if answer.outcome != "done":  # another scheduler changed it
            return answer
        action: ChangeAction = "created" if answer.created else "updated"
        detail = _difference(before.desired.spec, request.spec) if before else ""
        await self._announce(request, action, detail, version.revision)
        return answer

    async def _delete(self, request: DeleteDeployment) -> AdminAnswer:
        answer = await self._deployments.delete(request, time.time())
        if answer.outcome == "accepted":
            self._tell(DeploymentRemoved(request.model, "" if request.drain else _REMOVED))
            self._teller.forget_record(request.model)
            await self._announce(request, "deleted", "drained" if request.drain else "at once")
        return answer

    async def _ask(self, ask: Ask) -> AdminAnswer:
        self._num_asked += 1
        number = self._num_asked
        waiting: asyncio.Future[AdminAnswer] = asyncio.get_running_loop().create_future()
        self._asked[number] = waiting
        self._tell(Asked(number, ask))
        try:
            answer = await asyncio.wait_for(waiting, _VERDICT_S)
        finally:
            del self._asked[number]
        if answer.outcome == "accepted":
            match ask:
                case SwapInDeployment():
                    await self._announce(ask, "swap_in", ask.gpu)
                case SwapOutDeployment():
                    await self._announce(ask, "swap_out", ask.gpu)
                case MoveDeployment():
                    await self._announce(ask, "move", f"{ask.source} -> {ask.gpu}")
        return answer

    async def _announce(
        self, request: AdminRequest, action: ChangeAction, detail: str = "", revision: int = 0
    ) -> None:
        log.info("%s %s by %s %s", action, request.model, request.who or "nobody named", detail)
        event = DeploymentChanged(
            request.model,
            time.time(),
            action,
            request.who,
            detail,
            revision,
        )
        await self._teller.announce(event)


def _difference(old: msgspec.Struct, new: msgspec.Struct) -> str:
    """The keys that differ, with what they are now."""
    return ", ".join(
        f"{key} = {getattr(new, key)!r}"
        for key in new.__struct_fields__
        if getattr(old, key) != getattr(new, key)
    )
