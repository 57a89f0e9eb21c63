"""The loop: it learns (T10), stops where it must, keeps the best, and goes on bit for bit (T11)."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import malmen_cli.training.calibration as calibration_module
import malmen_cli.training.loop as loop_module
from malmen_cli.artifact.editors import load_editor, save_editor
from malmen_cli.base.prompts import Encoded
from malmen_cli.edit import Ready, make_shift
from malmen_cli.editing.capture import edit_rows
from malmen_cli.editing.editor import Editor, Group, compact
from malmen_cli.editing.replay import Runner
from malmen_cli.editing.shift import applied
from malmen_cli.editing.stacked import Captured, gather
from malmen_cli.exceptions import FactNumericsError, NumericsError
from malmen_cli.facts.fact import Fact
from malmen_cli.training.facts import Example, draw, encode_examples, random_sample
from malmen_cli.training.history import Best, Progress
from malmen_cli.training.loop import BAD_STEPS, MOST_RATIOS, PARTS, STEP_RATIO, Trainer
from malmen_cli.training.objective import MetaLoss
from malmen_cli.training.references import References
from malmen_cli.training.validation import Validation

MakeFacts = Callable[..., list[Fact]]
MakeTrainer = Callable[..., Trainer]


def quiet(progress: Progress) -> None:
    """A report that says nothing."""


@pytest.fixture
def trainer(make_trainer: MakeTrainer, make_facts: MakeFacts) -> Trainer:
    facts = make_facts(30)
    return make_trainer(facts[:24], facts[24:])


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.state()[0].items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# ---------------------------------------------------------------- T10: it learns


def scores(trainer: Trainer, examples: Sequence[Example]) -> dict[str, float]:
    """Teacher-forced ES, GS and LS, and the score, of edits of six facts each."""
    kept, found = trainer.valid, []
    for start in range(0, len(examples), 6):
        trainer.valid = list(examples[start : start + 6])
        found.append(trainer.validate())
    trainer.valid = kept
    means = {key: sum(asdict(v)[key] for v in found) / len(found) for key in asdict(found[0])}
    whole = Validation(**means)
    return {"es": whole.es_teacher_forced, "gs": whole.gs_teacher_forced, "ls": whole.ls_teacher_forced} | {
        "score": whole.score
    }


def at_steps(trainer: Trainer, examples: Sequence[Example], factors: Sequence[float]) -> list[dict[str, float]]:
    """Scores with the steps of the trainer's network times each factor."""
    found, log_lr = [], trainer.editor.groups[0].network.log_lr.data
    kept = log_lr.clone()
    for factor in factors:
        log_lr.copy_(kept + math.log(factor))
        found.append(scores(trainer, examples))
    log_lr.copy_(kept)
    return found


@pytest.mark.slow
def test_training_beats_the_untrained_network_at_any_step(town_trainer: MakeTrainer) -> None:
    """T10: on facts it trained on and on facts it never saw the score is .1 above that of the untrained network at its
    best step, and no step of the untrained network that holds as much locality comes within .15 of its GS, or is more
    than .05 above its ES. ES is that of all ninety facts: of the thirty unseen ones alone a single fact is .033, and in
    five of eight trainings (four draws, this code and an earlier one) two or more of them were missed.

    At one step the two would be compared at different locality: the untrained network's GS can be bought with LS.
    Measured, untrained at its best step -> trained: seen score .36 -> .75, unseen .43 -> .66; with the trained one's LS
    (.77, .77) the untrained reaches GS .07 and .17, the trained .58 and .47. With three other draws the trained one
    scores .59 to .75 and .56 to .74. Six hundred steps leave it to rounding: .67 to .42 in eight runs.
    """
    untrained, trainer = town_trainer(), town_trainer(steps=900, locality_weight=12.0)
    untrained.prepare()
    trainer.prepare()
    trainer.run(quiet, lambda: None)
    short: list[float] = []
    for examples in (trainer.train[:60], trainer.valid):
        before = at_steps(untrained, examples, [2 ** (k / 2) for k in range(-1, 6)])
        after = scores(trainer, examples)
        told = f"{before} -> {after}"
        assert after["score"] >= max(one["score"] for one in before) + 0.1, told
        as_local = [one for one in before if one["ls"] >= after["ls"]]
        assert as_local, told
        assert after["gs"] >= max(one["gs"] for one in as_local) + 0.15, told
        short += [max(one["es"] for one in as_local) - after["es"]] * len(examples)
    assert sum(short) / len(short) <= 0.05, told


def test_the_base_is_bitwise_what_it_was(trainer: Trainer) -> None:
    before = {name: tensor.clone() for name, tensor in trainer.runner.model.state_dict().items()}
    trainer.prepare()
    trainer.run(quiet, lambda: None)
    assert same(before, trainer.runner.model.state_dict())
    assert not any(parameter.requires_grad for parameter in trainer.runner.model.parameters())


def test_reports_and_saves(trainer: Trainer) -> None:
    reported: list[Progress] = []
    saved: list[int] = []
    trainer.prepare()
    trainer.run(reported.append, lambda: saved.append(trainer.step))
    assert [p.step for p in reported] == [1, 2, 3, 4, 5, 6]
    assert [p.step for p in reported if p.validation is not None] == saved == [2, 4, 6]
    assert reported == trainer.history
    assert all(4 <= p.facts <= 8 and p.seconds > 0 and math.isfinite(p.learned + p.moved) for p in reported)


def test_the_last_step_is_validated_whatever_its_number(make_trainer: MakeTrainer, make_facts: MakeFacts) -> None:
    facts = make_facts(16)
    trainer = make_trainer(facts[:12], facts[12:], steps=3)
    trainer.prepare()
    trainer.run(quiet, lambda: None)
    assert [p.step for p in trainer.history if p.validation] == [2, 3]
    assert trainer.best.step in (2, 3)


def test_the_best_is_kept_as_it_was(trainer: Trainer) -> None:
    trainer.prepare()
    for step, score in ((1, 0.4), (2, 0.7), (3, 0.7), (4, 0.5)):
        trainer.step = step
        trainer.editor.groups[0].network.log_lr.data.fill_(float(step))
        trainer._keep_best(Validation(score, score, score, score, score, score))
    assert (trainer.best.step, trainer.best.rank) == (3, pytest.approx((0.7, 0.7)))  # of equals the later
    assert trainer.best.state["0.log_lr"].tolist() == [[3.0] * 3]


def test_validation_is_of_the_first_valid_facts(make_trainer: MakeTrainer, make_facts: MakeFacts) -> None:
    facts = make_facts(16)
    trainer = make_trainer(facts[:8], facts[8:], valid_facts=3)
    expected = encode_examples(trainer.runner.base.task, facts[8:11], end_of_text=True)
    assert trainer.valid == expected


def test_the_schedule_warms_up_and_falls_to_a_tenth(trainer: Trainer) -> None:
    rates = [trainer.settings.schedule(step) for step in range(7)]
    assert rates[0] == pytest.approx(0.5)  # of two steps of warm-up
    assert rates[1] > rates[2] > rates[5] > rates[6] == pytest.approx(0.1)


def test_scales_learn_at_their_own_rate(trainer: Trainer) -> None:
    rates = {id(p): group["peak"] for group in trainer.optimizer.param_groups for p in group["params"]}
    for group in trainer.editor.groups:
        for name, parameter in group.network.named_parameters():
            expected = trainer.settings.scale_lr if name.startswith("log_") else trainer.settings.meta_lr
            assert rates[id(parameter)] == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"network": "identity"},
        {"aggregation": "sum"},
        {"preserved_rank": 0},
        {"tokens": "answer"},
        {"tokens": "all"},
    ],
    ids=str,
)
def test_relatives_train_too(make_trainer: MakeTrainer, make_facts: MakeFacts, settings: dict[str, Any]) -> None:
    """Identity learns its scales alone, MEND has no ridge, and the preserved keys may be left out."""
    facts = make_facts(20)
    trainer = make_trainer(facts[:16], facts[16:], settings=settings, steps=3)
    trainer.prepare()
    network = trainer.editor.groups[0].network
    before = network.log_lr.clone()
    trainer.run(quiet, lambda: None)
    assert not torch.equal(network.log_lr, before)
    none = settings.get("aggregation") == "sum" or settings.get("preserved_rank") == 0
    assert (trainer.editor.groups[0].preserved.energies.shape[-1] == 0) == none


# ---------------------------------------------------------------- one edit in several passes

VARIANTS = pytest.mark.parametrize("variant", [{}, {"aggregation": "sum"}, {"tokens": "all"}], ids=str)
Pass = tuple[list[Captured], list[Any]]


def relative(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((mine - theirs).norm() / theirs.norm())


def stirred(trainer: Trainer) -> Trainer:
    """With a network that is not the identity any more, as after some training."""
    trainer.prepare()
    generator = torch.Generator().manual_seed(5)
    for name, tensor in trainer.editor.groups[0].network.named_parameters():
        if not name.startswith("log_"):
            tensor.data += 0.05 * torch.randn(tensor.shape, generator=generator)
    return trainer


@VARIANTS
@pytest.mark.parametrize("rounds", [1, 3])
def test_a_training_step_s_edit_is_the_one_that_apply_makes(
    make_trainer: MakeTrainer, make_facts: MakeFacts, variant: dict[str, Any], rounds: int
) -> None:
    """In as many passes. `apply` solves in fp64 and streams; training keeps rows, and solves in fp32."""
    facts = make_facts(20)
    trainer = stirred(make_trainer(facts[:16], facts[16:], settings=variant | {"rounds": rounds, "last_blocks": 2}))
    shift, passes = trainer._edit([example.edit for example in trainer.train])
    assert len(passes) == rounds
    wanted = make_shift(trainer.runner.base, Ready(trainer.editor, "malmen"), facts[:16], batch_size=8)
    for name, module in wanted.modules.items():
        assert relative(shift.modules[name].matrix(), module.matrix()) <= 1e-4


@VARIANTS
def test_one_pass_is_the_plain_shift_of_the_captured_rows(
    make_trainer: MakeTrainer, make_facts: MakeFacts, variant: dict[str, Any]
) -> None:
    facts = make_facts(20)
    trainer = stirred(make_trainer(facts[:16], facts[16:], settings=variant | {"rounds": 1}))
    edits, editor = [example.edit for example in trainer.train], trainer.editor
    shift, ((captured, _),) = trainer._edit(edits)
    parts = list(edit_rows(trainer.runner, edits, editor.names, 8, editor.settings.tokens))
    rows = [gather(group, parts) for group in editor.groups]
    assert torch.equal(captured[0].gradients, rows[0].gradients)
    wanted, _ = trainer.method.joined(rows)
    assert all(torch.equal(shift.modules[name].matrix(), wanted.modules[name].matrix()) for name in editor.names)


def test_every_pass_captures_on_the_model_edited_so_far(make_trainer: MakeTrainer, make_facts: MakeFacts) -> None:
    facts = make_facts(20)
    trainer = stirred(make_trainer(facts[:16], facts[16:], settings={"rounds": 3, "last_blocks": 2}))
    edits, editor = [example.edit for example in trainer.train], trainer.editor
    shift, passes = trainer._edit(edits)
    so_far = None
    for captured, _ in passes:
        with applied(trainer.runner.model, so_far) if so_far is not None else nullcontext():
            parts = list(edit_rows(trainer.runner, edits, editor.names, 8, editor.settings.tokens))
        for group, rows in zip(editor.groups, captured, strict=True):
            # To rounding where it is the base's own: these rows are captured in cohorts.
            wanted, tolerance = gather(group, parts), 1e-5 if so_far is None else 0.0
            torch.testing.assert_close(rows.keys, wanted.keys, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(rows.gradients, wanted.gradients, rtol=tolerance, atol=1e-2 * tolerance)
            assert torch.equal(rows.owners, wanted.owners)
            assert torch.equal(rows.roles, wanted.roles)
        more, _ = trainer.method.joined(captured)
        so_far = more if so_far is None else so_far.plus(more)
    assert so_far is not None
    assert all(torch.equal(shift.modules[n].matrix(), so_far.modules[n].matrix()) for n in editor.names)
    first, last = passes[0][0][0].gradients, passes[-1][0][0].gradients
    assert float(last.norm()) < float(first.norm())  # what was learned asks for less


def by_autograd(group: Group, captured: Captured, upstream: torch.Tensor, sums: bool) -> dict[str, torch.Tensor]:
    """d <upstream, S(theta)> / d theta of one pass in fp64, the solve inside the graph and the rows held constant."""
    network = copy.deepcopy(group.network).double()
    keys, gradients = captured.keys.double(), captured.gradients.double()
    if sums:
        pseudo_keys, pseudo_gradients = network.features(keys, gradients, captured.roles)
        shift = -pseudo_keys.mT @ (pseudo_gradients * network.steps(captured.roles))
    else:
        unit = torch.eye(group.dk, dtype=torch.float64).expand(len(group.names), -1, -1)
        system = keys.mT @ keys + network.log_lambda.exp()[:, None, None] * unit
        mu = keys.shape[1] * network.log_mu.exp()
        system = system + mu[:, None, None] * group.preserved.to(torch.float64).times(unit)
        shift = torch.linalg.solve(system, keys.mT @ network.value_shifts(keys, gradients, captured.roles))
    names, parameters = zip(*network.named_parameters(), strict=True)
    found = torch.autograd.grad((upstream.double() * shift).sum(), parameters, allow_unused=True)
    pairs = zip(names, parameters, found, strict=True)
    return {name: torch.zeros_like(p) if g is None else g for name, p, g in pairs}


def learned(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, step: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor, list[Pass]]:
    """Of one `_learn` with the first draw at `step`: parameter gradients, dL/dS, and what the passes captured."""
    seen: dict[str, Any] = {}
    edit, true = trainer._edit, loop_module.meta_loss

    def keep_edit(edits: Any, learning: int) -> Any:
        seen["edit"] = edit(edits, learning)
        return seen["edit"]

    def keep_loss(*arguments: Any, **options: Any) -> MetaLoss:
        seen["loss"] = true(*arguments, **options)
        return seen["loss"]

    (group,) = trainer.editor.groups
    kept = {name: tensor.clone() for name, tensor in group.network.state_dict().items()}
    trainer.step = step
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "_edit", keep_edit)
        patched.setattr(loop_module, "meta_loss", keep_loss)
        loss, sane = trainer._learn(draw(trainer.cohorts, trainer.settings, trainer.seed, 0))
    assert sane
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in group.network.named_parameters()}
    group.network.load_state_dict(kept)  # the update undone, so that another step starts from the same network
    return found, group.stack(loss.gradients), seen["edit"][1]


def agree(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """To what fp32 leaves of a gradient through a solve, as for a single pull-back."""
    assert found.keys() == wanted.keys()
    assert sum(bool(tensor.any()) for tensor in wanted.values()) >= 6
    for name, tensor in wanted.items():
        assert float((found[name] - tensor).norm()) <= 1e-3 * float(tensor.norm()), name


@VARIANTS
def test_a_step_in_one_pass_has_the_gradient_of_that_pass(
    make_trainer: MakeTrainer, make_facts: MakeFacts, monkeypatch: pytest.MonkeyPatch, variant: dict[str, Any]
) -> None:
    facts = make_facts(20)
    trainer = stirred(make_trainer(facts[:16], facts[16:], settings=variant | {"rounds": 1}, clip=1e9))
    (group,) = trainer.editor.groups
    for step in (0, 1):
        found, upstream, ((captured, _),) = learned(trainer, monkeypatch, step)
        agree(found, by_autograd(group, captured[0], upstream, "aggregation" in variant))


@VARIANTS
def test_steps_in_two_passes_have_twice_the_gradient_of_one_pass_in_turn(
    make_trainer: MakeTrainer, make_facts: MakeFacts, monkeypatch: pytest.MonkeyPatch, variant: dict[str, Any]
) -> None:
    """On average over two steps that is the gradient of <dL/dS, S1 + S2>, with the captured rows held constant."""
    facts = make_facts(20)
    trainer = stirred(make_trainer(facts[:16], facts[16:], settings=variant | {"rounds": 2}, clip=1e9))
    (group,) = trainer.editor.groups
    mean: dict[str, torch.Tensor] = {}
    total: dict[str, torch.Tensor] = {}
    for step in (2, 3):
        found, upstream, passes = learned(trainer, monkeypatch, step)
        each = [by_autograd(group, rows[0], upstream, "aggregation" in variant) for rows, _ in passes]
        agree(found, {name: 2 * gradient for name, gradient in each[step % 2].items()})
        # Ten times what `agree` lets pass: the two can be told apart.
        assert any(relative(each[0][n], each[1][n]) > 1e-2 for n in found if each[1][n].any())
        mean = {name: mean.get(name, 0) + gradient / 2 for name, gradient in found.items()}
        total = {name: each[0][name] + each[1][name] for name in found}
    agree(mean, total)


# ---------------------------------------------------------------- the end of a training


@pytest.mark.parametrize("rounds", [1, 3])
def test_finish_validates_exactly_what_is_saved(
    make_trainer: MakeTrainer, make_facts: MakeFacts, tmp_path: Path, rounds: int
) -> None:
    """The best state with one factor on every step, its large tensors halved; read back, it has the same scores."""
    facts = make_facts(30)

    def make() -> Trainer:
        return make_trainer(facts[:24], facts[24:], settings={"rounds": rounds})

    trainer = unbroken(make)
    best = {name: tensor.clone() for name, tensor in trainer.best.state.items()}
    finished = trainer.finish()
    tensors, validation = finished.state, finished.validation
    assert same(trainer.best.state, best)
    assert same(trainer.editor.state(), {name: tensor.float() for name, tensor in tensors.items()})
    assert same({**tensors, "0.log_lr": best["0.log_lr"]}, compact(best))
    power = math.log(finished.step_factor) / math.log(STEP_RATIO)
    assert power == pytest.approx(round(power), abs=1e-9)
    assert abs(round(power)) <= MOST_RATIOS
    torch.testing.assert_close(tensors["0.log_lr"], best["0.log_lr"] + math.log(finished.step_factor))
    save_editor(tmp_path / "editor", tensors, {}, force=False)
    read, _ = load_editor(tmp_path / "editor")
    assert same(read, tensors)
    fresh = make()
    fresh.editor.groups[:] = Editor.restored(fresh.runner.model, fresh.editor.settings, read).groups
    assert fresh.validate() == validation
    assert fresh.validate(PARTS) == finished.in_parts


@pytest.mark.parametrize(
    ("wanted", "asked"),
    [
        (0, [0, 1, -1]),
        (1, [0, 1, 2]),
        (3, [0, 1, 2, 3, 4]),
        (99, [0, 1, 2, 3, 4, 5, 6]),
        (-2, [0, 1, -1, -2, -3]),
        (-99, [0, 1, -1, -2, -3, -4, -5, -6]),
    ],
)
def test_finish_takes_the_best_factor_on_the_best_editor_s_steps(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, wanted: int, asked: list[int]
) -> None:
    """Not on those of the last step, which may have got worse; up or down, as long as it gets better, by the mean of
    the scores of all facts at once and in parts."""
    trainer.prepare()
    trainer.run(quiet, lambda: None)
    kept, network = trainer.best.state["0.log_lr"].clone(), trainer.editor.groups[0].network
    network.log_lr.data.fill_(5.0)
    tried: list[float] = []

    def validated(parts: int = 1) -> Validation:
        power = float((trainer.editor.groups[0].network.log_lr - kept).detach().mean()) / math.log(STEP_RATIO)
        if parts == 1:
            tried.append(power)
        # What pulls one of the two up pulls the other down.
        score = 0.3 + 0.9 ** abs(power - wanted) / 2 + (0.02 if parts == 1 else -0.02) * power
        return Validation(*[score] * 6)

    monkeypatch.setattr(trainer, "validate", validated)
    said: list[str] = []
    finished = trainer.finish(said.append)
    best = max(-MOST_RATIOS, min(wanted, MOST_RATIOS))
    assert tried == pytest.approx(asked, abs=1e-4)
    assert [line.split(":")[0] for line in said] == [f"steps times {STEP_RATIO**power:.3g}" for power in asked]
    assert finished.step_factor == pytest.approx(STEP_RATIO**best)
    assert finished.validation.score == pytest.approx(0.3 + 0.9 ** abs(best - wanted) / 2 + 0.02 * best, rel=1e-3)
    assert finished.in_parts.score == pytest.approx(0.3 + 0.9 ** abs(best - wanted) / 2 - 0.02 * best, rel=1e-3)
    torch.testing.assert_close(finished.state["0.log_lr"], kept + best * math.log(STEP_RATIO))
    assert trainer.method.editor is trainer.editor


@pytest.mark.parametrize(
    ("count", "parts", "sizes"),
    [(8, 1, [8]), (8, 4, [2, 2, 2, 2]), (9, 4, [2, 2, 2, 3]), (6, 4, [1, 2, 1, 2]), (3, 99, [1, 1, 1])],
)
def test_parts_are_edited_each_by_itself(
    make_trainer: MakeTrainer,
    make_facts: MakeFacts,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    parts: int,
    sizes: list[int],
) -> None:
    facts = make_facts(22 + count)
    trainer = make_trainer(facts[:22], facts[22:], valid_facts=count)
    trainer.prepare()
    edited: list[list[Encoded]] = []
    true = trainer._edit
    monkeypatch.setattr(trainer, "_edit", lambda edits: (edited.append(list(edits)), true(edits))[1])
    found = trainer.validate(parts)
    assert [len(edits) for edits in edited] == sizes
    assert [edit for edits in edited for edit in edits] == [example.edit for example in trainer.valid]
    kept, alone = list(trainer.valid), []
    for size in sizes:
        trainer.valid, kept = kept[:size], kept[size:]
        alone.append(trainer.validate())
    for name, share in asdict(found).items():
        assert share == pytest.approx(sum(getattr(one, name) for one in alone) / len(alone)), name


# ---------------------------------------------------------------- steps without a finite loss


@pytest.mark.parametrize("where", ["calibration", "training", "validation"])
def test_nan_on_one_fact_is_named_by_its_id(
    make_trainer: MakeTrainer, make_facts: MakeFacts, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    facts, valid = make_facts(12), make_facts(16)[12:]
    trainer = make_trainer(facts, valid, calibration_facts=12)
    bad = (trainer.valid if where == "validation" else trainer.train)[2]
    if where != "calibration":
        trainer.prepare()

    def broken(runner: Runner, edits: Sequence[Encoded], *rest: Any, **options: Any) -> Any:
        if bad.edit in edits:
            raise FactNumericsError("module: key is not finite for {fact}", edits.index(bad.edit))
        return edit_rows(runner, edits, *rest, **options)

    for module in (loop_module, calibration_module):
        monkeypatch.setattr(module, "edit_rows", broken)
    run = trainer.prepare if where == "calibration" else partial(trainer.run, quiet, lambda: None)
    with pytest.raises(NumericsError, match=f"^module: key is not finite for fact {bad.id}$"):
        run()


def spoilt(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool], how: str = "loss") -> None:
    """The meta-loss, or its gradient, is NaN at the steps that `bad` says."""
    true = loop_module.meta_loss

    def meta_loss(*arguments: Any, **options: Any) -> MetaLoss:
        found = true(*arguments, **options)
        if not bad(trainer.step):
            return found
        if how == "loss":
            return MetaLoss(math.nan, found.moved, found.gradients)
        return MetaLoss(found.learned, found.moved, {k: v * math.inf for k, v in found.gradients.items()})

    monkeypatch.setattr(loop_module, "meta_loss", meta_loss)


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_bad_steps_in_a_row_stop_the_training(
    make_trainer: MakeTrainer, make_facts: MakeFacts, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    facts = make_facts(16)
    trainer = make_trainer(facts[:12], facts[12:], steps=20)
    trainer.prepare()
    spoilt(trainer, monkeypatch, lambda step: True, how)
    before = state(trainer)
    with pytest.raises(NumericsError, match=f"no finite loss or gradient in {BAD_STEPS} steps"):
        trainer.run(quiet, lambda: None)
    assert trainer.step == BAD_STEPS - 1
    after = state(trainer)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not any(name.startswith("optimizer.") for name in after)


def test_a_bad_step_leaves_the_optimizer_alone_and_the_next_goes_on(
    make_trainer: MakeTrainer, make_facts: MakeFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = make_facts(16)
    trainer = make_trainer(facts[:12], facts[12:], steps=12, validate_every=12)
    trainer.prepare()
    spoilt(trainer, monkeypatch, lambda step: step % BAD_STEPS != 0)
    states: list[dict[str, torch.Tensor]] = []

    def report(progress: Progress) -> None:
        states.append({k: v for k, v in state(trainer).items() if not k.startswith("best.")})

    trainer.run(report, lambda: None)
    assert [not same(one, other) for one, other in itertools.pairwise(states)] == [
        step % BAD_STEPS == 0 for step in range(1, 12)
    ]
    counted = [v for k, v in states[-1].items() if k.endswith(".step")]
    assert {float(count) for count in counted} == {3.0}


# ---------------------------------------------------------------- T11: killed and resumed


class Killed(Exception):
    """What a report raises here in place of a power cut."""


def stop_at(step: int) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        if progress.step == step:
            raise Killed

    return report


def unbroken(make: Callable[[], Trainer]) -> Trainer:
    trainer = make()
    trainer.prepare()
    trainer.run(quiet, lambda: None)
    return trainer


def resumed(make: Callable[[], Trainer], folder: Path, step: int) -> Trainer:
    """Killed after `step`, and finished by a fresh trainer from what was on the disk."""
    trainer = make()
    trainer.prepare()

    def save() -> None:
        tensors, plain = trainer.state()
        save_editor(folder, tensors, plain | {"base": {"fingerprint": "0" * 64}}, force=True)

    with pytest.raises(Killed):
        trainer.run(stop_at(step), save)
    fresh = make()
    fresh.restore(*load_editor(folder))
    assert fresh.step == step // 2 * 2 - (2 if step % 2 == 0 else 0)
    fresh.run(quiet, lambda: None)
    return fresh


@pytest.mark.parametrize("step", [3, 4, 5])
@pytest.mark.parametrize(
    "settings",
    [
        {"rounds": 1},
        {"rounds": 3},
        {"aggregation": "sum"},
        {"aggregation": "sum", "rounds": 2},
        {"network": "identity", "preserved_rank": 0},
    ],
    ids=str,
)
def test_killed_and_resumed_is_unbroken_bit_for_bit(
    make_trainer: MakeTrainer, make_facts: MakeFacts, tmp_path: Path, step: int, settings: dict[str, Any]
) -> None:
    facts = make_facts(30)

    def make() -> Trainer:
        return make_trainer(facts[:24], facts[24:], settings=settings)

    whole, broken = unbroken(make), resumed(make, tmp_path / "state", step)
    assert same(state(whole), state(broken))
    assert (whole.best.step, whole.best.rank) == (broken.best.step, broken.best.rank)


def test_a_shared_prompt_does_not_break_the_bits(
    make_trainer: MakeTrainer, make_facts: MakeFacts, tmp_path: Path
) -> None:
    """Facts that share probes and wordings over cohorts, and validation facts that share them with training."""
    facts = make_facts(30)
    one = facts[0]
    shared = [Fact(f.id, f.prompt, f.target, rephrases=one.rephrases, locality=one.locality) for f in facts[20:]]

    def make() -> Trainer:
        return make_trainer([*facts[:20], *shared[:4]], shared[4:])

    assert same(state(unbroken(make)), state(resumed(make, tmp_path / "state", 3)))


def test_the_base_s_own_text_is_asked_in_the_same_company_after_resuming(
    make_trainer: MakeTrainer, make_facts: MakeFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding differs with the company, whether or not it does on these few tokens."""
    facts = make_facts(30, probes=False)
    companies: dict[References, dict[tuple[int, ...], Sequence[tuple[int, ...]]]] = {}
    compute = References._compute

    def spy(self: References, company: Sequence[tuple[int, ...]]) -> None:
        companies.setdefault(self, {}).update(dict.fromkeys(company, company))
        compute(self, company)

    monkeypatch.setattr(References, "_compute", spy)
    whole = unbroken(lambda: make_trainer(facts[:24], facts[24:]))
    broken = resumed(lambda: make_trainer(facts[:24], facts[24:]), tmp_path / "state", 3)
    assert companies[broken.references] == companies[whole.references]


def test_facts_without_probes_are_held_by_the_base_s_own_text_bit_for_bit(
    make_trainer: MakeTrainer, make_facts: MakeFacts, tmp_path: Path
) -> None:
    facts = make_facts(30, probes=False)

    def make() -> Trainer:
        return make_trainer(facts[:24], facts[24:])

    whole = unbroken(make)
    assert all(p.moved > 0 for p in whole.history)
    assert same(state(whole), state(resumed(make, tmp_path / "state", 3)))


def test_a_step_whose_facts_have_no_probe_left_is_held_too(make_trainer: MakeTrainer, make_facts: MakeFacts) -> None:
    """A probe shared by all stays with one fact; the others' steps must not go without locality."""
    facts = make_facts(24)
    shared = [Fact(f.id, f.prompt, f.target, rephrases=f.rephrases, locality=facts[0].locality) for f in facts]
    trainer = unbroken(lambda: make_trainer(shared[:20], shared[20:]))
    assert all(p.moved > 0 for p in trainer.history)


def test_restored_state_is_what_was_saved(trainer: Trainer, make_trainer: MakeTrainer, make_facts: MakeFacts) -> None:
    trainer.prepare()
    trainer.run(quiet, lambda: None)
    tensors, plain = trainer.state()
    facts = make_facts(30)
    fresh = make_trainer(facts[:24], facts[24:])
    fresh.restore(dict(tensors), plain)
    assert same(fresh.state()[0], tensors)
    assert fresh.state()[1] == plain
    assert fresh.method.editor is fresh.editor


def test_before_the_first_validation_there_is_no_best(trainer: Trainer) -> None:
    trainer.prepare()
    assert trainer.best == Best(-1, (-1.0, -1.0), {})
    tensors, plain = trainer.state()
    assert plain == {"step": 0, "best": {"step": -1, "rank": [-1.0, -1.0]}}
    assert {name.split(".")[0] for name in tensors} == {"editor"}


def test_progress_comes_back_from_plain_data() -> None:
    for validation in (None, Validation(1, 0.5, 0.25, 0, 1, 1)):
        progress = Progress(3, 0.5, 0.25, 8, 1.5, validation)
        assert Progress.from_plain(asdict(progress)) == progress


# ---------------------------------------------------------------- what preparing takes


def test_calibration_is_judged_on_facts_that_it_edits(
    make_trainer: MakeTrainer, make_facts: MakeFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = make_facts(40)
    trainer = make_trainer(facts[:36], facts[36:], facts_per_step=(32,), calibration_facts=16)
    seen: dict[str, Any] = {}

    def calibrate(editor: Any, runner: Any, edits: Any, wordings: Any, references: Any, **options: Any) -> None:
        seen.update(edits=edits, wordings=wordings, references=references)

    monkeypatch.setattr(loop_module, "calibrate", calibrate)
    trainer.prepare()
    of_wording = {w.ids: e.edit.ids for e in trainer.train for w in e.wordings()}
    assert len(seen["edits"]) == len(seen["references"]) == 16
    assert {of_wording[w.ids] for w in seen["wordings"]} <= {e.ids for e in seen["edits"]}


def test_preserved_prompts_are_bounded_and_the_same_for_the_same_seed(trainer: Trainer) -> None:
    prompts = trainer._prompts_to_preserve()
    everything = sum(len(e.wordings()) + len(e.probes) for e in trainer.train)
    assert len(prompts) == everything
    assert prompts == trainer._prompts_to_preserve()
    assert random_sample(range(100), 5, 1) == random_sample(range(100), 5, 1) != random_sample(range(100), 5, 2)


def test_references_of_the_training_are_asked_once(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    compute = References._compute

    def spy(self: References, company: Sequence[tuple[int, ...]]) -> None:
        asked.extend(company)
        compute(self, company)

    monkeypatch.setattr(References, "_compute", spy)
    trainer.prepare()
    trainer.run(quiet, lambda: None)
    assert len(asked) == len(set(asked))


def test_calibration_prefers_facts_that_have_probes(
    make_trainer: MakeTrainer, make_facts: MakeFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most facts here share one probe, which stays with the first of them."""
    facts = make_facts(24)
    shared = [
        Fact(f.id, f.prompt, f.target, locality=facts[0].locality if i > 4 else f.locality) for i, f in enumerate(facts)
    ]
    trainer = make_trainer(shared[:20], shared[20:], calibration_facts=4)
    own = {probe.ids for group in trainer.cohorts for example in group for probe in example.probes}
    seen: dict[str, Any] = {}
    monkeypatch.setattr(loop_module, "calibrate", lambda *given, **options: seen.update(references=given[4]))
    trainer.prepare()
    assert {r.sequence.ids[: r.sequence.n_prompt] for r in seen["references"]} <= own
