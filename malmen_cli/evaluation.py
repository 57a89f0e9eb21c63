"""A model beside its base: which base that is, where both lie, and what both say to the same questions."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from malmen_cli.artifact.delta import is_delta, read_delta
from malmen_cli.artifact.manifest import MANIFEST, base_fingerprint, check_base, read_sealed
from malmen_cli.base.locate import locate
from malmen_cli.base.model import Base
from malmen_cli.base.weights import fingerprint
from malmen_cli.editing.shift import applied
from malmen_cli.exceptions import CheckpointError, EditorError
from malmen_cli.facts.fact import Fact
from malmen_cli.scoring.protocols import Answers
from malmen_cli.scoring.report import Report, summarise


@dataclass(frozen=True)
class Pair:
    """What is compared. delta: MODEL is a delta on `base`. note: what the user should know about the choice."""

    model: str
    base: str
    model_revision: str | None = None
    base_revision: str | None = None
    delta: bool = False
    note: str | None = None


def pair_of(model: str, base: str | None, revision: str | None) -> Pair:
    """Which base goes with MODEL. A --revision is MODEL's, but the base's where MODEL is a folder."""
    local = Path(model).is_dir()
    if local and is_delta(Path(model)):
        if base is not None:
            return Pair(model, base, None, revision, delta=True)
        name, recorded = _named_base(read_sealed(Path(model) / MANIFEST))
        if name is None:
            raise CheckpointError(f"{model}: a delta that does not name its base; give it with --base")
        return Pair(model, name, None, revision or recorded, delta=True)
    if base is not None:
        return Pair(model, base, None, revision) if local else Pair(model, base, revision, None)
    if not (local and (Path(model) / MANIFEST).is_file()):
        note = "no --base: the model is compared with itself, so LS is 1 whatever was edited"
        return Pair(model, model, revision, revision, note=note)
    return _recorded_pair(model, read_sealed(Path(model) / MANIFEST), revision)


def _recorded_pair(model: str, manifest: dict[str, Any], revision: str | None) -> Pair:
    """A merged folder beside the base its manifest names, if those very weights can be found."""
    name, recorded = _named_base(manifest)
    revision = revision or recorded
    itself = "the model is compared with itself, so LS is 1 whatever was edited; give --base"
    if name is None:
        return Pair(model, model, note=f"malmen.json names no base: {itself}")
    try:
        same = fingerprint(locate(name, revision=revision).folder) == base_fingerprint(manifest)
    except CheckpointError:
        return Pair(model, model, note=f"its base {name} cannot be found: {itself}")
    except EditorError as error:
        return Pair(model, model, note=f"its base {name} cannot be used ({error}): {itself}")
    if not same:
        return Pair(model, model, note=f"{name} is not the base it was made from: {itself}")
    return Pair(model, name, None, revision)


def _named_base(manifest: dict[str, Any]) -> tuple[str | None, str | None]:
    recorded = manifest.get("base")
    if not isinstance(recorded, dict) or not isinstance(recorded.get("name"), str):
        return None, None
    revision = recorded.get("revision")
    return recorded["name"], revision if isinstance(revision, str) else None


def model_folder(pair: Pair, note: Callable[[str], None] = lambda text: None) -> Path:
    """Where MODEL lies. Both sides are looked for, so that one that is no use is refused before the other is asked."""
    base = locate(pair.base, revision=pair.base_revision, note=note).folder
    if pair.delta:
        folder = Path(pair.model)
        check_base(folder, read_sealed(folder / MANIFEST), fingerprint(base))
        return folder
    if (pair.model, pair.model_revision) == (pair.base, pair.base_revision):
        return base
    return locate(pair.model, revision=pair.model_revision, note=note).folder


def score(
    pair: Pair,
    folder: Path,
    facts: Sequence[Fact],
    *,
    load: Callable[[str, str | None], Base],
    ask: Callable[[Base, str], Answers],
    seed: int,
) -> Report:
    """Ask the base, let go of it, ask the model: never two models in memory.

    folder: where MODEL lies. load: from a name and a revision. ask: its answers on `facts`, given who it is in words.
    """
    base = load(pair.base, pair.base_revision)
    base_folder = base.folder
    shift = None
    if pair.delta:
        shift, _ = read_delta(folder, fingerprint=base.fingerprint)  # refused before anything long is run
    before = ask(base, "the base")
    if shift is not None:
        with applied(base.model, shift, stored=base.stored):
            after = ask(base, "the edited model")
    elif folder == base_folder:
        after = before  # one model on both sides: its answers are the same
    else:
        del base
        gc.collect()
        after = ask(load(pair.model, pair.model_revision), "the edited model")
    report = summarise(facts, before, after, seed=seed)
    return replace(report, notes=(*report.notes, pair.note)) if pair.note else report
