"""One training from facts to a saved editor: state that survives being killed, and the folder at the end."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from malmen_cli import __version__
from malmen_cli.artifact.editors import load_editor, save_editor
from malmen_cli.base import ranks
from malmen_cli.base.families import block_index
from malmen_cli.base.model import Base
from malmen_cli.editing.editor import Editor
from malmen_cli.editing.replay import Runner
from malmen_cli.editing.spec import Spec
from malmen_cli.editing.states import CACHE_BYTES, SPILL_BYTES
from malmen_cli.exceptions import EditorError, NumericsError, OutputError
from malmen_cli.facts.fact import Fact
from malmen_cli.facts.files import facts_sha256
from malmen_cli.training.calibration import Calibration
from malmen_cli.training.facts import encode_examples
from malmen_cli.training.history import Finished, Progress
from malmen_cli.training.loop import Trainer
from malmen_cli.training.settings import TrainingSettings

_OF_THE_FOLDER = ("format", "files", "tensors", "schema")  # what `editor.json` says beside what `describe` gives


@dataclass(frozen=True)
class Order:
    """What is to be trained: everything that decides the result."""

    spec: Spec
    training: TrainingSettings
    train: Sequence[Fact]
    valid: Sequence[Fact]
    seed: int = 0
    batch_size: int = 64
    sources: Sequence[str] = ()  # names of the files the training facts came from, and of the validation facts'
    valid_sources: Sequence[str] = ()

    def digest(self, base: Base) -> str:
        """sha256 over everything that decides the result; a resumed run must have the same."""
        parts: list[Any] = [base.fingerprint, str(base.dtype), self.spec.method, asdict(self.spec.settings)]
        parts += [asdict(self.training), facts_sha256(self.train), facts_sha256(self.valid), self.seed, self.batch_size]
        return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Trained:
    """What a training left: its folder and what `editor.json` says."""

    folder: Path
    description: dict[str, Any]


def state_folder(out: Path) -> Path:
    """Where an unfinished training keeps its state: beside the output, gone when it is done."""
    out = Path(os.path.abspath(out))
    return out.with_name(out.name + ".training")


def state_before(out: Path) -> Path:
    """Where the state before that one is kept, for the day the last one turns out damaged."""
    kept = state_folder(out)
    return kept.with_name(kept.name + ".before")


def unfinished(out: Path) -> bool:
    """Whether there is a training to go on with."""
    return state_folder(out).exists() or state_before(out).exists()


def already_trained(base: Base, order: Order, folder: Path) -> Trained | None:
    """What a training of exactly this order left at `folder`, whole; None where there is nothing of the kind."""
    try:
        _, said = load_editor(folder, fingerprint=base.fingerprint)
    except (EditorError, NumericsError, OSError):
        return None
    if said.get("order") != order.digest(base):
        return None
    return Trained(folder, {key: value for key, value in said.items() if key not in _OF_THE_FOLDER})


def train(
    base: Base,
    order: Order,
    out: Path,
    *,
    resume: bool = False,
    force: bool = False,
    replace: bool = False,
    memory: int | None = None,
    note: Callable[[str], None] = lambda text: None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Trained:
    """Train an editor and save it at `out`. Its state is kept at every validation and on interruption.

    resume: continue the unfinished training kept beside `out`; the result is bitwise that of an unbroken run.
    force: give up an unfinished training and an old output; replace: an old output only. memory: bytes that the
    outputs of the blocks in front may take, and as many for captured rows; what is more goes to disk, and never changes
    a bit of the result.
    Raises OutputError when an unfinished training is there and neither resume nor force is given, EditorError when it
    is of other facts, settings or base.
    """
    kept = state_folder(out)
    there = unfinished(out)
    if there and not resume and not force:
        raise OutputError(f"{kept}: an unfinished training; go on with --resume, or start over with --force")
    trainer = _trainer(base, order, memory, note)
    digest = order.digest(base)
    resuming = resume and there
    if resuming:
        trainer.calibration = _restore(trainer, out, digest, note)
        note(f"going on after step {trainer.step}")
    else:
        if there and ranks.first():
            _give_up(out)  # nobody may resume it by mistake
        if resume:
            note("nothing to resume: starting from the beginning")
        trainer.prepare(note)

    def save() -> None:
        if not ranks.first():
            return
        tensors, plain = trainer.state()
        state = plain | {
            "order": digest,
            "base": {"fingerprint": base.fingerprint},
            "calibration": _plain(trainer.calibration),
        }
        state |= {"history": [_plain(p) for p in trainer.history]}
        save_editor(kept, tensors, state, force=True, previous=state_before(out))

    with _interrupts_between_steps() as check:

        def step_done(progress: Progress) -> None:
            try:
                report(progress)
                check()
            except KeyboardInterrupt:
                save()
                note(f"interrupted after step {trainer.step}; its state is in {kept}, go on with --resume")
                raise

        trainer.run(step_done, save)
    note(f"the best editor is that of step {trainer.best.step}")
    finished = trainer.finish(note)
    description = describe(base, order, trainer, finished)
    if ranks.first():
        save_editor(out, finished.state, description, force=force or resuming or replace)
        _give_up(out)
    return Trained(out, description)


def describe(base: Base, order: Order, trainer: Trainer, finished: Finished) -> dict[str, Any]:
    """`editor.json`: what the editor is for, how it was made, and how it scored."""
    judged_on = order.valid[: order.training.valid_facts]
    scores = [_plain(p) for p in trainer.history if p.validation is not None]
    for score in scores:
        del score["seconds"]  # the same training has the same bytes
    return {
        "base": base.record(),
        "method": order.spec.method,
        "settings": asdict(replace(order.spec.settings, rounds=order.spec.settings.passes)),  # not a later default
        "training": asdict(order.training)
        | {"seed": order.seed, "batch_size": order.batch_size, "dtype": str(base.dtype)},
        "facts": _facts(order.train, order.sources),
        "validation_facts": _facts(judged_on, order.valid_sources),
        "calibration": _plain(trainer.calibration),
        "best_step": trainer.best.step,
        "scores": {
            "score": finished.validation.score,
            "saved": asdict(finished.validation),
            "in_parts": {"parts": finished.parts, "score": finished.in_parts.score, "mean": asdict(finished.in_parts)},
            "step_factor": finished.step_factor,
            "at": scores,
        },
        "groups": trainer.editor.description()["groups"],
        "order": order.digest(base),
        "malmen": __version__,
    }


def _facts(facts: Sequence[Fact], sources: Sequence[str]) -> dict[str, Any]:
    """What is said of a set of facts; of its files the names alone, as folders are a machine's."""
    return {"sha256": facts_sha256(facts), "count": len(facts), "sources": [Path(source).name for source in sources]}


def _trainer(base: Base, order: Order, memory: int | None, note: Callable[[str], None]) -> Trainer:
    settings = order.spec.settings
    editor = Editor.fresh(base.model, settings, seed=order.seed)
    first = min(block_index(base.model, name) for name in editor.names)
    budget = CACHE_BYTES if memory is None else memory
    runner = Runner(base, first, cache_bytes=budget, spill_bytes=SPILL_BYTES)
    if not runner.replaying and runner.first > 0:
        note("this model's blocks cannot be replayed; every step runs all of them")
    train, valid = (
        encode_examples(base.task, facts, end_of_text=settings.end_of_text, room=base.room)
        for facts in (order.train, order.valid)
    )
    return Trainer(runner, editor, train, valid, order.training, seed=order.seed, batch_size=order.batch_size)


def _give_up(out: Path) -> None:
    for folder in (state_before(out), state_folder(out)):  # the last one last: without it there is nothing to resume
        shutil.rmtree(folder, ignore_errors=True)


def _last_whole(out: Path, note: Callable[[str], None]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The last state, or the one before in its place where it is damaged. Raises EditorError when neither is whole."""
    kept, before = state_folder(out), state_before(out)
    try:
        return load_editor(kept)
    except EditorError as error:
        if not before.exists():
            raise
        found = load_editor(before)
        note(f"{error}; going on with the state before")
    ranks.wait()  # all have read it
    if ranks.first():
        shutil.rmtree(kept, ignore_errors=True)
        before.rename(kept)
    return found


def _restore(trainer: Trainer, out: Path, digest: str, note: Callable[[str], None]) -> Calibration:
    kept = state_folder(out)
    tensors, plain = _last_whole(out, note)
    if plain.get("order") != digest:
        raise EditorError(
            f"{kept}: a training of other facts, settings, seed or base; give the same ones, or start over with --force"
        )
    trainer.restore(tensors, plain)
    trainer.history = [
        Progress.from_plain(
            {key: math.nan if value is None else value for key, value in item.items()}
            | {"validation": item["validation"]}
        )
        for item in plain["history"]
    ]
    return Calibration(**plain["calibration"])


def _plain(value: Any) -> dict[str, Any]:
    """A dataclass as JSON can hold it: the loss of a bad step is null."""
    items = asdict(value).items() if value is not None else ()
    return {key: None if isinstance(item, float) and not math.isfinite(item) else item for key, item in items}


@contextmanager
def _interrupts_between_steps() -> Iterator[Callable[[], None]]:
    """Ctrl-C waits for the end of the step, where the state is whole: the function yielded then raises it.

    A second Ctrl-C does not wait. Where Ctrl-C is handled or ignored by somebody else, it stays with them.
    """
    asked = False

    def handler(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield check
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
