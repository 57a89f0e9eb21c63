"""`malmen train-editor`: meta-train the hyper-network once, so that apply edits better from then on."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from malmen_cli.cli import options
from malmen_cli.cli.console import Console
from malmen_cli.cli.console import Progress as Bar
from malmen_cli.cli.processes import rank

if TYPE_CHECKING:
    from malmen_cli.base.model import Base
    from malmen_cli.editing.spec import Spec
    from malmen_cli.facts.fact import Fact
    from malmen_cli.training.history import Progress
    from malmen_cli.training.session import Order, Trained
    from malmen_cli.training.settings import TrainingSettings

_MINUTES_FROM = 120.0  # seconds left that are told in minutes


def train_editor(
    base: options.Base,
    facts: Annotated[
        list[str],
        typer.Argument(
            metavar="FACTS...",
            help="One or more files of facts with rephrases and locality probes.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="The editor's folder; by default only the installed copy is kept.",
            show_default=False,
        ),
    ] = None,
    valid: Annotated[
        str | None,
        typer.Option(
            "--valid",
            metavar="FACTS",
            help="Facts to choose the best step on; by default a part held out by subject.",
            show_default=False,
        ),
    ] = None,
    spec: Annotated[
        Path | None,
        typer.Option("--spec", metavar="FILE", help="Settings in YAML (see edit_specs/).", show_default=False),
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", metavar="NAME", help="malmen (the default) or mend.", show_default=False)
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", metavar="N", min=1, help="Training steps.", show_default=False)
    ] = None,
    facts_per_step: Annotated[
        str | None,
        typer.Option(
            "--facts-per-step",
            metavar="N[,M]",
            help="Facts edited at once; two numbers draw between them.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an unfinished training; ends in the same bits.")
    ] = False,
    no_install: Annotated[
        bool, typer.Option("--no-install", help="Do not install the editor where apply looks for it.")
    ] = False,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    batch_size: options.BatchSize = 64,
    max_memory: options.MaxMemory = None,
    seed: options.Seed = 0,
    trust_remote_code: options.TrustRemoteCode = False,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    json: options.Json = False,
) -> None:
    """Train an editor for one base, once. apply then uses it for every file of facts.

    Every so many steps the editor is validated and its state kept beside the output; a run that was stopped or killed
    goes on with --resume. The best editor by validation score is the one that is saved.

    Examples:
      malmen train-editor smollm2-135m train.jsonl --valid val.jsonl --facts-per-step 64,512
      malmen train-editor ./model a.jsonl b.jsonl -o editor/ --steps 1000
      malmen train-editor ./model a.jsonl b.jsonl -o editor/ --steps 1000 --resume
    """
    from malmen_cli.artifact.editors import find_editor, install_editor
    from malmen_cli.artifact.output import check_output
    from malmen_cli.base.locate import locate
    from malmen_cli.base.model import load_base
    from malmen_cli.editing.spec import read_editor_spec
    from malmen_cli.training.session import Order, train, unfinished

    if out is None and no_install:
        raise typer.BadParameter("--no-install needs -o DIR: the editor would be nowhere")
    console = Console(quiet=quiet, verbose=verbose, json=json)
    chosen = read_editor_spec(spec, method=method)
    training = _training(chosen, steps, facts_per_step)
    train_facts, valid_facts = _facts(console, facts, valid, training, seed)
    from_files = {"sources": facts, "valid_sources": [valid] if valid is not None else facts}
    order = Order(chosen, training, train_facts, valid_facts, seed, batch_size, **from_files)
    folder = locate(base, revision=revision, note=console.note).folder
    loaded = load_base(
        base, revision=revision, device=device, dtype=dtype, trust_remote_code=trust_remote_code, note=console.note
    )
    place = out or _own_place(loaded, chosen.method)
    resuming = resume and unfinished(place)
    places = [place] if out is not None else [place, find_editor(loaded.fingerprint)]
    trained = _done(console, loaded, order, places) if resume and not resuming else None
    if trained is None:
        check_output(place, base_folder=folder, force=force or resuming or out is None)
    if dry_run:
        if trained is None:
            _dry_run(console, loaded, order, place)
        else:
            console.document({"schema": 1, "output": str(trained.folder), "editor": trained.description})
        return
    if trained is None:
        with console.progress("training", training.steps) as bar:
            trained = train(
                loaded,
                order,
                place,
                resume=resume,
                force=force,
                replace=out is None,
                memory=max_memory,
                note=console.note,
                report=_Reporter(console, bar, training.steps),
            )
    if rank() > 0:
        return
    if not no_install and trained.folder == place:  # else it is installed already
        _warn_replaced(console, loaded, chosen.method)
        installed = install_editor(place, loaded.fingerprint)
        console.note(f"installed for {base}: {installed}")
        if out is None:
            shutil.rmtree(place, ignore_errors=True)
            trained = replace(trained, folder=installed)
    said, place = trained.description, trained.folder
    console.note(f"editor in {place}: best at step {said['best_step']}, score {said['scores']['score']:.3f}")
    console.document({"schema": 1, "output": str(place), "editor": said})


class _Reporter:
    """Prints a training as it goes: a bar of steps, and a line at every validation."""

    def __init__(self, console: Console, bar: Bar, steps: int) -> None:
        self._console, self._bar, self._steps = console, bar, steps
        self._started, self._first = 0.0, 0
        self._facts = 0

    def __call__(self, progress: Progress) -> None:
        if not self._first:  # the time left is that of steps, not of what came before them
            self._started, self._first = time.monotonic() - progress.seconds, progress.step
        self._facts += progress.facts
        gone = max(time.monotonic() - self._started, 1e-6)
        done = progress.step - self._first + 1
        rate, left = self._facts / gone, gone / done * (self._steps - progress.step)
        said = f"loss {progress.learned:.3f} moved {progress.moved:.3f}  {rate:.0f} facts/s  {_duration(left)} left"
        self._bar.update(said)
        self._bar.report(progress.step, self._steps)
        if progress.validation is not None:
            self._console.note(f"step {progress.step}/{self._steps}  {said}  {progress.validation}")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < _MINUTES_FROM else f"{seconds / 60:.0f} min"


def _training(spec: Spec, steps: int | None, facts_per_step: str | None) -> TrainingSettings:
    from malmen_cli.editing.settings import from_mapping
    from malmen_cli.exceptions import SpecError
    from malmen_cli.training.settings import TrainingSettings

    settings = from_mapping(TrainingSettings, spec.training, f"{spec.source}: training")
    if steps is not None:
        settings = replace(settings, steps=steps)
    if facts_per_step is not None:
        try:
            settings = replace(settings, facts_per_step=tuple(int(size) for size in facts_per_step.split(",")))
        except (ValueError, SpecError):
            raise typer.BadParameter("--facts-per-step takes N or N,M, each at least 1") from None
    return settings


def _facts(
    console: Console, sources: Sequence[str], valid: str | None, training: TrainingSettings, seed: int
) -> tuple[Sequence[Fact], Sequence[Fact]]:
    """Training and validation facts; what several files say differently is left out, with a warning."""
    from malmen_cli.exceptions import FactsError, Problem
    from malmen_cli.facts.files import read_facts, read_training_facts, split_by_subject

    facts, dropped = read_training_facts(sources, stdin=sys.stdin.buffer)
    if dropped.total:
        console.warn(f"{dropped.total} facts left out, the first: {dropped.problems[0]}")
    if valid is not None:
        return facts, read_facts(valid, stdin=sys.stdin.buffer).facts
    train, held_out = split_by_subject(facts, training.valid_fraction, seed)
    if not held_out:
        message = "one subject alone leaves nothing to validate on"
        raise FactsError([Problem(sources[0], None, None, message, "add facts on other subjects, or give --valid")])
    return train, held_out


def _warn_replaced(console: Console, base: Base, method: str) -> None:
    """One editor is installed for a base; say so when it was trained for another method than the new one."""
    from malmen_cli.artifact.editors import DESCRIPTION, find_editor
    from malmen_cli.artifact.manifest import read_sealed

    old = find_editor(base.fingerprint)
    trained = read_sealed(old / DESCRIPTION).get("method") if old is not None else method
    if trained != method:
        console.warn(f"this replaces the {trained} editor that apply used for {base.name} by default")


def _done(console: Console, base: Base, order: Order, places: Sequence[Path | None]) -> Trained | None:
    """The editor of this very training, where it ended before its process could say so."""
    from malmen_cli.training.session import already_trained

    for folder in places:
        trained = already_trained(base, order, folder) if folder is not None else None
        if trained is not None:
            console.note(f"nothing left to do: this training is finished, its editor is in {folder}")
            return trained
    return None


def _own_place(base: Base, method: str) -> Path:
    from malmen_cli.base.locate import cache_home

    return cache_home() / "trained" / f"{base.fingerprint[:16]}-{method}"


def _dry_run(console: Console, base: Base, order: Order, place: Path) -> None:
    from malmen_cli.editing.editor import Editor

    editor = Editor.fresh(base.model, order.spec.settings)
    size = sum(p.numel() for p in editor.parameters())
    console.note(
        f"would train {size / 1e6:.1f}M parameters on {len(order.train)} facts, "
        f"judged on {len(order.valid)}, to {place}"
    )
    document: dict[str, Any] = {"schema": 1, "dry_run": True, "output": str(place), "parameters": size}
    console.document(
        document | {"modules": editor.names, "facts": len(order.train), "training": asdict(order.training)}
    )
