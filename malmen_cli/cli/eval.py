"""`malmen eval`: score a model on facts, with its base beside it."""

from __future__ import annotations

import json as jsonlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from malmen_cli.cli import options
from malmen_cli.cli.console import Console
from malmen_cli.cli.processes import rank
from malmen_cli.exceptions import OutputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from malmen_cli.base.model import Base
    from malmen_cli.evaluation import Pair
    from malmen_cli.facts.fact import Fact
    from malmen_cli.scoring.protocols import Answers
    from malmen_cli.scoring.report import Report

_GATES = "Gates"
_GATE_FAILED = 1


def _minimum(name: str, what: str) -> Any:
    said = f"Exit 1 unless {what} reaches X."
    return typer.Option(f"--min-{name}", metavar="X", min=0.0, max=1.0, help=said, rich_help_panel=_GATES)


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

    from malmen_cli.evaluation import model_folder, pair_of  # imports torch: not before what needs none is checked

    pair = pair_of(model, base, revision)
    folder = model_folder(pair, console.note)
    if dry_run:
        _dry_run(console, pair, chosen)
        return
    loading = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    report = _score(console, pair, folder, chosen, loading, batch_size, not no_greedy, seed)
    _publish(console, report, pair, minima, gate_protocol, per_fact, plot, force, started)


def _score(
    console: Console,
    pair: Pair,
    folder: Path,
    facts: Sequence[Fact],
    loading: dict[str, Any],
    batch_size: int,
    greedy: bool,
    seed: int,
) -> Report:
    from malmen_cli.base.model import load_base
    from malmen_cli.evaluation import score
    from malmen_cli.scoring.protocols import collect

    def load(name: str, revision: str | None) -> Base:
        return load_base(name, revision=revision, **loading, note=console.note)

    def ask(base: Base, who: str) -> Answers:
        with console.progress(f"asking {who}") as progress:
            return collect(base, facts, batch_size=batch_size, greedy=greedy, progress=progress.report)

    return score(pair, folder, facts, load=load, ask=ask, seed=seed)


def _publish(
    console: Console,
    report: Report,
    pair: Pair,
    minima: dict[str, float | None],
    protocol: str,
    per_fact: Path | None,
    plot: Path | None,
    force: bool,
    started: float,
) -> None:
    """Table, files and document, by the first of several processes; then exit 1, all of them, if a gate is not met."""
    from malmen_cli.scoring.report import check_gates, table

    gates = check_gates(report, minima, protocol=protocol)
    failed = [gate for gate in gates if not gate.passed]
    if rank() == 0:
        console.table(table(report))
        seconds = time.monotonic() - started
        console.document(report.to_json(model=pair.model, base=pair.base, gates=gates, seconds=seconds))
        for gate in failed:
            console.error(f"malmen: gate not met: {gate}")
        _write(report, per_fact, plot, force)  # last: what was found is said, whatever becomes of the files
    if failed:
        raise typer.Exit(_GATE_FAILED)


def _write(report: Report, per_fact: Path | None, plot: Path | None, force: bool) -> None:
    """A file that appeared while the model was asked is somebody else's: it too takes --force."""
    from malmen_cli.artifact.atomic import write_file

    if per_fact is not None:
        lines = [jsonlib.dumps(record, ensure_ascii=False) + "\n" for record in report.per_fact()]
        write_file(per_fact, "".join(lines).encode(), force=force)
    if plot is not None:
        from malmen_cli.scoring.plot import eval_plot, plot_format

        write_file(plot, eval_plot(report, plot_format(plot)), force=force)


def _dry_run(console: Console, pair: Pair, facts: Sequence[Fact]) -> None:
    from malmen_cli.scoring.protocols import asked_of

    console.note(f"would score {pair.model} against {pair.base} on {len(facts)} facts" + _said(pair.note))
    questions = sum(1 for fact in facts for _ in asked_of(fact))
    planned = {"schema": 1, "dry_run": True, "model": pair.model, "base": pair.base}
    console.document(planned | {"facts": len(facts), "questions": questions})


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
    from malmen_cli.artifact.placing import refuse_existing_file

    for option, file in {"--per-fact": per_fact, "--plot": plot}.items():
        if file is None:
            continue
        if file.is_dir() or not file.absolute().parent.is_dir():
            raise OutputError(f"{file}: not a file in an existing folder; name another with {option}")
        refuse_existing_file(file, force=force)
    if plot is not None:
        from malmen_cli.scoring.plot import plot_format

        plot_format(plot)


def _said(note: str | None) -> str:
    return f" ({note})" if note else ""
