"""What is to be deployed: HS_DEPLOYMENTS, written by the leader alone, and hotswap.toml.

One entry for each deployment. Its revision is its version: a change that names another one than the
present loses (`schemas.admin`). Every leader begins with what is stored, and with the file::

    the file says of a model        stored                          then
    ------------------------        ------                          ----
    something                       nothing                         as the file says
    what it said before             it, as changed through the API  as stored: changes are kept, and
                                                                    what was deleted stays deleted
    something else than before      it, whatever became of it       as the file says: the file wins
    nothing any more                it, as the file once said       deleted
    nothing                         made through the API            as stored
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from schemas import names
from schemas.admin import AdminAnswer, DeleteDeployment, PutDeployment
from schemas.state import DesiredDeployment, ModelSpec
from services import settings
from services.bus import Bucket, Bus, BusError, Entry, JetStreamError
from services.settings import Settings

FILE: Final = "hotswap.toml"  # who changed it, where that was the file


class Conflict(BusError):
    """Somebody else wrote the entry since it was read."""


@dataclass(frozen=True)
class Version:
    """A deployment as it is stored; ``revision`` 0: not yet."""

    desired: DesiredDeployment
    revision: int


def merge(
    declared: Sequence[ModelSpec], stored: Mapping[str, DesiredDeployment], now: float
) -> dict[str, DesiredDeployment | None]:
    """What has to be written where the file says ``declared``, by name: see the top of the module.

    None: to be deleted.
    """
    out: dict[str, DesiredDeployment | None] = {}
    for spec in declared:
        known = stored.get(spec.name)
        if known is None or known.declared != spec:
            out[spec.name] = DesiredDeployment(
                spec=spec,
                declared=spec,
                created_at=known.created_at if known and not known.removed else int(now),
                updated_at=now,
                updated_by=FILE,
            )
    in_file = {spec.name for spec in declared}
    for name, known in stored.items():
        if known.declared is not None and name not in in_file:
            out[name] = None
    return out


class Deployments:
    """The leader's copy of HS_DEPLOYMENTS. Changes are made one after the other.

    `read`, then `write_file`, then `put` and `delete`. All raise BusError where the server does not
    answer; then nothing is known to have changed.
    """

    def __init__(self, bus: Bus, config: Settings) -> None:
        self._bucket = Bucket(bus, names.BUCKET_DEPLOYMENTS, DesiredDeployment)
        self._config = config
        self._versions: dict[str, Version] = {}
        self._unwritten: dict[str, DesiredDeployment | None] = {}  # what the file changes

    def __contains__(self, model: object) -> bool:
        version = self._versions.get(str(model))
        return version is not None and not version.desired.removed

    def get(self, model: str) -> Version | None:
        """None where it is not deployed."""
        return self._versions[model] if model in self else None

    def specs(self) -> list[ModelSpec]:
        """All that are to be served: those of the file in its order, then the others by age."""
        place = {name: number for number, name in enumerate(self._config.models)}
        wanted = [one.desired for one in self._versions.values() if not one.desired.removed]
        wanted.sort(key=lambda one: (place.get(one.spec.name, len(place)), one.created_at))
        return [one.spec for one in wanted]

    async def read(self, now: float) -> None:
        """What is stored, with what the file says over it, if that is news."""
        entries = await self._bucket.entries()
        self._versions = {
            entry.value.spec.name: Version(entry.value, entry.revision)
            for entry in entries.values()
            if entry.value is not None
        }
        stored = {name: version.desired for name, version in self._versions.items()}
        self._unwritten = merge(self._config.model_specs(), stored, now)
        for name, desired in self._unwritten.items():
            revision = self._versions[name].revision if name in self._versions else 0
            if desired is None:
                self._versions[name] = Version(
                    msgspec.structs.replace(self._versions[name].desired, removed=True), revision
                )
            else:
                self._versions[name] = Version(desired, revision)

    async def write_file(self) -> list[tuple[str, DesiredDeployment | None, bool]]:
        """Store what the file changed. Each of it: name, what was written, whether it is new."""
        written = []
        for name, desired in list(self._unwritten.items()):
            is_new = self._versions[name].revision == 0
            await self._write(name, desired)
            del self._unwritten[name]
            written.append((name, desired, is_new))
        return written

    async def put(self, request: PutDeployment, gpus: Sequence[str], now: float) -> AdminAnswer:
        """``gpus``: the names of those that there are, as far as known."""
        name, version = request.model, self.get(request.model)
        if refusal := _refuse(version, request.if_match, name):
            return refusal
        if version and request.must_be_new:
            return _precondition(f"there is a deployment {name!r} already", version)
        if version and version.desired.spec == request.spec:
            return AdminAnswer("done", revision=version.revision)
        if refusal := self._check(request.spec, gpus):
            return refusal
        before = self._versions.get(name)
        desired = DesiredDeployment(
            spec=request.spec,
            declared=before.desired.declared if before else None,
            created_at=version.desired.created_at if version else int(now),
            updated_at=now,
            updated_by=request.who,
        )
        try:
            await self._write(name, desired)
        except Conflict:
            words = f"deployment {name!r} was changed by somebody else at the same time"
            return _precondition(words, self.get(name))
        revision = self._versions[name].revision
        return AdminAnswer("done", revision=revision, created=version is None)

    async def delete(self, request: DeleteDeployment, now: float) -> AdminAnswer:
        name, version = request.model, self.get(request.model)
        if refusal := _refuse(version, request.if_match, name):
            return refusal
        if version is None:
            return AdminAnswer("not_found", f"there is no deployment {name!r}")
        gone = None
        if version.desired.declared is not None:  # else the next start would bring it back
            gone = msgspec.structs.replace(
                version.desired, removed=True, updated_at=now, updated_by=request.who
            )
        try:
            await self._write(name, gone)
        except Conflict:
            words = f"deployment {name!r} was changed by somebody else at the same time"
            return _precondition(words, self.get(name))
        return AdminAnswer("accepted")

    def _check(self, spec: ModelSpec, gpus: Sequence[str]) -> AdminAnswer | None:
        """Whether it can be deployed beside the others."""
        others = {one.name: one for one in self.specs() if one.name != spec.name}
        try:
            settings.check_names({**others, spec.name: spec})
        except ValueError as error:
            return AdminAnswer("conflict", str(error))
        try:
            settings.check_gpus(spec.name, spec, gpus)
            settings.check_groups({**others, spec.name: spec}, gpus)
        except ValueError as error:
            return AdminAnswer("invalid", str(error))
        return None

    async def _write(self, name: str, desired: DesiredDeployment | None) -> None:
        """Store it over the version that we know. Raises Conflict, having read what is there."""
        key = names.escape(name)
        known = self._versions.get(name)
        expect = known.revision if known else (await self._bucket.get(key)).revision
        try:
            if desired is None:
                await self._bucket.delete(key, expect=expect)
                self._versions.pop(name, None)
                return
            revision = await self._bucket.put(key, desired, expect=expect)
        except JetStreamError as error:
            if not error.is_wrong_revision:
                raise
            self._note(name, await self._bucket.get(key))
            raise Conflict(str(error)) from error
        self._versions[name] = Version(desired, revision)

    def _note(self, name: str, entry: Entry[DesiredDeployment]) -> None:
        if entry.value is None:
            self._versions.pop(name, None)
        else:
            self._versions[name] = Version(entry.value, entry.revision)


def _refuse(
    version: Version | None, if_match: tuple[int, ...] | None, name: str
) -> AdminAnswer | None:
    """``if_match``: None: whatever there is; (): any version, but there must be one."""
    if if_match is None:
        return None
    if version is None:
        return _precondition(f"there is no deployment {name!r}", None)
    if if_match and version.revision not in if_match:
        words = f"deployment {name!r} is at version {version.revision} by now"
        return _precondition(words, version)
    return None


def _precondition(words: str, version: Version | None) -> AdminAnswer:
    return AdminAnswer("precondition_failed", words, version.revision if version else 0)
