"""`hotswap trace`: span files in, trees out."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from services.ops.trace_view import read_spans, show, trees
from services.settings import SettingsError

TRACE = "5ce0e9a56015fec5aadfa328ae398115"


def span(
    name: str,
    span_id: str,
    parent_id: str | None,
    at: tuple[float, float],
    trace_id: str = TRACE,
    **attributes: Any,
) -> dict[str, Any]:
    """One line of a span file. ``at``: start and end, in seconds of 2026."""
    start, end = (datetime.fromtimestamp(1_767_225_600 + t, UTC).isoformat() for t in at)
    return {
        "name": name,
        "context": {"trace_id": f"0x{trace_id}", "span_id": f"0x{span_id}"},
        "parent_id": f"0x{parent_id}" if parent_id else None,
        "start_time": start.replace("+00:00", "Z"),
        "end_time": end.replace("+00:00", "Z"),
        "attributes": {f"hotswap.{key}": value for key, value in attributes.items()},
    }


def write(folder: Path, service: str, *spans: dict[str, Any]) -> None:
    resource = {"attributes": {"service.name": f"hotswap-{service}"}}
    lines = [json.dumps({**one, "resource": resource}) for one in spans]
    (folder / f"{service}.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One request that waited for a switch."""
    write(
        tmp_path,
        "agent-gpu0",
        span("agent.swap_in", "d", "b", (0.2, 0.3), gb_per_s=12.3456, num_bytes=4096),
        span("agent.swap_out", "c", "b", (0.1, 0.2)),
        span("request.decode", "e", "a", (0.3, 0.5)),
    )
    write(tmp_path, "api", span("POST /v1/completions", "a", None, (0.0, 0.5), model="[m]"))
    write(tmp_path, "scheduler", span("scheduler.switch", "b", "a", (0.1, 0.3)))
    return tmp_path


def test_spans_of_all_services_make_one_tree(folder: Path) -> None:
    ((trace_id, (root,)),) = trees(read_spans(folder)).items()
    assert trace_id == TRACE
    assert (root.name, root.service) == ("POST /v1/completions", "hotswap-api")
    assert [child.name for child in root.children] == ["scheduler.switch", "request.decode"]
    switch = root.children[0]
    assert [child.name for child in switch.children] == ["agent.swap_out", "agent.swap_in"]
    assert switch.end - switch.start == pytest.approx(0.2)


def test_the_tree_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(folder, TRACE[:6], last=1)
    out = capsys.readouterr().out
    assert TRACE in out
    names = ["POST", "scheduler.switch", "agent.swap_out", "agent.swap_in", "request.decode"]
    places = [out.index(name) for name in names]
    assert places == sorted(places)
    assert "gb_per_s=12.35" in out
    assert "100.0 ms" in out
    assert "[m]" in out  # no markup of ours
    assert "missing" not in out


def test_a_missing_parent_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "scheduler.jsonl").unlink()
    show(folder, None, last=1)
    out = capsys.readouterr().out
    assert out.count("span b is missing") == 1
    assert out.index("span b is missing") < out.index("agent.swap_out") < out.index("agent.swap_in")


def test_the_newest_requests(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    later = [
        span("POST /v1/completions", f"f{n}", None, (n, n + 0.1), trace_id=f"{n}" * 32)
        for n in (3, 2)
    ]
    idle = span("agent.load", "9", None, (9.0, 9.1), trace_id="9" * 32)
    write(folder, "api-2", *later, idle)
    show(folder, None, last=2)
    out = capsys.readouterr().out
    assert "3" * 32 in out
    assert "2" * 32 in out
    assert TRACE not in out
    assert "9" * 32 not in out  # no request


def test_lines_still_being_written_are_left_out(folder: Path) -> None:
    with (folder / "api.jsonl").open("a") as out:
        out.write('{"name": "POST')
    assert len(read_spans(folder)) == 5


@pytest.mark.parametrize(("trace_id", "says"), [(None, "no traced request"), ("ff", "no trace ff")])
def test_nothing_there(tmp_path: Path, trace_id: str | None, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        show(tmp_path / "spans", trace_id, last=1)
