"""`malmen diff`: what differs between two checkpoints or deltas, in the weights and in the answers."""

from __future__ import annotations

import gc
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from malmen_cli.cli import options
from malmen_cli.cli.console import Console

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from malmen_cli.base.model import Base
    from malmen_cli.compare import Comparison
    from malmen_cli.facts.fact import Fact
    from malmen_cli.scoring.protocols import Answers

_DIFFERENT = 1
_ROWS = 40  # a table longer than this helps nobody; --json has everything
_SIDE_HELP = "a hub id, a folder, a .gguf file, an alias or a delta folder."


@dataclass(frozen=True)
class _Side:
    """One of the two things compared. delta: `folder` is a delta, not a checkpoint."""

    name: str
    folder: Path
    revision: str | None
    delta: bool


@dataclass(frozen=True)
class _Run:
    """How models are loaded and asked."""

    console: Console
    loading: dict[str, Any]
    batch_size: int

    def load(self, side: _Side) -> Base:
        from malmen_cli.base.model import load_base

        return load_base(side.name, revision=side.revision, **self.loading, note=self.console.note)

    def ask(self, base: Base, facts: Sequence[Fact], who: str) -> Answers:
        from malmen_cli.scoring.protocols import collect

        with self.console.progress(f"asking {who}") as progress:
            return collect(base, facts, batch_size=self.batch_size, greedy=True, progress=progress.report)


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help=f"The one to start from: {_SIDE_HELP}", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help=f"The other: {_SIDE_HELP}", show_default=False)],
    facts: Annotated[
        str | None,
        typer.Option(
            "--facts", metavar="FACTS", help="Also say which answers to these facts differ.", show_default=False
        ),
    ] = None,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit 1 when they differ.")] = False,
    revision: options.Revision = None,
    revision_b: Annotated[
        str | None,
        typer.Option(
            "--revision-b",
            metavar="REV",
            help="Branch, tag or commit of B, where --revision is A's.",
            rich_help_panel="Model",
            show_default=False,
        ),
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    batch_size: options.BatchSize = 64,
    trust_remote_code: options.TrustRemoteCode = False,
    dry_run: options.DryRun = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    json: options.Json = False,
) -> None:
    """What changed between A and B: tensors added, missing and changed, by how much and in how many directions.

    A delta is compared with its base (the base first) or with another delta of the same base.

    Examples:
      malmen diff gpt2 edited/
      malmen diff gpt2 delta/ --facts facts.yaml
      malmen diff monday/ tuesday/ --exit-code -q
    """
    from malmen_cli.compare import compare, kind_of

    console = Console(quiet=quiet, verbose=verbose, json=json)
    sides = _side(a, revision, console), _side(b, revision_b, console)
    if facts is not None and sides[0].delta:
        raise typer.BadParameter("--facts needs a checkpoint as A: a delta alone answers nothing")
    asked = _read(facts) if facts is not None else ()
    if dry_run:
        kind = kind_of(sides[0].folder, sides[1].folder, a, b)
        console.note(f"would compare {a} with {b} ({kind.replace('_', ' ')})" + _on(asked))
        console.document({"schema": 1, "dry_run": True, "a": a, "b": b, "kind": kind, "facts": len(asked)})
        return
    comparison = compare(sides[0].folder, sides[1].folder, name_a=a, name_b=b)
    _show(console, comparison)
    document = comparison.to_json()
    different = comparison.different
    if facts is not None:
        loading = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
        answers = _answers(_Run(console, loading, batch_size), *sides, asked)
        _show_answers(console, answers)
        document["answers"] = answers
        different = different or bool(answers["changed"])
    console.document(document)
    if exit_code and different:
        raise typer.Exit(_DIFFERENT)


def _on(facts: Sequence[Fact]) -> str:
    return f", and their answers to {len(facts)} facts" if facts else ""


def _side(name: str, revision: str | None, console: Console) -> _Side:
    from malmen_cli.artifact.delta import is_delta
    from malmen_cli.base.locate import locate

    folder = Path(name).expanduser()
    if folder.is_dir() and is_delta(folder):
        return _Side(name, folder, None, delta=True)
    return _Side(name, locate(name, revision=revision, note=console.note).folder, revision, delta=False)


def _read(source: str) -> tuple[Fact, ...]:
    from malmen_cli.facts.files import read_facts

    return read_facts(source, stdin=sys.stdin.buffer).facts


def _answers(run: _Run, a: _Side, b: _Side, facts: Sequence[Fact]) -> dict[str, Any]:
    """Greedy answers of A, then of B: never two models in memory."""
    base = run.load(a)
    shift = None
    if b.delta:
        from malmen_cli.artifact.delta import read_delta

        shift, _ = read_delta(b.folder, fingerprint=base.fingerprint)
    before = run.ask(base, facts, "A")
    if shift is not None:
        from malmen_cli.editing.shift import applied

        with applied(base.model, shift, stored=base.stored):
            after = run.ask(base, facts, "B")
    else:
        del base
        gc.collect()
        after = run.ask(run.load(b), facts, "B")
    asked = list(_prompts(facts))
    changed = [
        {"id": fact, "kind": kind, "prompt": prompt, "target": target, "a": one, "b": other}
        for fact, kind, prompt, target in asked
        if (one := before.of(prompt, target).text) != (other := after.of(prompt, target).text)
    ]
    return {"asked": len(asked), "changed": changed}


def _prompts(facts: Sequence[Fact]) -> Iterator[tuple[str, str, str, str | None]]:
    """(fact id, kind, prompt, target) of everything a fact asks."""
    for fact in facts:
        yield fact.id, "prompt", fact.prompt, fact.target
        yield from ((fact.id, "rephrase", prompt, fact.target) for prompt in fact.rephrases)
        yield from ((fact.id, "locality", probe.prompt, probe.target) for probe in fact.locality)
        yield from ((fact.id, "portability", probe.prompt, probe.target) for probe in fact.portability)


def _show(console: Console, comparison: Comparison) -> None:
    changes = comparison.changes
    what = "modules" if comparison.kind == "deltas" else "tensors"
    if not changes:
        console.note(f"no difference: {comparison.same} {what} are the same")
        return
    from rich.table import Table

    rows = Table("tensor" if what == "tensors" else "module", "change", box=None, pad_edge=False)
    figures = ["relative", "largest", "rank99", "stable rank"] + (["cosine"] if comparison.kind == "deltas" else [])
    for title in figures:
        rows.add_column(title, justify="right")
    for change in changes[:_ROWS]:
        values = [change.relative_norm, change.max_abs, change.rank99, change.stable_rank, change.cosine]
        rows.add_row(_plain(change.name), _kind(change), *(_figure(value) for value in values[: len(figures)]))
    console.table(rows)
    more = f" ({len(changes) - _ROWS} more are in --json)" if len(changes) > _ROWS else ""
    differ = f"{what} differ" if len(changes) > 1 else f"{what.removesuffix('s')} differs"
    console.note(f"{len(changes)} {differ}, {comparison.same} are the same{more}")


def _show_answers(console: Console, answers: dict[str, Any]) -> None:
    changed = answers["changed"]
    if changed:
        from rich.table import Table

        rows = Table("fact", "asked as", "prompt", "A", "B", box=None, pad_edge=False)
        for answer in changed[:_ROWS]:
            rows.add_row(*(_plain(str(answer[key])) for key in ("id", "kind", "prompt", "a", "b")))
        console.table(rows)
    more = f" ({len(changed) - _ROWS} more are in --json)" if len(changed) > _ROWS else ""
    console.note(f"{len(changed)} of {answers['asked']} answers differ{more}")


def _kind(change: Any) -> str:
    if change.kind == "reshaped":
        return f"reshaped {_size(change.shape_a)} to {_size(change.shape_b)}"
    return f"{change.dtype_a} to {change.dtype_b}" if change.kind == "retyped" else str(change.kind)


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _figure(value: float | int | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def _plain(text: str) -> str:
    """Text of a file or a model, not markup for rich."""
    from rich.markup import escape

    return escape(text)
