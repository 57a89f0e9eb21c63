"""Facts and a base to a Shift: with a trained editor where there is one, else a calibrated one, or without any by
fine-tuning or MEMIT."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from malmen_cli import __version__
from malmen_cli.artifact.editors import find_editor, load_editor
from malmen_cli.base.families import block_index
from malmen_cli.base.model import Base
from malmen_cli.base.prompts import Encoded, encode_each
from malmen_cli.editing.capture import row_count
from malmen_cli.editing.editor import Editor
from malmen_cli.editing.methods.finetune import Finetune, tuned_module
from malmen_cli.editing.methods.malmen import Malmen
from malmen_cli.editing.replay import Runner
from malmen_cli.editing.settings import FinetuneSettings, MalmenSettings, from_mapping
from malmen_cli.editing.shift import Shift, applied
from malmen_cli.editing.spec import FinetuneSpec, MemitSpec, Spec
from malmen_cli.editing.states import SPILL_BYTES, edit_cache
from malmen_cli.exceptions import EditorError, SpecError, naming
from malmen_cli.facts.fact import Fact
from malmen_cli.identity import untrained_editor
from malmen_cli.insertion import Insertion, memit_shift, prepare
from malmen_cli.training.calibration import Calibration

FEW = 0.25  # rows for each number of a key, up to which a trained editor takes half as many passes again


@dataclass(frozen=True)
class Ready:
    """An editor that fits the base, and where it came from. rounds_asked: whether the user said how many passes.
    finishing: how many of them come behind those that it was trained with; what is learned hardly pushes in these.
    """

    editor: Editor
    method: str
    source: Path | None = None
    sha256: str | None = None
    calibration: Calibration | None = None
    rounds_asked: bool = False
    finishing: int = 0

    @property
    def settings(self) -> MalmenSettings:
        return self.editor.settings

    def record(self) -> dict[str, Any] | None:
        """What `malmen.json` says of a trained editor; None for a calibrated identity network."""
        return {"path": self.source.name, "sha256": self.sha256} if self.source is not None else None


@dataclass(frozen=True)
class Tuning:
    """Fine-tuning, which is ready as it is: its settings, and the seed that shuffles its mini-batches."""

    settings: FinetuneSettings
    seed: int = 0
    method: str = "finetune"


def encode_edits(base: Base, facts: Sequence[Fact], *, end_of_text: bool) -> list[Encoded]:
    """Every fact's edit as tokens. Raises FactsError naming each fact that has none or too many."""
    options: dict[str, Any] = {"end_of_text": end_of_text, "room": base.room}
    return encode_each(facts, lambda fact: base.task.encode(fact.prompt, fact.target, subject=fact.subject, **options))


def ready_for(
    base: Base,
    spec: Spec | FinetuneSpec | MemitSpec,
    facts: Sequence[Fact],
    *,
    editor: Path | None,
    stats_from: str | None,
    seed: int,
    batch_size: int,
    note: Callable[[str], None] = lambda text: None,
    debug: Callable[[str], None] = lambda text: None,
) -> Ready | Tuning | Insertion:
    """Whatever turns these facts into a shift as `spec` asks for it: what is missing is calibrated or gathered.

    note: called with what the user should know of the choice, debug: with how calibration goes. Raises EditorError,
    FactsError, NumericsError.
    """
    if isinstance(spec, MemitSpec):
        given: dict[str, Any] = {"stats_from": stats_from, "seed": seed, "batch_size": batch_size}
        return prepare(base, spec.method, spec.settings, facts, **given, note=note)
    if isinstance(spec, FinetuneSpec):
        return Tuning(spec.settings, seed)
    ready = trained_or_none(base, spec, editor)
    if ready is not None:
        note(f"editor: {ready.source} ({ready.method})")
        return finishing(base, ready, facts)
    if spec.method != "identity":
        note(
            f"no trained editor for {base.name}: calibrating an untrained one on these facts "
            f"(train one with: malmen train-editor {base.name} FACTS)"
        )
    ready = calibrated_identity(base, facts, spec.settings, seed=seed, batch_size=batch_size, note=debug)
    assert ready.calibration is not None
    found = ready.calibration
    note(
        f"calibrated: step {found.step:.3g}, loss on the facts {found.learned:.2f}, "
        f"divergence on the rest {found.moved:.2f} nats a token"
    )
    return ready


def trained_or_none(base: Base, spec: Spec, editor: Path | None) -> Ready | None:
    """The trained editor, or None where an untrained one will do. Raises EditorError where it will not."""
    ready = find_ready(base, spec, editor)
    if ready is None and spec.settings.aggregation == "sum":
        raise EditorError(
            f"no mend editor for {base.name}; train one with: malmen train-editor {base.name} FACTS --method mend"
        )
    return ready


def find_ready(base: Base, spec: Spec, folder: Path | None) -> Ready | None:
    """The trained editor to use: the folder given, else one installed or shipped for this base; None if there is none.

    Raises EditorError for an editor of another base, method or shape.
    """
    place = folder or (find_editor(base.fingerprint) if spec.method != "identity" else None)
    if place is None:
        return None
    tensors, description = load_editor(place, fingerprint=base.fingerprint)
    trained = str(description.get("method"))
    if trained != spec.method and spec.method_given:
        if folder is None:
            return None
        raise EditorError(f"{place}: trained for method {trained}, not {spec.method}; leave --method out or train one")
    try:
        settings = from_mapping(MalmenSettings, description["settings"], f"{place}: settings")
    except (SpecError, KeyError, TypeError) as error:
        raise EditorError(f"{place}: its settings cannot be read ({error}); train the editor again") from error
    settings = _with_spec(settings, spec, place)
    editor = Editor.restored(base.model, settings, tensors, where=str(place))
    digest = str(description["files"]["editor.safetensors"])
    return Ready(editor, trained, place, digest, rounds_asked=_rounds_asked(spec))


def _rounds_asked(spec: Spec) -> bool:
    """`rounds: null` in a spec leaves them as they are."""
    return spec.given.get("rounds") is not None


def finishing(base: Base, ready: Ready, facts: Sequence[Fact]) -> Ready:
    """The trained editor with half as many passes again where the facts are few.

    Then two more passes teach what the first four left over, and what is learned hardly pushes; with many rows they
    would go on where the weights have no room left (docs/editor-recipe.md).
    """
    editor, settings = ready.editor, ready.settings
    several = settings.passes > 1 and settings.aggregation == "ridge" and settings.network != "identity"
    if ready.rounds_asked or not several or len(facts) > FEW * min(group.dk for group in editor.groups):
        return ready
    edits = encode_edits(base, facts, end_of_text=settings.end_of_text)
    if any(row_count(edits, settings.tokens, group.reads) > FEW * group.dk for group in editor.groups):
        return ready
    longer = replace(settings, rounds=settings.passes + settings.passes // 2)
    added = longer.passes - settings.passes
    return replace(ready, editor=Editor(longer, editor.groups, editor.layouts), finishing=added)


def _with_spec(settings: MalmenSettings, spec: Spec, place: Path) -> MalmenSettings:
    """A trained editor's settings with the spec's `rounds`; the others it was trained with, and a spec must agree."""
    for name in spec.given:
        asked, trained = getattr(spec.settings, name), getattr(settings, name)
        if name != "rounds" and asked != trained:
            raise EditorError(
                f"{place}: trained with {name}: {trained}, but {spec.source} says {asked}; "
                "leave it out, choose another --editor, or calibrate an untrained network with --method identity"
            )
    return replace(settings, rounds=spec.settings.rounds) if _rounds_asked(spec) else settings


def calibrated_identity(
    base: Base,
    facts: Sequence[Fact],
    settings: MalmenSettings,
    *,
    seed: int,
    batch_size: int,
    note: Callable[[str], None] = lambda text: None,
) -> Ready:
    """The untrained form, calibrated on the facts themselves. Raises FactsError, NumericsError."""
    settings = replace(settings, network="identity")
    encode_edits(base, facts, end_of_text=settings.end_of_text)  # what cannot be encoded is refused by name
    editor, calibration = untrained_editor(base, facts, settings, seed=seed, batch_size=batch_size, note=note)
    return Ready(editor, "identity", calibration=calibration)


def make_shift(
    base: Base,
    ready: Ready | Tuning | Insertion,
    facts: Sequence[Fact],
    *,
    batch_size: int,
    memory: int | None = None,
    progress: Callable[[int], None] | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Shift:
    """All facts in one shift, gone over as often as the settings say. Raises NumericsError naming module and fact.

    A later pass captures on the model as edited so far: what was learned already asks for nothing more.
    memory: bytes that the outputs of the blocks in front may take between two passes; what is more goes to disk.
    note: called with every epoch's loss of fine-tuning, and with what MEMIT found.
    """
    ids, keeping = [fact.id for fact in facts], _keeping(base, memory)
    with naming(ids):
        if isinstance(ready, Insertion):
            return memit_shift(base, ready, facts, batch_size=batch_size, keeping=keeping, progress=progress, note=note)
        edits = encode_edits(base, facts, end_of_text=ready.settings.end_of_text)
        if isinstance(ready, Tuning):
            module = tuned_module(base.model, ready.settings)
            tuned = Finetune(ready.settings, seed=ready.seed)
            runner = Runner(base, block_index(base.model, module), **keeping)
            return tuned.shift(runner, module, edits, batch_size=batch_size, progress=progress, note=note)
        return _in_passes(base, ready, edits, ids, keeping, batch_size, progress)


def _in_passes(
    base: Base,
    ready: Ready,
    edits: Sequence[Encoded],
    ids: Sequence[str],
    keeping: dict[str, int],
    batch_size: int,
    progress: Callable[[int], None] | None,
) -> Shift:
    # The blocks in front of the first edited one are the same in every pass: their output is kept, within bounds.
    editor, passes = ready.editor, ready.settings.passes
    again = passes > 1
    first = min(block_index(base.model, name) for name in editor.names) if again else 0
    runner, method = Runner(base, first, **keeping), Malmen(editor)
    shift = method.shift(runner, edits, ids, batch_size=batch_size, keep=again, progress=progress)
    for number in range(1, passes):
        if number == passes - ready.finishing:
            method = Malmen(editor, damped=True)
        with applied(base.model, shift):
            more = method.shift(runner, edits, ids, batch_size=batch_size, keep=again, progress=progress)
        shift = shift.plus(more)
    return shift


def _keeping(base: Base, memory: int | None) -> dict[str, int]:
    """Where a Runner keeps the blocks' outputs: in memory, and beyond it on disk."""
    return {"cache_bytes": edit_cache(base.device) if memory is None else memory, "spill_bytes": SPILL_BYTES}


def manifest(
    base: Base, ready: Ready | Tuning | Insertion, facts: Sequence[Fact], facts_sha256: str, seed: int
) -> dict[str, object]:
    """The part of `malmen.json` that says what was done to what. Only a `Ready` has an editor or a calibration, only
    an `Insertion` statistics."""
    calibration, editor = (ready.calibration, ready.record()) if isinstance(ready, Ready) else (None, None)
    return {
        "base": base.record(),
        "method": {"name": ready.method} | asdict(ready.settings),
        "calibration": asdict(calibration) if calibration is not None else None,
        "editor": editor,
        "statistics": ready.record() if isinstance(ready, Insertion) else None,
        "facts": {"sha256": facts_sha256, "count": len(facts)},
        "versions": {
            "malmen": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "seed": seed,
    }
