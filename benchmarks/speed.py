"""How far from the limit of the machine: ratios of medians over repeated, interleaved runs, each beside its goal.

    python benchmarks/speed.py smollm2-135m
    python benchmarks/speed.py smollm2-135m --only apply,merged --repeats 7 -o speed.jsonl

apply: one pass over the facts against one plain forward of the same prompts, unpadded. step: of training against
textbook.py's, same facts and same result. targets: MEMIT's, a batch of facts against one by one, by the same code and
as published. merged: writing a checkpoint against cp -r of the base. help, check: seconds.
Seconds are wall time, with the processor time beside it: on a shared machine only the second says what the work takes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path

import torch
from madeup import made_up
from textbook import Textbook
from textbook_memit import target
from timing import HEAD, Row, Timed, about, interleaved, processor_seconds

from malmen_cli.artifact.merged import write_merged
from malmen_cli.base.families import block_index, chosen_modules, matrix_shape
from malmen_cli.base.model import Base, load_base
from malmen_cli.base.prompts import Encoded
from malmen_cli.edit import Ready, calibrated_identity, encode_edits, find_ready, make_shift
from malmen_cli.editing.editor import Editor
from malmen_cli.editing.methods.memit import memit_modules
from malmen_cli.editing.replay import Runner
from malmen_cli.editing.settings import MalmenSettings, MemitSettings
from malmen_cli.editing.shift import ModuleShift, Shift, weight_layout
from malmen_cli.editing.spec import Spec
from malmen_cli.editing.targets import find_targets
from malmen_cli.exceptions import MalmenError
from malmen_cli.facts.fact import Fact
from malmen_cli.facts.files import read_facts, write_facts
from malmen_cli.insertion import encode_wordings
from malmen_cli.training.facts import draw, encode_examples
from malmen_cli.training.history import Progress
from malmen_cli.training.loop import Trainer
from malmen_cli.training.settings import TrainingSettings

CHECKED_FACTS = 100_000
WARM_STEPS = 3  # of training, before prefix states and references are kept
PAPER_BLOCKS = 6


@dataclass
class Speed:
    """What is measured on one loaded base. facts: those edited; step_facts: facts of a training step;
    target_facts: facts whose targets MEMIT looks for."""

    base: Base
    facts: Sequence[Fact]
    repeats: int
    batch_size: int
    step_facts: int
    target_facts: int
    folder: Path

    def apply(self) -> list[Row]:
        """The paper's last blocks in one pass, and the editor that `malmen apply` would use with its own passes."""
        edits = encode_edits(self.base, self.facts, end_of_text=True)
        rows = []
        for name, ready in self.editors():
            work = partial(make_shift, self.base, ready, self.facts, batch_size=self.batch_size)
            times = interleaved(work, partial(plain_forward, self.base, edits, self.batch_size), self.repeats)
            note = f"{len(self.facts):,} facts, {len(ready.editor.names)} modules, {ready.settings.passes} passes"
            rows.append(Row(f"apply, {name}", 1.5, *times, note=note))
        return rows

    def step(self) -> list[Row]:
        """Training steps of ours and of the textbook in turn, on the same draw; losses side by side."""
        trainer = self.trainer()
        book = Textbook(
            self.base.model,
            [list(group.names) for group in trainer.editor.groups],
            trainer.editor.state(),
            self.folder,
            tokens=trainer.editor.settings.tokens,
            batch_size=self.batch_size,
        )
        mine, theirs, apart = Timed(), Timed(), []
        rate = [{"params": book.parameters(), "lr": 0.0}]
        optimizer = torch.optim.Adam(rate)  # the editor stays where it is on both sides, so that losses compare
        spent = processor_seconds()

        def after(progress: Progress) -> None:
            nonlocal spent
            used = processor_seconds() - spent
            drawn = draw(trainer.cohorts, trainer.settings, trainer.seed, progress.step - 1)
            probes = [reference.sequence for reference in trainer.references.of(drawn.probes)]
            losses: list[float] = []
            weight = trainer.settings.locality_weight
            one = partial(book.step, drawn.edits, drawn.wordings, probes, weight, optimizer)
            kept = theirs if progress.step > WARM_STEPS else Timed()
            kept.run(lambda: losses.extend(one()))
            if progress.step > WARM_STEPS:
                mine.add(progress.seconds, used)
                pairs = zip(losses, (progress.learned, progress.moved), strict=True)
                apart.append(max(abs(a - b) / max(abs(b), 1e-6) for a, b in pairs))
            if progress.step == WARM_STEPS + self.repeats:
                raise _Enough
            spent = processor_seconds()

        with suppress(_Enough):
            trainer.run(after, lambda: None)
        note = (
            f"{self.step_facts} facts seen before, {len(trainer.editor.names)} modules; losses within {max(apart):.1e}"
        )
        return [Row("training step", 8.0, mine, theirs, faster=True, note=note)]

    def targets(self) -> list[Row]:
        """MEMIT's search for targets, as many facts at once as a batch takes; one by one by the same code, and one by
        one as the paper has it. Nothing is kept."""
        settings = MemitSettings(prefixes=0)
        block = block_index(self.base.model, memit_modules(self.base.model, settings)[-1])
        wordings = encode_wordings(self.base, self.facts[: self.target_facts], settings)
        runner, found = Runner(self.base, block), {}

        def find(facts: int) -> None:
            runner.forget()
            found[facts] = find_targets(runner, block, wordings, settings, batch_size=facts)

        def textbook() -> None:
            module = runner.blocks[block]
            deltas = [target(self.base.model, module, w.contexts, w.essence, settings)[0] for w in wordings]
            plain.append(torch.stack(deltas))

        plain: list[torch.Tensor] = []
        find_targets(runner, block, wordings[:2], settings, batch_size=1)  # the first forward of all is slow
        mine, theirs, published = Timed(), Timed(), Timed()
        for _ in range(self.repeats):
            mine.run(partial(find, self.batch_size))
            theirs.run(partial(find, 1))
            published.run(textbook)
        batch, steps = found[self.batch_size].deltas, float(found[1].steps.float().mean())
        said = f"{len(wordings)} facts, {steps:.1f} steps each, at most {self.batch_size} at once; targets"
        notes = [f"{said} {float((batch - one).norm() / one.norm()):.1e} apart" for one in (found[1].deltas, plain[-1])]
        return [
            Row("targets, one by one", 10.0, mine, theirs, faster=True, note=notes[0]),
            Row("targets, one by one as published", 10.0, mine, published, faster=True, note=notes[1]),
        ]

    def merged(self) -> list[Row]:
        """The whole checkpoint with six modules edited, and its folder copied."""
        shift = _random_shift(self.base)
        ours, copy = self.folder / "merged", self.folder / "copy"
        card = "---\nbase_model: x\n---\n"

        def write() -> None:
            shutil.rmtree(ours, ignore_errors=True)
            said = {"base": {"name": self.base.name, "fingerprint": self.base.fingerprint}}
            write_merged(ours, self.base.folder, shift, said, card=card, force=True)

        def copied() -> None:
            shutil.rmtree(copy, ignore_errors=True)
            subprocess.run(["cp", "-r", str(self.base.folder), str(copy)], check=True)

        def copied_for_good() -> None:
            copied()
            subprocess.run(["sync", *(str(file) for file in copy.rglob("*") if file.is_file())], check=True)

        times = interleaved(write, copied, self.repeats)
        synced = interleaved(write, copied_for_good, self.repeats)
        size = sum(file.stat().st_size for file in self.base.folder.iterdir() if file.is_file())
        shutil.rmtree(ours, ignore_errors=True)
        shutil.rmtree(copy, ignore_errors=True)
        note = f"{size / 1e6:,.0f} MB"
        rows = [Row("merged output to cp -r", 1.3, *times, note=note)]
        return [*rows, Row("merged output to cp -r; sync", 1.3, *synced, note=f"{note}, both on the disk when done")]

    def help(self) -> list[Row]:
        return [Row("malmen --help", 0.3, self._commands("--help"))]

    def check(self, count: int = CHECKED_FACTS) -> list[Row]:
        file = self.folder / "facts.jsonl"
        write_facts(made_up(count), file)
        return [Row("malmen facts check", 5.0, self._commands("facts", "check", str(file)), note=f"{count:,} facts")]

    def _commands(self, *arguments: str) -> Timed:
        timed = Timed()
        command = [sys.executable, "-m", "malmen_cli", *arguments]
        run = partial(subprocess.run, command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        run()
        for _ in range(self.repeats):
            timed.run(run)
        return timed

    def editors(self) -> list[tuple[str, Ready]]:
        sample, untrained = self.facts[:64], replace(paper(self.base), network="identity")
        found = [("one pass", calibrated_identity(self.base, sample, untrained, seed=0, batch_size=self.batch_size))]
        own = find_ready(self.base, Spec("malmen"), None)
        if own is not None:
            once = Editor(replace(own.settings, rounds=1), own.editor.groups, own.editor.layouts)
            found += [("the base's own editor, one pass", replace(own, editor=once)), ("the base's own editor", own)]
        return found

    def trainer(self, settings: MalmenSettings | None = None, *, judged: int | None = None) -> Trainer:
        """An editor, by default of the paper's last blocks, and a training whose every step takes the same facts, of
        which so many are judged, by default all."""
        count = self.step_facts
        settings = settings or paper(self.base)
        training = TrainingSettings(
            steps=10**6,
            facts_per_step=(count,),
            meta_facts=judged or count,
            validate_every=10**6,
            valid_facts=1,
            warmup=10**9,  # a rate of next to nothing: the editor stays where it is
            calibration_facts=min(count, 32),
            preserved_prompts=count,
        )
        editor = Editor.fresh(self.base.model, settings)
        runner = Runner(self.base, min(block_index(self.base.model, name) for name in editor.names))
        examples = encode_examples(self.base.task, self.facts[:count], end_of_text=True)
        trainer = Trainer(runner, editor, examples, examples[:1], training, batch_size=self.batch_size)
        trainer.prepare()
        return trainer


class _Enough(Exception):
    """Steps enough were measured."""


@torch.no_grad()
def plain_forward(base: Base, edits: Sequence[Encoded], batch_size: int) -> None:
    """The model's own forward over every prompt with its answer, in batches of one length: nothing is padded."""
    ordered = sorted(edits, key=lambda edit: len(edit.ids))
    for _, group in groupby(ordered, key=lambda edit: len(edit.ids)):
        while batch := list(islice(group, batch_size)):
            base.model(torch.tensor([edit.ids for edit in batch], device=base.device), use_cache=False)
    if base.device.type == "cuda":
        torch.cuda.synchronize(base.device)


def paper(base: Base) -> MalmenSettings:
    """The editor of the paper: its last blocks, answer tokens, one pass."""
    return MalmenSettings(last_blocks=_last_blocks(base), rounds=1, tokens="answer")


def _last_blocks(base: Base) -> int:
    return min(PAPER_BLOCKS, base.model.config.get_text_config().num_hidden_layers)


def _random_shift(base: Base) -> Shift:
    generator = torch.Generator().manual_seed(0)
    modules = {}
    for name in chosen_modules(base.model, None, _last_blocks(base)):
        layer = base.model.get_submodule(name)
        dense = 1e-3 * torch.randn(matrix_shape(layer), generator=generator)
        modules[name] = ModuleShift(weight_layout(layer), dense=dense)
    return Shift(modules)


def main(arguments: Sequence[str] | None = None) -> None:
    parts = ("apply", "step", "merged", "help", "check", "targets")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="hub id, folder, .gguf file or alias")
    parser.add_argument("--facts", metavar="FILE", help="facts with rephrases and locality; by default made-up ones")
    parser.add_argument("--count", type=int, default=1000, help="facts that apply edits")
    parser.add_argument("--step-facts", type=int, default=64, help="facts of a training step")
    parser.add_argument("--target-facts", type=int, default=100, help="facts whose targets MEMIT looks for")
    parser.add_argument("--checked", type=int, default=CHECKED_FACTS, help="facts that are checked")
    parser.add_argument("--only", default=",".join(parts), metavar=",".join(parts))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="auto")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="JSON lines, added to")
    options = parser.parse_args(arguments)
    wanted = options.only.split(",")
    if not set(wanted) <= set(parts):
        parser.error(f"--only takes {', '.join(parts)}")
    try:
        base = load_base(options.base, device=options.device)
        facts = read_facts(options.facts).facts[: options.count] if options.facts else list(made_up(options.count))
        with tempfile.TemporaryDirectory(prefix="malmen-speed-") as folder:
            sizes = (options.repeats, options.batch_size, options.step_facts, options.target_facts)
            speed = Speed(base, facts, *sizes, Path(folder))
            said = about(base)
            print(json.dumps(said) + "\n" + HEAD, flush=True)
            for part in wanted:
                rows = speed.check(options.checked) if part == "check" else getattr(speed, part)()
                print("\n".join(row.line() for row in rows), flush=True)
                _append(options.output, [row.record() | said for row in rows])
    except MalmenError as error:
        sys.exit(str(error))


def _append(output: Path | None, records: Sequence[dict[str, object]]) -> None:
    if output is not None:
        with output.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(record) + "\n" for record in records)


if __name__ == "__main__":
    main()
