"""Pin what is installed: torch.txt, runtime.txt and dev.txt from pyproject.toml's names.

    make lock        (python requirements/lock.py)

pyproject.toml says which packages and which ranges; these files say exactly which versions,
dependencies of dependencies included, as found in the environment that runs this script.
To change one: install the wanted version, run the tests, run this, commit the difference.

    torch.txt     torch alone. It is installed first, so that nothing else gets to pick it:
                  a build for the CPU that is already there satisfies everyone later.
    runtime.txt   everything else that `hotswap` needs. Torch's own CUDA libraries are left
                  out: which ones belong to it depends on the build of torch.
    dev.txt       what the tests and checks need on top.
"""

import importlib.metadata
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

HERE = Path(__file__).parent
TORCH = "torch"
# Come with a CUDA build of torch, in versions that only that build knows.
BROUGHT_BY_TORCH = ("nvidia-", "cuda-", "triton")
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
MACHINES = ("x86_64", "aarch64")

HEADER = "# Written by `make lock` from pyproject.toml and the installed versions; do not edit.\n"


class LockError(Exception):
    """The installed packages can not be pinned; the message names which and why."""


class Wanted(NamedTuple):
    """One requirement and who asks for it."""

    requirement: Requirement
    by: str


def needed(requirement: Requirement, extras: Iterable[str]) -> bool:
    """Whether any Python and machine we support needs it, with these ``extras`` of its parent."""
    if requirement.marker is None:
        return True
    for python in PYTHONS:
        for machine in MACHINES:
            environment = {
                **{key: str(value) for key, value in default_environment().items()},
                "python_version": python,
                "python_full_version": f"{python}.0",
                "platform_machine": machine,
                "sys_platform": "linux",
                "platform_system": "Linux",
            }
            for extra in ("", *extras):
                if requirement.marker.evaluate({**environment, "extra": extra}):
                    return True
    return False


def closure(roots: Iterable[str]) -> dict[str, str]:
    """Canonical name -> installed version, of ``roots`` and all they need, torch left out.

    Raises LockError where something is missing or outside the asked range.
    """
    pins: dict[str, str] = {}
    problems: list[str] = []
    seen: set[tuple[str, frozenset[str]]] = set()
    queue = [Wanted(Requirement(root), "pyproject.toml") for root in roots]
    while queue:
        wanted = queue.pop()
        name = canonicalize_name(wanted.requirement.name)
        key = (name, frozenset(wanted.requirement.extras))
        if wanted.by == TORCH and name.startswith(BROUGHT_BY_TORCH):
            continue
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{wanted.requirement} is not installed (needed by {wanted.by})")
            continue
        if not wanted.requirement.specifier.contains(found.version, prereleases=True):
            problems.append(
                f"{name} {found.version} is installed, but {wanted.by} needs {wanted.requirement}"
            )
        if key in seen:
            continue
        seen.add(key)
        if name != TORCH:
            pins[name] = Version(found.version).public
        for line in found.requires or ():
            requirement = Requirement(line)
            if needed(requirement, wanted.requirement.extras):
                queue.append(Wanted(requirement, name))
    if problems:
        raise LockError("\n".join(sorted(set(problems))))
    return dict(sorted(pins.items()))


def lock(project: Path) -> dict[str, str]:
    """File name -> content, for the pyproject.toml at ``project``. Raises LockError."""
    table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    runtime = closure(table["dependencies"])
    dev = closure(table["optional-dependencies"]["dev"])
    torch = Version(importlib.metadata.version(TORCH)).public
    return {
        "torch.txt": render({TORCH: torch}),
        "runtime.txt": render(runtime),
        "dev.txt": render({name: pin for name, pin in dev.items() if name not in runtime}),
    }


def render(pins: dict[str, str]) -> str:
    """A requirements file of exact pins."""
    return HEADER + "".join(f"{name}=={version}\n" for name, version in pins.items())


def main() -> int:
    """Write the three files. Returns the exit status."""
    try:
        files = lock(HERE.parent / "pyproject.toml")
    except LockError as error:
        print(f"can not pin the dependencies:\n{error}", file=sys.stderr)
        return 1
    for name, content in files.items():
        (HERE / name).write_text(content, encoding="utf-8")
        print(f"requirements/{name}: {content.count('==')} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
