"""`malmen eval`: score a model on facts, with its base beside it."""

from __future__ import annotations

import gc
import json as jsonlib
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from malmen_cli.cli import options
from malmen_cli.cli.console import Console
from malmen_cli.exceptions import CheckpointError, OutputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from malmen_cli.base.model import Base
    from malmen_cli.facts.fact import Fact
    from malmen_cli.scoring.protocols import Answers
    from malmen_cli.scoring.report import Report

_GATES = "Gates"
_GATE_FAILED = 1


def _minimum(name: str, what: str) -> Any:
    said = f"Exit 1 unless {what} reaches X."
    return typer.Option(f"--min-{name}", metavar="X", min=0.0, max=1.0, help=said, rich_help_panel=_GATES)


@dataclass(frozen=True)
class _Pair:
    """What is compared. delta: MODEL is a delta on `base`. note: what the user should know about the choice."""

    model: str
    base: str
    model_revision: str | None = None
    base_revision: str | None = None
    delta: bool = False
    note: str | None = None


@dataclass(frozen=True)
class _Run:
    """How models are loaded and asked."""

    console: Console
    loading: dict[str, Any]
    batch_size: int
    greedy: bool

    def load(self, name: str, revision: str | None) -> Base:
        from malmen_cli.base.model import load_base

        return load_base(name, revision=revision, **self.loading)

    def ask(self, base: Base, facts: Sequence[Fact], who: str) -> Answers:
        from malmen_cli.scoring.protocols import collect

        with self.console.progress(f"asking {who}") as progress:
            return collect(base, facts, batch_size=self.batch_size, greedy=self.greedy, progress=progress.report)


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="The edited model: a hub id, a folder, a .gguf file, an alias, or a delta folder.",
            show_default=False,
        ),
    ],
    facts: options.Facts,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="BASE",
            help="The model before the edit; by default the one that malmen.json in MODEL names.",
            show_default=False,
        ),
    ] = None,
    min_es: Annotated[float | None, _minimum("es", "edit success")] = None,
    min_gs: Annotated[float | None, _minimum("gs", "generalisation success")] = None,
    min_ls: Annotated[float | None, _minimum("ls", "locality success")] = None,
    min_ps: Annotated[float | None, _minimum("ps", "portability success")] = None,
    min_score: Annotated[float | None, _minimum("score", "the score")] = None,
    gate_protocol: Annotated[
        Literal["both", "teacher_forced", "greedy"],
        typer.Option("--gate-protocol", help="What gates look at; both: the lower of the two.", rich_help_panel=_GATES),
    ] = "both",
    per_fact: Annotated[
        Path | None,
        typer.Option("--per-fact", metavar="FILE", help="Write one JSON line a question.", show_default=False),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw base beside edited: .png, .svg, .pdf.", show_default=False),
    ] = None,
    no_greedy: Annotated[
        bool, typer.Option("--no-greedy", help="Leave the greedy protocol out: faster, and a milder judge.")
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option("--limit", metavar="N", min=1, help="Score the first N facts only.", show_default=False),
    ] = None,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    batch_size: options.BatchSize = 64,
    seed: options.Seed = 0,
    trust_remote_code: options.TrustRemoteCode = False,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    json: options.Json = False,
) -> None:
    """Did it learn (ES), does it hold in other words (GS), did nothing else change (LS)?

    Each under two protocols: teacher_forced (given the gold prefix) and greedy (from the prompt alone).

    Examples:
      malmen eval edited/ facts.yaml --min-es 0.95 --min-ls 0.8
      malmen eval delta/ facts.yaml --base gpt2 --per-fact answers.jsonl --plot scores.png
      malmen eval edited/ held-out.jsonl --json | jq .after.score
    """
    started = time.monotonic()
    minima = {"es": min_es, "gs": min_gs, "ls": min_ls, "ps": min_ps, "score": min_score}
    _check_gates_measurable(minima, gate_protocol, greedy=not no_greedy)
    _check_files(per_fact, plot, force)
    console = Console(quiet=quiet, verbose=verbose, json=json)
    chosen = _read(facts, limit)
    pair = _pair(model, base, revision)
    folder = _model_folder(pair, console)
    if dry_run:
        _dry_run(console, pair, chosen)
        return
    loading = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    report = _score(_Run(console, loading, batch_size, not no_greedy), pair, folder, chosen, seed)
    _publish(console, report, pair, minima, gate_protocol, per_fact, plot, started)


def _publish(
    console: Console,
    report: Report,
    pair: _Pair,
    minima: dict[str, float | None],
    protocol: str,
    per_fact: Path | None,
    plot: Path | None,
    started: float,
) -> None:
    """Table, files and document; then exit 1 if a gate is not met."""
    from malmen_cli.artifact.atomic import write_file
    from malmen_cli.scoring.report import check_gates, table

    gates = check_gates(report, minima, protocol=protocol)
    console.table(table(report))
    if per_fact is not None:
        lines = [jsonlib.dumps(record, ensure_ascii=False) + "\n" for record in report.per_fact()]
        write_file(per_fact, "".join(lines).encode())
    if plot is not None:
        from malmen_cli.scoring.plot import eval_plot, plot_format

        write_file(plot, eval_plot(report, plot_format(plot)))
    seconds = time.monotonic() - started
    console.document(report.to_json(model=pair.model, base=pair.base, gates=gates, seconds=seconds))
    failed = [gate for gate in gates if not gate.passed]
    for gate in failed:
        console.error(f"malmen: gate not met: {gate}")
    if failed:
        raise typer.Exit(_GATE_FAILED)


def _dry_run(console: Console, pair: _Pair, facts: Sequence[Fact]) -> None:
    from malmen_cli.scoring.protocols import asked_of

    console.note(f"would score {pair.model} against {pair.base} on {len(facts)} facts" + _said(pair.note))
    questions = sum(1 for fact in facts for _ in asked_of(fact))
    planned = {"schema": 1, "dry_run": True, "model": pair.model, "base": pair.base}
    console.document(planned | {"facts": len(facts), "questions": questions})


def _model_folder(pair: _Pair, console: Console) -> Path:
    """Where MODEL lies. Both sides are looked for, so that one that is no use is refused before the other is asked."""
    from malmen_cli.artifact.manifest import MANIFEST, check_base, read_sealed
    from malmen_cli.base.locate import locate
    from malmen_cli.base.weights import fingerprint

    base = locate(pair.base, revision=pair.base_revision, note=console.note).folder
    if pair.delta:
        folder = Path(pair.model)
        check_base(folder, read_sealed(folder / MANIFEST), fingerprint(base))
        return folder
    if (pair.model, pair.model_revision) == (pair.base, pair.base_revision):
        return base
    return locate(pair.model, revision=pair.model_revision, note=console.note).folder


def _score(run: _Run, pair: _Pair, folder: Path, facts: Sequence[Fact], seed: int) -> Report:
    """Ask the base, let go of it, ask the model: never two models in memory."""
    from malmen_cli.scoring.report import summarise

    base = run.load(pair.base, pair.base_revision)
    base_folder, fingerprint = base.folder, base.fingerprint
    shift = None
    if pair.delta:
        from malmen_cli.artifact.delta import read_delta

        shift, _ = read_delta(folder, fingerprint=fingerprint)  # refused before anything long is run
    before = run.ask(base, facts, "the base")
    if shift is not None:
        from malmen_cli.editing.shift import applied

        with applied(base.model, shift):
            after = run.ask(base, facts, "the edited model")
    elif folder == base_folder:
        after = before  # one model on both sides: its answers are the same
    else:
        del base
        gc.collect()
        after = run.ask(run.load(pair.model, pair.model_revision), facts, "the edited model")
    report = summarise(facts, before, after, seed=seed)
    return replace(report, notes=(*report.notes, pair.note)) if pair.note else report


def _pair(model: str, base: str | None, revision: str | None) -> _Pair:
    """Which base goes with MODEL. A --revision is MODEL's, but the base's where MODEL is a folder."""
    from malmen_cli.artifact.delta import is_delta
    from malmen_cli.artifact.manifest import MANIFEST, read_sealed

    local = Path(model).is_dir()
    if local and is_delta(Path(model)):
        if base is not None:
            return _Pair(model, base, None, revision, delta=True)
        name, recorded = _named_base(read_sealed(Path(model) / MANIFEST))
        if name is None:
            raise CheckpointError(f"{model}: a delta that does not name its base; give it with --base")
        return _Pair(model, name, None, revision or recorded, delta=True)
    if base is not None:
        return _Pair(model, base, None, revision) if local else _Pair(model, base, revision, None)
    if not (local and (Path(model) / MANIFEST).is_file()):
        note = "no --base: the model is compared with itself, so LS is 1 whatever was edited"
        return _Pair(model, model, revision, revision, note=note)
    return _recorded_pair(model, read_sealed(Path(model) / MANIFEST), revision)


def _recorded_pair(model: str, manifest: dict[str, Any], revision: str | None) -> _Pair:
    """A merged folder beside the base its manifest names, if those very weights can be found."""
    from malmen_cli.artifact.manifest import base_fingerprint
    from malmen_cli.base.locate import locate
    from malmen_cli.base.weights import fingerprint

    name, recorded = _named_base(manifest)
    revision = revision or recorded
    itself = "the model is compared with itself, so LS is 1 whatever was edited; give --base"
    if name is None:
        return _Pair(model, model, note=f"malmen.json names no base: {itself}")
    try:
        same = fingerprint(locate(name, revision=revision).folder) == base_fingerprint(manifest)
    except CheckpointError:
        return _Pair(model, model, note=f"its base {name} cannot be found: {itself}")
    if not same:
        return _Pair(model, model, note=f"{name} is not the base it was made from: {itself}")
    return _Pair(model, name, None, revision)


def _named_base(manifest: dict[str, Any]) -> tuple[str | None, str | None]:
    recorded = manifest.get("base")
    if not isinstance(recorded, dict) or not isinstance(recorded.get("name"), str):
        return None, None
    revision = recorded.get("revision")
    return recorded["name"], revision if isinstance(revision, str) else None


def _read(source: str, limit: int | None) -> tuple[Fact, ...]:
    from malmen_cli.facts.files import read_facts

    return read_facts(source, stdin=sys.stdin.buffer).facts[:limit]


def _check_gates_measurable(minima: dict[str, float | None], protocol: str, *, greedy: bool) -> None:
    """A gate that --no-greedy would quietly make milder is a contradiction."""
    if greedy:
        return
    if minima["score"] is not None:
        raise typer.BadParameter("--min-score needs the greedy figures; leave --no-greedy out")
    if protocol != "teacher_forced" and any(least is not None for least in minima.values()):
        raise typer.BadParameter("with --no-greedy, gates need --gate-protocol teacher_forced")


def _check_files(per_fact: Path | None, plot: Path | None, force: bool) -> None:
    """Files that cannot be written, or a picture that cannot be drawn, are refused before anything is asked."""
    for option, file in {"--per-fact": per_fact, "--plot": plot}.items():
        if file is None:
            continue
        if file.is_dir() or not file.absolute().parent.is_dir():
            raise OutputError(f"{file}: not a file in an existing folder; name another with {option}")
        if file.exists() and not force:
            raise OutputError(f"{file}: already there; use --force to replace it, or name another file")
    if plot is not None:
        from malmen_cli.scoring.plot import plot_format

        plot_format(plot)


def _said(note: str | None) -> str:
    return f" ({note})" if note else ""
