"""`hotswap trace`: the span files of all services, joined into one tree per request."""

import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.tree import Tree

from services.settings import SettingsError


@dataclass
class Span:
    """One span. ``start`` and ``end`` are unix seconds."""

    trace_id: str
    span_id: str
    parent_id: str | None
    name: str
    service: str
    start: float
    end: float
    attributes: dict[str, str | int | float]
    children: list["Span"] = field(default_factory=list)


def read_spans(folder: Path) -> list[Span]:
    """Every span in ``folder``; a line still being written is left out."""
    spans = []
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            try:
                spans.append(_parse(json.loads(line)))
            except (ValueError, KeyError):
                continue
    return spans


def _parse(raw: dict) -> Span:  # type: ignore[type-arg]
    return Span(
        trace_id=raw["context"]["trace_id"].removeprefix("0x"),
        span_id=raw["context"]["span_id"],
        parent_id=raw["parent_id"],
        name=raw["name"],
        service=raw["resource"]["attributes"]["service.name"],
        start=datetime.fromisoformat(raw["start_time"]).timestamp(),
        end=datetime.fromisoformat(raw["end_time"]).timestamp(),
        attributes=raw["attributes"],
    )


def trees(spans: list[Span]) -> dict[str, list[Span]]:
    """Root spans by trace id, oldest trace first; children sorted by start."""
    by_id = {span.span_id: span for span in spans}
    roots: dict[str, list[Span]] = {}
    for span in sorted(spans, key=lambda s: s.start):
        parent = by_id.get(span.parent_id or "")
        if parent:
            parent.children.append(span)
        else:
            roots.setdefault(span.trace_id, []).append(span)
    return roots


def show(folder: Path, trace_id: str | None, last: int) -> None:
    """Print one trace, or the ``last`` newest ones. Raises SettingsError where there is none."""
    all_trees = trees(read_spans(folder))
    if trace_id:
        wanted = {tid: t for tid, t in all_trees.items() if tid.startswith(trace_id)}
    else:
        requests = [tid for tid, roots in all_trees.items() if _is_request(roots)]
        wanted = {tid: all_trees[tid] for tid in requests[-last:]}
    if not wanted:
        what = f"trace {trace_id}" if trace_id else "traced request"
        raise SettingsError(
            f"no {what} in {folder}. Spans appear there within a second, "
            "while telemetry.span_files is on"
        )
    console = Console()
    for tid, roots in wanted.items():
        start = min(root.start for root in roots)
        tree = Tree(f"[bold]trace {tid}[/bold]")
        missing: dict[str, Tree] = {}
        for root in roots:
            _grow(_below(tree, root.parent_id, missing), root, start, {})
        console.print(tree)


def _below(tree: Tree, parent_id: str | None, missing: dict[str, Tree]) -> Tree:
    """Where a root belongs: a parent that is in no file gets a line that says so."""
    if not parent_id:
        return tree
    if parent_id not in missing:
        missing[parent_id] = tree.add(
            f"[yellow]span {parent_id.removeprefix('0x')} is missing[/yellow]: it is the "
            "client's own, has not ended yet, or its service writes no span file here"
        )
    return missing[parent_id]


def _is_request(roots: list[Span]) -> bool:
    return any(root.name.startswith("POST ") for root in roots)


def _grow(tree: Tree, span: Span, start: float, said: dict[str, str | int | float]) -> None:
    """Add ``span`` and those below it. ``said``: attributes that a line above shows already."""
    facts = [
        f"{key.removeprefix('hotswap.')}={_short(value)}"
        for key, value in span.attributes.items()
        if key.startswith("hotswap.") and value not in ("", 0, 0.0) and said.get(key) != value
    ]
    notes = [span.service, ", ".join(facts)] if facts else [span.service]
    branch = tree.add(
        f"{escape(span.name)}  [green]{(span.end - span.start) * 1e3:.1f} ms[/green]"
        f"  [dim]at +{(span.start - start) * 1e3:.1f} ms, {escape('; '.join(notes))}[/dim]"
    )
    for child in span.children:
        _grow(branch, child, start, {**said, **span.attributes})


def _short(value: str | int | float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
