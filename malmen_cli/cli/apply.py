"""`malmen apply`: facts in, a changed checkpoint, delta or adapter out."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from malmen_cli.cli import options, show
from malmen_cli.cli.console import Console
from malmen_cli.cli.processes import rank

if TYPE_CHECKING:
    from malmen_cli.base.model import Base
    from malmen_cli.edit import Ready, Tuning
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
    share: Annotated[
        Literal["none", "reflink", "hardlink"],
        typer.Option(
            "--share",
            help="What a merged output has in common with BASE where nothing is edited. reflink: blocks on the disk, "
            "until either changes. hardlink: whole shards; whoever changes one in place changes both.",
            rich_help_panel="Output",
        ),
    ] = "none",
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
    max_memory: options.MaxMemory = None,
    seed: options.Seed = 0,
    trust_remote_code: options.TrustRemoteCode = False,
    force: options.ForceEdit = False,
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
    from malmen_cli.artifact.formats import write_edit
    from malmen_cli.artifact.manifest import read_sealed
    from malmen_cli.artifact.output import check_output
    from malmen_cli.base.locate import locate
    from malmen_cli.base.model import load_base
    from malmen_cli.edit import manifest, ready_for
    from malmen_cli.editing.spec import MemitSpec, Spec, read_spec
    from malmen_cli.exceptions import EditorError
    from malmen_cli.facts.files import read_facts
    from malmen_cli.guard import refuse_destructive

    started = time.monotonic()
    console = Console(quiet=quiet, verbose=verbose, json=json)
    settings = read_spec(spec, method=method)
    read = read_facts(facts, stdin=sys.stdin.buffer)
    if stats_from is not None and not isinstance(settings, MemitSpec):
        raise typer.BadParameter("--stats-from is for memit, rome and alphaedit: no other method uses statistics")
    if share != "none" and format != "merged":
        raise typer.BadParameter(f"--share is for merged outputs: a {format} has nothing in common with BASE")
    if editor is not None:
        if not isinstance(settings, Spec):
            raise EditorError(f"{editor}: {settings.method} uses no editor; leave it out or choose another method")
        read_sealed(editor / DESCRIPTION)  # a folder that holds none is refused before the base is loaded
    folder = locate(base, revision=revision, note=console.note).folder
    if not dry_run:
        check_output(out, base_folder=folder, force=force)
    console.note(f"loading {base}")
    loaded = load_base(
        base, revision=revision, device=device, dtype=dtype, trust_remote_code=trust_remote_code, note=console.note
    )
    asked: dict[str, Any] = {"editor": editor, "stats_from": stats_from, "batch_size": batch_size}
    if dry_run:
        _dry_run(console, loaded, read, settings, out, **asked, format=format, share=share, force=force)
        return
    ready = ready_for(loaded, settings, read.facts, **asked, seed=seed, note=console.note, debug=console.debug)
    shift = _shift(console, loaded, ready, read.facts, batch_size, max_memory)
    refuse_destructive(loaded, shift, read.facts, batch_size=batch_size, force=force, warn=console.warn)
    report = _score(console, loaded, ready, shift, read.facts[:score], batch_size, seed)
    if rank() > 0:
        return
    said = manifest(loaded, ready, read.facts, read.sha256, seed)
    written = write_edit(out, loaded, shift, said, format=format, force=force, share=share)
    show.modules(console, written)
    seconds = time.monotonic() - started
    scores = report.to_json(model=str(out), base=base, seconds=seconds) if report else None
    document = {"schema": 1, "output": str(out), "manifest": written}
    console.document(document | {"scores": scores, "seconds": round(seconds, 3)})
    console.note(f"{len(read.facts)} facts written to {out} ({format}) in {time.monotonic() - started:.0f} s")


def _shift(
    console: Console,
    base: Base,
    ready: Ready | Tuning | Insertion,
    facts: Sequence[Fact],
    batch_size: int,
    memory: int | None,
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
        shift = make_shift(
            base, ready, facts, batch_size=batch_size, memory=memory, progress=progress.advance, note=note
        )
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
    with applied(base.model, shift, stored=base.stored), console.progress("asking the edited model") as progress:
        after = collect(base, facts, batch_size=batch_size, progress=progress.report)
    report = summarise(facts, before, after, seed=seed)
    show.answers(console, report)
    console.table(table(report))
    show.moved(console, base, report, trained=isinstance(ready, Ready) and ready.source is not None)
    return report


def _dry_run(
    console: Console, base: Base, read: FactFile, spec: Spec | FinetuneSpec | MemitSpec, out: Path, **asked: Any
) -> None:
    from malmen_cli.plan import outlook

    found = outlook(base, spec, read.facts, out, **asked)
    show.outlook(console, base, found, out, asked["format"])
    work = found.work
    console.document(
        {
            "schema": 1,
            "dry_run": True,
            "output": str(out),
            "format": asked["format"],
            "editor": str(found.editor) if found.editor is not None else None,
            "facts": work.facts,
            "tokens": work.tokens,
            "rows": work.rows,
            "modules": {name: list(shape) for name, shape in work.modules.items()},
            "memory_bytes": work.memory,
            "disk_bytes": found.disk,
        }
    )
