"""How long until the same validation score: malmen's training beside the textbook's, from facts to that score.

    python benchmarks/race.py smollm2-135m --facts counterfact-train.jsonl --valid counterfact-val.jsonl --steps 20

The textbook trains the paper's editor (the last six blocks, answer tokens, one pass) for so many steps, every judged
fact in the meta-loss; its best validation score is what has to be reached. Then malmen: the same editor on the same
draws, a meta-loss on a part of the facts, and the editor that train-editor makes by default, and with less preparation.
All start from a fresh editor that is calibrated, which is in malmen's time and not in the textbook's. Validation is in
nobody's time, but for the one that malmen's training ends its last step with.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from speed import paper
from textbook import Textbook
from timing import about, processor_seconds

from malmen_cli.base.families import block_index
from malmen_cli.base.model import Base, load_base
from malmen_cli.editing.editor import Editor
from malmen_cli.editing.replay import Runner
from malmen_cli.editing.settings import MalmenSettings
from malmen_cli.exceptions import MalmenError
from malmen_cli.facts.files import read_facts
from malmen_cli.training.facts import Example, draw, encode_examples
from malmen_cli.training.history import Progress
from malmen_cli.training.loop import Trainer
from malmen_cli.training.settings import TrainingSettings

HASTY_PROMPTS, HASTY_FACTS = 300, 64  # keys to preserve and facts to calibrate on, where time is short

HEAD = "| training | steps | processor seconds | wall seconds | validation score |\n|---|---|---|---|---|"


@dataclass
class Point:
    """A validation: after so many steps and seconds, which its own are not among."""

    step: int
    cpu: float
    wall: float
    score: float
    mean: float  # of the shares that the score is the harmonic mean of, which tells where that is 0

    @property
    def rank(self) -> tuple[float, float]:
        return self.score, self.mean


@dataclass
class Run:
    """One training: the clock runs while it learns, and not while it is validated."""

    name: str
    points: list[Point] = field(default_factory=list)
    cpu: float = 0.0
    wall: float = 0.0

    @contextmanager
    def learning(self) -> Iterator[None]:
        clock, spent = time.perf_counter(), processor_seconds()
        yield
        self.add(time.perf_counter() - clock, processor_seconds() - spent)

    def add(self, wall: float, cpu: float) -> None:
        self.wall += wall
        self.cpu += cpu

    def validated(self, step: int, score: float, mean: float) -> None:
        self.points.append(Point(step, self.cpu, self.wall, score, mean))
        print(f"{self.name}: {step} steps, {self.cpu:.0f} processor s, score {score:.3f}", file=sys.stderr, flush=True)

    def first_at(self, rank: tuple[float, float]) -> Point | None:
        """Where it was first as good."""
        return next((point for point in self.points if point.rank >= rank), None)


@dataclass
class Race:
    base: Base
    train: Sequence[Example]
    valid: Sequence[Example]
    settings: TrainingSettings
    every: int
    batch_size: int
    folder: Path

    def textbook(self) -> Run:
        """Adam and its schedule as in malmen's training; the editor is validated by malmen, which is in no time."""
        trainer, run = self._trainer(paper(self.base), self.settings), Run("textbook")
        trainer.prepare()
        editor, settings = trainer.editor, self.settings
        groups = [list(group.names) for group in editor.groups]
        book = Textbook(self.base.model, groups, editor.state(), self.folder, batch_size=self.batch_size)
        scales = [t for n in book.networks for name, t in n.tensors.items() if name.startswith("log_")]
        others = [t for t in book.parameters() if all(t is not scale for scale in scales)]
        optimizer = torch.optim.Adam(
            [{"params": others, "peak": settings.meta_lr}, {"params": scales, "peak": settings.scale_lr}]
        )
        self._validate(run, trainer, 0)
        for step in range(settings.steps):
            drawn = draw(trainer.cohorts, settings, trainer.seed, step)
            probes = [reference.sequence for reference in trainer.references.of(drawn.probes)]
            for rates in optimizer.param_groups:
                rates["lr"] = rates["peak"] * settings.schedule(step)
            with run.learning():
                book.step(drawn.edits, drawn.wordings, probes, settings.locality_weight, optimizer, settings.clip)
            if (step + 1) % self.every == 0:
                state = {f"{i}.{k}": t.detach() for i, n in enumerate(book.networks) for k, t in n.tensors.items()}
                editor.groups[:] = Editor.restored(self.base.model, editor.settings, state, where="textbook").groups
                self._validate(run, trainer, step + 1)
        return run

    def ours(self, name: str, editor: MalmenSettings, settings: TrainingSettings, target: tuple[float, float]) -> Run:
        """Until the target is reached, or to the last step."""
        run = Run(name)
        with run.learning():
            trainer = self._trainer(editor, settings)
            trainer.prepare()
        self._validate(run, trainer, 0)
        clock, spent = time.perf_counter(), processor_seconds()

        def after(progress: Progress) -> None:
            nonlocal clock, spent
            run.add(time.perf_counter() - clock, processor_seconds() - spent)
            if progress.step % self.every == 0:
                self._validate(run, trainer, progress.step)
            if run.points[-1].rank >= target:
                raise _Reached
            clock, spent = time.perf_counter(), processor_seconds()

        if run.points[-1].rank < target:
            with suppress(_Reached):
                trainer.run(after, lambda: None)
        return run

    def _trainer(self, editor: MalmenSettings, settings: TrainingSettings) -> Trainer:
        fresh = Editor.fresh(self.base.model, editor)
        runner = Runner(self.base, min(block_index(self.base.model, name) for name in fresh.names))
        never = replace(settings, validate_every=10**9)
        return Trainer(runner, fresh, self.train, self.valid, never, batch_size=self.batch_size)

    def _validate(self, run: Run, trainer: Trainer, step: int) -> None:
        run.validated(step, *trainer.validate().rank)


class _Reached(Exception):
    """The score that was to be reached."""


def line(run: Run, point: Point | None) -> str:
    if point is None:
        last = run.points[-1]
        return f"| {run.name} | {last.step}, not reached | {run.cpu:.0f} | {run.wall:.0f} | {last.score:.3f} |"
    return f"| {run.name} | {point.step} | {point.cpu:.0f} | {point.wall:.0f} | {point.score:.3f} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="hub id, folder, .gguf file or alias")
    parser.add_argument("--facts", required=True, metavar="FILE", help="to train on, with rephrases and locality")
    parser.add_argument("--valid", required=True, metavar="FILE", help="validation facts")
    parser.add_argument("--count", type=int, default=2000, help="training facts")
    parser.add_argument("--valid-facts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20, help="of the textbook")
    parser.add_argument("--every", type=int, default=2, help="steps between validations")
    parser.add_argument("--step-facts", type=int, default=64, help="facts of a step")
    parser.add_argument("--part", type=int, default=16, help="of these, facts that the sampled meta-loss is taken on")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="JSON lines; trainings that it has are not run again",
    )
    options = parser.parse_args(arguments)
    every = TrainingSettings(
        steps=options.steps,
        facts_per_step=(options.step_facts,),
        meta_facts=options.step_facts,
        valid_facts=options.valid_facts,
        warmup=min(10, options.steps // 2),
    )
    sampled = replace(every, meta_facts=options.part)
    hasty = replace(sampled, preserved_prompts=HASTY_PROMPTS, calibration_facts=HASTY_FACTS)
    try:
        base = load_base(options.base, device=options.device)
        train, valid = (
            encode_examples(base.task, read_facts(file).facts[:count], end_of_text=True)
            for file, count in ((options.facts, options.count), (options.valid, options.valid_facts))
        )
        with tempfile.TemporaryDirectory(prefix="malmen-race-") as folder:
            race = Race(base, train, valid, every, options.every, options.batch_size, Path(folder))
            said = about(base)
            print(json.dumps(said) + "\n" + HEAD, flush=True)
            known = _known(options.output, said)
            book = known.get("textbook") or _kept(options.output, race.textbook(), said)
            best = max(book.points, key=lambda point: point.rank)
            print(line(book, best), flush=True)
            runs: dict[str, Callable[[str], Run]] = {
                "the same editor": lambda name: race.ours(name, paper(base), every, best.rank),
                f"its meta-loss on {options.part} of the facts": lambda name: race.ours(
                    name, paper(base), sampled, best.rank
                ),
                "malmen's own settings": lambda name: race.ours(name, MalmenSettings(), sampled, best.rank),
                "the same, prepared on less": lambda name: race.ours(name, MalmenSettings(), hasty, best.rank),
            }
            for name, make in runs.items():
                run = known.get(name) or _kept(options.output, make(name), said)
                print(line(run, run.first_at(best.rank)), flush=True)
    except MalmenError as error:
        sys.exit(str(error))


def _known(output: Path | None, said: dict[str, object]) -> dict[str, Run]:
    """The trainings that an earlier call of the same command has left there. Exits where another has."""
    if output is None or not output.exists():
        return {}
    try:
        records = [json.loads(text) for text in output.read_text(encoding="utf-8").splitlines()]
    except ValueError:
        sys.exit(f"{output}: not a file of whole records; name another")
    if any(record[key] != said[key] for record in records for key in ("base", "dtype", "device", "command")):
        sys.exit(f"{output}: another command's trainings; name another file")
    return {r["name"]: Run(r["name"], [Point(**point) for point in r["points"]], r["cpu"], r["wall"]) for r in records}


def _kept(output: Path | None, run: Run, said: dict[str, object]) -> Run:
    if output is not None:
        with output.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(run) | said) + "\n")
    return run


if __name__ == "__main__":
    main()
