"""Generated requests against the api's own OpenAPI document, by schemathesis: `make fuzz`.

    python -m tests.conformance.fuzz [--examples N] [--at-least CASES] [--seed N] [--json FILE]

Every operation of the document is taken, each with valid and invalid requests: at the bounds of
what the document says (coverage), random (fuzzing), and one fed by the answers of another
(stateful). No answer may be a 5xx; each must have a documented status, type, headers and body,
server-sent events included; what the document allows must be accepted, and what it does not allow
refused.

Only one thing is told beside the document: which models there are.
"""

import argparse
import os
import secrets
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from tests.conformance.processes import running_api
from tests.conformance.willing_agent import BROKEN, CHAT, EMBEDS

Json: TypeAlias = dict[str, Any]

EXAMPLES = 30
AT_LEAST = 5000


METHODS = {"get", "put", "post", "delete", "patch"}
REPLACED = (  # by those of hooks.py
    "positive_data_acceptance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
)
_EMBEDDING = "EmbeddingRequest"
_OTHERS = "methods that a path does not have"


class Operation(msgspec.Struct):
    """What came of one operation's cases."""

    cases: int = 0
    statuses: dict[str, int] = {}


class Report(msgspec.Struct):
    """What ``--json`` writes. ``problems``: in schemathesis' words."""

    seed: int
    cases: int
    server_errors: int
    problems: list[str]
    operations: dict[str, Operation]
    schemathesis: str
    took_s: float


def document(url: str) -> Json:
    """The api's document, with the models that are there in the place of any name."""
    with urllib.request.urlopen(f"{url}/schema/openapi.json") as answer:
        found: Json = msgspec.json.decode(answer.read())
    for name, schema in found["components"]["schemas"].items():
        if name.endswith("Request") and "model" in schema.get("properties", {}):
            schema["properties"]["model"] = {"enum": [EMBEDS if name == _EMBEDDING else CHAT]}
    for path, item in found["paths"].items():
        if "{model_id}" in path:
            for method in item.keys() & METHODS:
                for parameter in item[method].get("parameters", []):
                    if parameter["name"] == "model_id":
                        parameter["schema"] = {"enum": [CHAT, EMBEDS, BROKEN, "absent"]}
    return found


def fuzz(url: str, folder: Path, examples: int, seed: int, *, deterministic: bool) -> Report:
    """Run all phases. ``examples``: random requests per operation; ``folder``: for files."""
    described = folder / "openapi.json"
    described.write_bytes(msgspec.json.encode(document(url)))
    words = ["run", str(described), "--url", url, "--max-examples", str(examples)]
    words += ["--seed", str(seed), "--continue-on-failure", "--no-color", "--no-shrink"]
    replaced = ",".join(REPLACED)
    words += ["--checks", "all", "--exclude-checks", replaced, "--suppress-health-check", "all"]
    words += ["--report", "json,ndjson", "--report-json-path", "report.json"]
    words += ["--report-ndjson-path", "events.ndjson", "--output-sanitize", "false"]
    words += ["--generation-deterministic"] if deterministic else ["--generation-database", "none"]
    root = Path(__file__).parents[2]
    env = os.environ | {
        "SCHEMATHESIS_HOOKS": "tests.conformance.hooks",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])),
    }
    command = [str(Path(sys.executable).parent / "st"), *words]
    pipes: Json = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, cwd=folder, env=env, text=True, **pipes)
    assert (folder / "report.json").exists(), done.stdout
    told = msgspec.json.decode((folder / "report.json").read_bytes())
    operations = {label: Operation(0, {}) for label in _operations(described)}
    for label, status in _answers(folder / "events.ndjson"):
        one = operations.setdefault(label if label in operations else _OTHERS, Operation(0, {}))
        one.cases += 1
        one.statuses[status] = one.statuses.get(status, 0) + 1
    problems = [f"{one.get('title')}: {one.get('count', 1)}" for one in told["failures"]]
    problems += [f"{one['title']}: {one['count']}" for one in told["errors"]]
    if done.returncode or problems:
        problems.append(done.stdout)
    return Report(
        seed,
        sum(one.cases for one in operations.values()),
        sum(
            count
            for one in operations.values()
            for status, count in one.statuses.items()
            if status.startswith("5")
        ),
        problems,
        operations,
        told["schemathesis_version"],
        round(told["running_time"], 1),
    )


def _operations(described: Path) -> Iterator[str]:
    for path, item in msgspec.json.decode(described.read_bytes())["paths"].items():
        for method in item.keys() & METHODS:
            yield f"{method.upper()} {path}"


def _answers(events: Path) -> Iterator[tuple[str, str]]:
    """Operation and status of every case."""
    for line in events.read_bytes().splitlines():
        scenario = msgspec.json.decode(line).get("ScenarioFinished")
        recorder = scenario["recorder"] if scenario else {}
        cases = recorder.get("cases", {})
        for key, interaction in recorder.get("interactions", {}).items():
            case = cases[key]["value"]
            response = interaction.get("response")
            status = str(response["status_code"]) if response else "none"
            yield f"{case['method']} {case['path']}", status


def main(argv: list[str]) -> int:
    """Returns the exit status: 0 where nothing was found, in as many cases as asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="per operation")
    parser.add_argument("--at-least", type=int, default=AT_LEAST, metavar="CASES")
    parser.add_argument("--seed", type=int, help="to have the requests of an earlier run again")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome there")
    args = parser.parse_args(argv)
    seed = secrets.randbits(32) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="hotswap-fuzz-") as name:
        folder = Path(name)
        with running_api(folder) as url:
            report = fuzz(url, folder, args.examples, seed, deterministic=False)
    for problem in report.problems:
        print(problem)
    for label, one in report.operations.items():
        statuses = ", ".join(f"{status}: {n}" for status, n in sorted(one.statuses.items()))
        print(f"{one.cases:>6}  {label:<34} {statuses}")
    if args.json:
        args.json.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    words = f"{report.cases} cases (at least {args.at_least}), {report.server_errors} server errors"
    found = len(report.problems)
    print(f"{words}, {'nothing else found' if not found else 'PROBLEMS, see above'}", flush=True)
    return int(bool(found or report.server_errors or report.cases < args.at_least))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
