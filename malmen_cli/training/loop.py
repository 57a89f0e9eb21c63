"""The meta-training loop.

Every step is a function of (seed, step) and the editor's state, so a run that was killed and resumed ends in the
same bits as one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from malmen_cli.base import ranks
from malmen_cli.base.prompts import Encoded
from malmen_cli.base.sampling import own_probes
from malmen_cli.editing.capture import edit_rows
from malmen_cli.editing.editor import Editor, compact
from malmen_cli.editing.methods.malmen import Malmen
from malmen_cli.editing.replay import Runner
from malmen_cli.editing.ridge import Solution
from malmen_cli.editing.shift import Shift, applied
from malmen_cli.editing.stacked import Captured, deal
from malmen_cli.exceptions import NumericsError, naming
from malmen_cli.training.calibration import Calibration, calibrate, preserve
from malmen_cli.training.facts import Cohort, Draw, Example, cohorts, draw, random_sample
from malmen_cli.training.history import Best, Finished, Progress
from malmen_cli.training.objective import MetaLoss, meta_loss
from malmen_cli.training.references import References
from malmen_cli.training.rows import BaseRows
from malmen_cli.training.settings import TrainingSettings
from malmen_cli.training.validation import AtSizes, Validation, climb, validate

COHORT = 32  # facts drawn together: enough for a full LM batch, few enough for many different draws
STEP_RATIO, MOST_RATIOS = 1.2, 6  # what every step of the trained editor is changed by while that helps, and how often
PARTS = 4  # in which the validation facts are edited too, when that factor is chosen
BAD_STEPS = 5  # consecutive steps without a finite loss, after which training stops


class Trainer:
    """Trains one editor on one base. Build it, `prepare()` or `restore()` it, then `run()`."""

    def __init__(
        self,
        runner: Runner,
        editor: Editor,
        train: Sequence[Example],
        valid: Sequence[Example],
        settings: TrainingSettings,
        *,
        seed: int = 0,
        batch_size: int = 64,
    ) -> None:
        self.runner, self.editor, self.settings = runner, editor, settings
        self.train, self.valid = list(train), list(valid)[: settings.valid_facts]
        self.seed, self.batch_size = seed, batch_size
        self.method = Malmen(editor)
        self.step = 0
        self.best = Best()
        self.history: list[Progress] = []
        self.calibration: Calibration | None = None
        self.optimizer = self._optimizer()
        self.cohorts = cohorts(self.train, min(COHORT, settings.meta_facts, *settings.facts_per_step), seed)
        self.references = References(runner, settings.continuation, batch_size)
        self.rows = BaseRows(runner, editor.names, editor.settings.tokens, batch_size)
        own = not all(any(e.probes for e in group) for group in (*self.cohorts, *self._parts(PARTS)))
        self._own_probes = own_probes(runner.base, seed) if own else []
        self.references.keep_company(self._own_probes)
        for group in (*self.cohorts, *cohorts(self.valid, batch_size, seed)):
            self._keep_company(group)

    def prepare(self, note: Callable[[str], None] = lambda text: None) -> None:
        """Preserved keys, normaliser and step of a fresh editor, from the training facts."""
        prompts = self._prompts_to_preserve()
        note(f"preserved keys from {len(prompts)} prompts")
        preserve(self.editor, self.runner, prompts, self.batch_size)
        # From the back: the facts that are judged in training come from the front. With probes, where there are any.
        held = [group for group in self.cohorts if any(example.probes for example in group)] or self.cohorts
        chosen = [example for group in reversed(held) for example in group][: self.settings.calibration_facts]
        references = self.references.of([p for e in chosen for p in e.probes[:1]] or self._own_probes)
        with naming([example.id for example in chosen]):
            self.calibration = calibrate(
                self.editor,
                self.runner,
                [example.edit for example in chosen],
                [example.wordings()[-1] for example in chosen],
                references,
                locality_weight=self.settings.locality_weight,
                batch_size=self.batch_size,
                note=note,
            )

    def run(self, report: Callable[[Progress], None], save: Callable[[], None]) -> None:
        """Train to the last step. report: called after every step; save: called after every validation.

        Raises NumericsError after BAD_STEPS steps in a row without a finite loss or gradient.
        """
        bad = 0
        while self.step < self.settings.steps:
            started = time.perf_counter()
            drawn = draw(self.cohorts, self.settings, self.seed, self.step)
            loss, sane = self._learn(drawn)
            bad = 0 if sane else bad + 1
            if bad == BAD_STEPS:
                raise NumericsError(
                    f"training: no finite loss or gradient in {BAD_STEPS} steps up to {self.step}; lower meta_lr"
                )
            self.step += 1
            progress = Progress(self.step, loss.learned, loss.moved, len(drawn.edits), 0.0)
            due = self.step % self.settings.validate_every == 0 or self.step == self.settings.steps
            if due:
                progress.validation = self.validate()
                self._keep_best(progress.validation)
            progress.seconds = time.perf_counter() - started
            self.history.append(progress)
            report(progress)
            if due:
                save()

    def validate(self, parts: int = 1) -> Validation:
        """Scores with the present editor: of one edit of all validation facts, or the mean over edits of that many
        parts of them, each by itself."""
        return Validation.mean([self._validate(part) for part in self._parts(parts)])

    def _parts(self, parts: int) -> list[Sequence[Example]]:
        """The validation facts in so many parts that differ by one fact at most; in fewer where there are fewer."""
        count, parts = len(self.valid), max(1, min(parts, len(self.valid)))
        return [self.valid[i * count // parts : (i + 1) * count // parts] for i in range(parts)]

    def _validate(self, examples: Sequence[Example]) -> Validation:
        references = self.references.of([p for e in examples for p in e.probes[:1]] or self._own_probes)
        with naming([e.id for e in examples]):
            shift, _ = self._edit([e.edit for e in examples])
        with applied(self.runner.model, shift, stored=self.runner.base.stored):
            end = self.editor.settings.end_of_text and self.runner.task.ends_answers
            return validate(self.runner, examples, references, self.batch_size, end_of_text=end)

    def finish(self, note: Callable[[str], None] = lambda text: None) -> Finished:
        """The best editor as it is saved; the trainer goes on from it.

        The meta-loss weighs locality in nats, the score in shares of answers: where on the curve between learning and
        keeping the score is best is found at the end, by one factor on every step. It is judged on the validation facts
        all at once and in PARTS parts, since one editor is to serve few facts and many, and many put up with less.
        """
        self._take(compact(self.best.state))
        trained = [group.network.log_lr.detach().clone() for group in self.editor.groups]

        def scale(power: int) -> float:
            factor = STEP_RATIO**power
            for group, log_lr in zip(self.editor.groups, trained, strict=True):
                group.network.log_lr.data.copy_(log_lr + math.log(factor))
            return factor

        def judge(power: int) -> AtSizes:
            factor = scale(power)
            found = AtSizes(self.validate(), self.validate(PARTS))
            note(f"steps times {factor:.3g}: {found}")
            return found

        best, found = climb(judge, MOST_RATIOS)
        factor = scale(best)
        return Finished(compact(self.editor.state()), factor, found.whole, found.parts, len(self._parts(PARTS)))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything `restore` needs: tensors, and plain data."""
        tensors = {f"editor.{k}": v for k, v in self.editor.state().items()} | {
            f"best.{k}": v for k, v in self.best.state.items()
        }
        for index, parameter in enumerate(self.editor.parameters()):
            for name, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
        plain = {"step": self.step, "best": {"step": self.best.step, "rank": list(self.best.rank)}}
        return tensors, plain

    def restore(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        """Continue where `state()` was taken."""
        device = next(self.editor.parameters()).device

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v.to(device) for k, v in tensors.items() if k.startswith(prefix)}

        self._take(part("editor."))
        moments = part("optimizer.")
        for index, parameter in enumerate(self.editor.parameters()):
            mine = {k.removeprefix(f"{index}."): v for k, v in moments.items() if k.startswith(f"{index}.")}
            if mine:
                self.optimizer.state[parameter] = mine | {"step": mine["step"].cpu()}
        self.step = int(plain["step"])
        score, mean = plain["best"]["rank"]
        self.best = Best(int(plain["best"]["step"]), (float(score), float(mean)), part("best."))

    def _edit(
        self, edits: Sequence[Encoded], learning: int | None = None
    ) -> tuple[Shift, list[tuple[list[Captured], list[Solution | None]]]]:
        """One shift of all edits, made in the editor's passes, and the captured rows and solutions of each pass.
        learning: the pass that is to be pulled back through, if one is."""
        tokens, shift, passes = self.editor.settings.tokens, None, []
        for number in range(self.editor.settings.passes):
            if shift is None:
                parts = self.rows.of(edits)
            else:
                with applied(self.runner.model, shift):
                    parts = list(edit_rows(self.runner, edits, self.editor.names, self.batch_size, tokens, keep=True))
            captured = [deal(group, parts) for group in self.editor.groups]
            more, solutions = self.method.joined(captured, learning=number == learning)
            shift = more if shift is None else shift.plus(more)
            passes.append((captured, solutions))
        assert shift is not None
        return shift, passes

    def _learn(self, drawn: Draw) -> tuple[MetaLoss, bool]:
        """One step: edit, judge under the edit, pull the meta-gradient back through the solve, and update."""
        editor = self.editor
        references = self.references.of(drawn.probes or self._own_probes[: len(drawn.wordings)])
        # The shifts of all passes add up, so each has the gradient of their sum, and one pass in turn stands for all of
        # them. That an earlier pass changes what a later one captures is left out: it needs second derivatives.
        chosen = self.step % editor.settings.passes
        with naming(drawn.ids):
            shift, passes = self._edit(drawn.edits, chosen)
        with applied(self.runner.model, shift):
            loss = meta_loss(
                self.runner,
                drawn.wordings,
                references,
                editor.names,
                locality_weight=self.settings.locality_weight,
                batch_size=self.batch_size,
            )
        self.optimizer.zero_grad(set_to_none=True)
        captured, solutions = passes[chosen]
        for group, rows, solution in zip(editor.groups, captured, solutions, strict=True):
            self.method.pull_back(group, rows, group.stack(loss.gradients) * len(passes), solution)
        norm = torch.nn.utils.clip_grad_norm_(list(editor.parameters()), self.settings.clip)
        sane = ranks.all_say(math.isfinite(loss.total(1.0)) and bool(torch.isfinite(norm)))
        if sane:
            for rates in self.optimizer.param_groups:
                rates["lr"] = rates["peak"] * self.settings.schedule(self.step)
            self.optimizer.step()
            ranks.same(*(parameter.data for parameter in editor.parameters()))
        return loss, sane

    def _take(self, state: dict[str, Tensor]) -> None:
        restored = Editor.restored(self.runner.model, self.editor.settings, state, where="training state")
        self.editor.groups[:] = restored.groups
        self.optimizer = self._optimizer()

    def _keep_company(self, group: Cohort) -> None:
        """What a later step computes for one fact of a cohort it computes for all of them."""
        edits = [example.edit for example in group]
        self.runner.keep_company(edits, self.batch_size)
        self.rows.keep_company(edits, [example.id for example in group])
        for place in range(max(len(example.rephrases) for example in group)):
            self.runner.keep_company([e.rephrases[place] for e in group if place < len(e.rephrases)], self.batch_size)
        for place in range(max(len(example.probes) for example in group)):
            self.references.keep_company([e.probes[place] for e in group if place < len(e.probes)])

    def _optimizer(self) -> torch.optim.Adam:
        scales: list[torch.nn.Parameter] = []
        others: list[torch.nn.Parameter] = []
        for group in self.editor.groups:
            for name, parameter in group.network.named_parameters():
                (scales if name.startswith("log_") else others).append(parameter)
        settings = self.settings
        groups = [{"params": others, "peak": settings.meta_lr}, {"params": scales, "peak": settings.scale_lr}]
        return torch.optim.Adam([g | {"lr": g["peak"]} for g in groups if g["params"]])

    def _keep_best(self, validation: Validation) -> None:
        if validation.rank >= self.best.rank:  # of equals the later one, which learned longer
            state = {name: tensor.clone() for name, tensor in self.editor.state().items()}
            self.best = Best(self.step, validation.rank, state)

    def _prompts_to_preserve(self) -> list[Encoded]:
        prompts = [w for e in self.train for w in e.wordings()] + [p for e in self.train for p in e.probes]
        return random_sample(prompts, self.settings.preserved_prompts, self.seed)
