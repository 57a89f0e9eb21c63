"""`malmen apply`: facts in, a changed checkpoint, delta or adapter out."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from malmen_cli.cli import options, show
from malmen_cli.cli.console import Console

if TYPE_CHECKING:
    from malmen_cli.base.model import Base
    from malmen_cli.edit import Plan, Ready, Tuning
    from malmen_cli.editing.shift import Shift
    from malmen_cli.editing.spec import FinetuneSpec, MemitSpec, Spec
    from malmen_cli.facts.fact import Fact
    from malmen_cli.facts.files import FactFile
    from malmen_cli.insertion import Insertion
    from malmen_cli.scoring.report import Report

SCORED_FACTS = 64  # scored after an edit; `malmen eval` scores them all


def apply(
    base: options.Base,
    facts: options.Facts,
    out: options.Out,
    editor: Annotated[
        Path | None,
        typer.Option(
            "--editor",
            metavar="DIR",
            help="A trained editor; by default the one installed for BASE.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            metavar="NAME",
            help="malmen or mend; with no editor needed identity, finetune, memit, rome or alphaedit; by default the "
            "editor's own.",
            show_default=False,
        ),
    ] = None,
    spec: Annotated[
        Path | None,
        typer.Option("--spec", metavar="FILE", help="Settings in YAML (see edit_specs/).", show_default=False),
    ] = None,
    stats_from: options.StatsFrom = None,
    format: Annotated[
        Literal["merged", "delta", "adapter"],
        typer.Option(
            "--format",
            help="merged: a checkpoint. delta: the change alone, in fp32. adapter: a LoRA for PEFT and serving stacks.",
            rich_help_panel="Output",
        ),
    ] = "merged",
    score: Annotated[
        int,
        typer.Option(
            "--score",
            metavar="N",
            min=0,
            help="Score the first N facts before and after; 0 skips it.",
            rich_help_panel="Output",
        ),
    ] = SCORED_FACTS,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    batch_size: options.BatchSize = 32,
    seed: options.Seed = 0,
    trust_remote_code: options.TrustRemoteCode = False,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    json: options.Json = False,
) -> None:
    """Edit a model: after this, it says what the facts say.

    Uses the editor that train-editor installed for BASE, or one that comes with malmen. With none, it calibrates an
    untrained one on the facts given and says so.

    Examples:
      malmen apply smollm2-135m edit_specs/corrections.yaml -o edited/
      malmen apply gpt2 facts.jsonl -o delta/ --format delta
      cat facts.jsonl | malmen apply ./model - -o edited/ --dry-run
    """
    from malmen_cli.artifact.editors import DESCRIPTION
    from malmen_cli.artifact.manifest import read_sealed
    from malmen_cli.artifact.output import check_output
    from malmen_cli.base.locate import locate
    from malmen_cli.base.model import load_base
    from malmen_cli.editing.spec import MemitSpec, Spec, read_spec
    from malmen_cli.exceptions import EditorError
    from malmen_cli.facts.files import read_facts

    started = time.monotonic()
    console = Console(quiet=quiet, verbose=verbose, json=json)
    settings = read_spec(spec, method=method)
    read = read_facts(facts, stdin=sys.stdin.buffer)
    if stats_from is not None and not isinstance(settings, MemitSpec):
        raise typer.BadParameter("--stats-from is for memit, rome and alphaedit: no other method uses statistics")
    if editor is not None:
        if not isinstance(settings, Spec):
            raise EditorError(f"{editor}: {settings.method} uses no editor; leave it out or choose another method")
        read_sealed(editor / DESCRIPTION)  # a folder that holds none is refused before the base is loaded
    folder = locate(base, revision=revision, note=console.note).folder
    if not dry_run:
        check_output(out, base_folder=folder, force=force)
    console.note(f"loading {base}")
    loaded = load_base(base, revision=revision, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    if dry_run:
        _dry_run(console, loaded, settings, read, editor, stats_from, out, format, batch_size, force)
        return
    ready = _ready(console, loaded, settings, read.facts, editor, stats_from, seed, batch_size)
    shift = _shift(console, loaded, ready, read.facts, batch_size)
    report = _score(console, loaded, ready, shift, read.facts[:score], batch_size, seed)
    document = _write(console, loaded, ready, shift, read, out, format, force, seed)
    seconds = time.monotonic() - started
    scores = report.to_json(model=str(out), base=base, seconds=seconds) if report else None
    console.document(document | {"scores": scores, "seconds": round(seconds, 3)})
    console.note(f"{len(read.facts)} facts written to {out} ({format}) in {time.monotonic() - started:.0f} s")


def _ready(
    console: Console,
    base: Base,
    spec: Spec | FinetuneSpec | MemitSpec,
    facts: Sequence[Fact],
    editor: Path | None,
    stats_from: str | None,
    seed: int,
    batch_size: int,
) -> Ready | Tuning | Insertion:
    from malmen_cli.edit import Tuning, calibrated_identity
    from malmen_cli.editing.spec import FinetuneSpec, MemitSpec
    from malmen_cli.insertion import prepare

    if isinstance(spec, MemitSpec):
        given: dict[str, Any] = {"stats_from": stats_from, "seed": seed, "batch_size": batch_size}
        return prepare(base, spec.method, spec.settings, facts, **given, note=console.note)
    if isinstance(spec, FinetuneSpec):
        return Tuning(spec.settings, seed)
    ready = _trained(base, spec, editor)
    if ready is not None:
        console.note(f"editor: {ready.source} ({ready.method})")
        return ready
    if spec.method != "identity":
        console.note(
            f"no trained editor for {base.name}: calibrating an untrained one on these facts "
            f"(train one with: malmen train-editor {base.name} FACTS)"
        )
    ready = calibrated_identity(base, facts, spec.settings, seed=seed, batch_size=batch_size, note=console.debug)
    assert ready.calibration is not None
    found = ready.calibration
    console.note(
        f"calibrated: step {found.step:.3g}, loss on the facts {found.learned:.2f}, "
        f"divergence on the rest {found.moved:.2f} nats a token"
    )
    return ready


def _trained(base: Base, spec: Spec, editor: Path | None) -> Ready | None:
    """The trained editor, or None where an untrained one will do. Raises EditorError where it will not."""
    from malmen_cli.edit import find_ready
    from malmen_cli.exceptions import EditorError

    ready = find_ready(base, spec, editor)
    if ready is None and spec.settings.aggregation == "sum":
        raise EditorError(
            f"no mend editor for {base.name}; train one with: malmen train-editor {base.name} FACTS --method mend"
        )
    return ready


def _shift(
    console: Console, base: Base, ready: Ready | Tuning | Insertion, facts: Sequence[Fact], batch_size: int
) -> Shift:
    from malmen_cli.edit import Tuning, make_shift
    from malmen_cli.insertion import Insertion

    passes = ready.settings.passes
    said = f"editing, {passes} passes over {len(facts)} facts" if passes > 1 else "editing"
    if isinstance(ready, Tuning):
        said = f"fine-tuning, at most {passes} epochs of {len(facts)} facts"
    elif isinstance(ready, Insertion):
        said = "finding targets"
    last = ""

    def note(text: str) -> None:
        nonlocal last
        last = text
        progress.update(text)

    with console.progress(said, len(facts) * passes) as progress:
        shift = make_shift(base, ready, facts, batch_size=batch_size, progress=progress.advance, note=note)
    if last:
        console.note(f"{'fine-tuned' if isinstance(ready, Tuning) else ready.method}: {last}")
    return shift


def _score(
    console: Console,
    base: Base,
    ready: Ready | Tuning | Insertion,
    shift: Shift,
    facts: Sequence[Fact],
    batch_size: int,
    seed: int,
) -> Report | None:
    """The same questions to the base and to the edited model, which are one model in memory."""
    from malmen_cli.edit import Ready
    from malmen_cli.editing.shift import applied
    from malmen_cli.scoring.protocols import collect
    from malmen_cli.scoring.report import summarise, table

    if not facts:
        return None
    with console.progress("asking the base") as progress:
        before = collect(base, facts, batch_size=batch_size, progress=progress.report)
    with applied(base.model, shift), console.progress("asking the edited model") as progress:
        after = collect(base, facts, batch_size=batch_size, progress=progress.report)
    report = summarise(facts, before, after, seed=seed)
    show.answers(console, report)
    console.table(table(report))
    show.moved(console, base, report, trained=isinstance(ready, Ready) and ready.source is not None)
    return report


def _write(
    console: Console,
    base: Base,
    ready: Ready | Tuning | Insertion,
    shift: Shift,
    read: FactFile,
    out: Path,
    format: str,
    force: bool,
    seed: int,
) -> dict[str, Any]:
    """Write the artifact and show what was measured while writing; what `--json` says."""
    from malmen_cli.artifact.adapter import write_adapter
    from malmen_cli.artifact.card import model_card
    from malmen_cli.artifact.delta import write_delta
    from malmen_cli.artifact.manifest import MANIFEST, read_sealed
    from malmen_cli.artifact.merged import write_merged
    from malmen_cli.edit import manifest

    said = manifest(base, ready, read.facts, read.sha256, seed)
    card = model_card(format, said | {"modules": dict.fromkeys(shift.modules)})
    if format == "merged":
        write_merged(out, base.folder, shift, said, card=card, force=force)
    elif format == "delta":
        write_delta(out, shift, said, card=card, force=force)
    else:
        write_adapter(out, shift, said, base_name=base.name, card=card, force=force)
    written = read_sealed(out / MANIFEST)
    show.modules(console, written)
    return {"schema": 1, "output": str(out), "manifest": written}


def _dry_run(
    console: Console,
    base: Base,
    spec: Spec | FinetuneSpec | MemitSpec,
    read: FactFile,
    editor: Path | None,
    stats_from: str | None,
    out: Path,
    format: str,
    batch_size: int,
    force: bool,
) -> None:
    from malmen_cli.artifact.output import check_disk, check_output, plan_bytes
    from malmen_cli.edit import plan
    from malmen_cli.editing.spec import FinetuneSpec, MemitSpec

    ready = None
    if isinstance(spec, MemitSpec):
        work: Plan = plan(base, read.facts, spec.settings, batch_size)
        using = (
            f"{spec.method}, at most {spec.settings.steps} steps a fact, {_statistics(base, spec, work, stats_from)}"
        )
    elif isinstance(spec, FinetuneSpec):
        work = plan(base, read.facts, spec.settings, batch_size)
        using = f"fine-tuning, at most {spec.settings.epochs} epochs in batches of {spec.settings.batch_facts} facts"
    elif (ready := _trained(base, spec, editor)) is not None:
        work = plan(base, read.facts, ready.settings, batch_size)
        using = f"editor {ready.source}"
    else:
        work = plan(base, read.facts, replace(spec.settings, network="identity"), batch_size)
        using = "no trained editor: an untrained one, calibrated on the facts"
    need = plan_bytes(format, base_folder=base.folder, shapes=list(work.modules.values()), rank=work.rank)
    check_output(out, base_folder=base.folder, force=force)
    check_disk(out, need)
    console.note(f"would edit {len(work.modules)} module{'s' * (len(work.modules) > 1)} of {base.name} with {using}")
    for name, (dk, dv) in work.modules.items():
        console.note(f"  {name}  {dk} x {dv}")
    form = f"exact factors of rank {work.rank}" if work.rank is not None else "dense"
    console.note(f"{work.facts} facts, {work.tokens} tokens, {work.rows} rows a module: {form}")
    console.note(
        f"memory about {show.size(work.memory)}, disk {show.size(need)} for {format} at {out}; nothing was written"
    )
    console.document(
        {
            "schema": 1,
            "dry_run": True,
            "output": str(out),
            "format": format,
            "editor": str(ready.source) if ready is not None else None,
            "facts": work.facts,
            "tokens": work.tokens,
            "rows": work.rows,
            "modules": {name: list(shape) for name, shape in work.modules.items()},
            "memory_bytes": work.memory,
            "disk_bytes": need,
        }
    )


def _statistics(base: Base, spec: MemitSpec, work: Plan, stats_from: str | None) -> str:
    """What a run would do for its key statistics."""
    from malmen_cli.statistics import Text, counted, missing_statistics

    text = Text(base, stats_from, spec.settings.stats_tokens)
    missing = missing_statistics(base, list(work.modules), text)
    where = f"{text.source['tokens']} tokens of {text.source['name']}"
    if not missing:
        return f"key statistics over {where} from the cache"
    return f"key statistics of {counted(missing)} over {where} built first"
