"""The search for the step, what is frozen before it, and the preserved keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import malmen_cli.training.calibration as calibration_module
from malmen_cli.base.model import Base
from malmen_cli.base.sampling import sampled_texts
from malmen_cli.editing.capture import PROMPT_END, SUBJECT, all_keys, edit_rows
from malmen_cli.editing.editor import Editor
from malmen_cli.editing.methods.malmen import Malmen
from malmen_cli.editing.replay import Runner
from malmen_cli.editing.settings import MalmenSettings
from malmen_cli.editing.shift import IN_OUT, ModuleShift, Shift, applied
from malmen_cli.editing.stacked import gather
from malmen_cli.exceptions import NumericsError
from malmen_cli.facts.fact import Fact
from malmen_cli.training.calibration import (
    LIKELY,
    PUSH_LIMIT,
    REFINEMENTS,
    SHARE,
    STEPS,
    Calibration,
    _search,
    calibrate,
    preserve,
    scaled,
)
from malmen_cli.training.facts import Example, encode_examples
from malmen_cli.training.objective import MetaLoss, meta_loss
from malmen_cli.training.references import References

Setup = tuple[Editor, Runner, list[Example]]
MakeSetup = Callable[..., Setup]


@pytest.fixture
def setup(tiny_base: Base, make_facts: Callable[..., list[Fact]]) -> MakeSetup:
    """`setup(facts=8, **settings)`: a fresh editor, a runner in front of it, and examples."""

    def build(facts: int = 8, **settings: Any) -> Setup:
        chosen = {"last_blocks": 2, "rank": 4, "preserved_rank": 6} | settings
        editor = Editor.fresh(tiny_base.model, MalmenSettings(**chosen))
        examples = encode_examples(tiny_base.task, make_facts(facts), end_of_text=True)
        return editor, Runner(tiny_base), examples

    return build


def found_by(setup: Setup, **options: Any) -> Calibration:
    editor, runner, examples = setup
    references = References(runner, 3, 4).of([p for e in examples for p in e.probes])
    wordings = [w for e in examples for w in e.wordings()]
    given = {"locality_weight": 1.0, "batch_size": 4} | options
    return calibrate(editor, runner, [e.edit for e in examples], wordings, references, **given)


# ---------------------------------------------------------------- the search


@pytest.mark.parametrize(("wanted", "tried"), [(0.013, 7), (0.05, 7), (0.3, 6), (0.77, 7), (2.0, 9), (9.0, 9)])
def test_search_finds_the_best_step_of_a_smooth_objective(wanted: float, tried: int) -> None:
    """Wherever it is, and past it, on both sides, no more than two of STEPS are tried."""
    asked: list[float] = []

    def objective(step: float) -> float:
        asked.append(step)
        return math.log(step / wanted) ** 2

    assert abs(math.log(_search(objective) / wanted)) < math.log(2) / 2**REFINEMENTS
    assert len(asked) == tried + 2 * REFINEMENTS


def test_search_goes_on_behind_one_bad_step() -> None:
    assert _search(lambda step: 3.0 if 0.05 < step < 0.1 else abs(math.log(step / 0.02))) == pytest.approx(0.02)


def test_search_goes_on_while_nothing_is_finite() -> None:
    assert 0.01 <= _search(lambda step: math.inf if step > 0.011 else 1.0) <= 0.011


def test_search_passes_by_steps_that_are_not_finite() -> None:
    best = _search(lambda step: math.inf if step > 0.5 else -step)
    assert 0.4 < best <= 0.5


def test_steps_are_one_percent_to_ten_times() -> None:
    assert STEPS[0] == 0.01
    assert STEPS[-1] == pytest.approx(10.24)


# ---------------------------------------------------------------- calibrate


@pytest.mark.parametrize(
    "method",
    [
        {},
        {"network": "identity"},
        {"aggregation": "sum"},
        {"centre": False},
        {"tokens": "answer"},
        {"tokens": "all"},
    ],
    ids=str,
)
def test_the_step_found_is_the_best_of_those_tried_and_is_in_log_lr(setup: MakeSetup, method: dict[str, Any]) -> None:
    """The editor left behind makes exactly the shift whose loss was reported, where it makes it in one pass."""
    parts = editor, runner, examples = setup(rounds=1, **method)
    found = found_by(parts, locality_weight=0.5)
    best = min(found.tried, key=lambda key: found.tried[key])
    assert float(best) == pytest.approx(found.step, rel=1e-3)
    assert found.tried[best] == pytest.approx(found.learned + 0.5 * found.moved, abs=1e-5)
    rows = list(edit_rows(runner, [e.edit for e in examples], editor.names, 4, editor.settings.tokens))
    shift, _ = Malmen(editor).joined([gather(group, rows) for group in editor.groups])
    references = References(runner, 3, 4).of([p for e in examples for p in e.probes])
    with applied(runner.model, shift):
        again = meta_loss(
            runner,
            [w for e in examples for w in e.wordings()],
            references,
            editor.names,
            locality_weight=0.5,
            batch_size=3,
            gradients=False,
        )
    assert again.learned == pytest.approx(found.learned, rel=1e-3)
    assert again.moved == pytest.approx(found.moved, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("method", [{}, {"network": "identity"}, {"aggregation": "sum"}], ids=str)
@pytest.mark.parametrize("rounds", [2, 5])
def test_each_of_several_passes_takes_a_share_of_the_best_single_step(
    setup: MakeSetup, method: dict[str, Any], rounds: int
) -> None:
    """The search is that of a single pass and so is its record; only the step that is left behind is divided."""
    (one, *_), (several, *_) = single, parts = setup(rounds=1, **method), setup(rounds=rounds, **method)
    assert found_by(parts) == found_by(single)
    steps = several.groups[0].network.log_lr - one.groups[0].network.log_lr
    torch.testing.assert_close(steps, torch.full_like(steps, math.log(SHARE / rounds)), rtol=1e-5, atol=1e-5)
    for name in ("0.mean", "0.std", "0.limit", "0.log_lambda", "0.log_mu"):
        assert torch.equal(several.state()[name], one.state()[name]), name


def test_scales_start_at_the_spec_in_units_of_the_keys(setup: MakeSetup) -> None:
    parts = editor, runner, examples = setup(ridge_lambda=2.5, preserved_weight=7.0)
    found_by(parts)
    rows = list(edit_rows(runner, [e.edit for e in examples], editor.names, 4, editor.settings.tokens))
    group = editor.groups[0]
    keys = gather(group, rows).keys
    torch.testing.assert_close(group.network.log_lambda.exp(), 2.5 * keys.square().mean((1, 2)))
    assert group.network.log_mu.exp().tolist() == pytest.approx([7.0, 7.0])
    assert bool((group.network.log_lr != 0).all())


def test_a_weight_of_zero_keeps_log_mu_finite(setup: MakeSetup) -> None:
    parts = editor, *_ = setup(preserved_weight=0.0)
    assert math.isfinite(found_by(parts).learned)
    assert bool(torch.isfinite(editor.groups[0].network.log_mu).all())


def test_the_step_does_not_depend_on_the_units_of_a_module(setup: MakeSetup) -> None:
    """log_lr is relative: step 1 moves a row's value by about the module's own output there."""
    parts = editor, runner, examples = setup(network="identity", rounds=1)
    found = found_by(parts)
    group = editor.groups[0]
    rows = list(edit_rows(runner, [e.edit for e in examples], editor.names, 4, editor.settings.tokens))
    captured, roles = gather(group, rows), torch.cat([part.roles for part in rows])
    with torch.no_grad():
        shifts = group.network.value_shifts(captured.keys, captured.gradients, captured.roles).norm(dim=-1) / found.step
    outputs = torch.cat([group.stack(part.values) for part in rows], 1).norm(dim=-1)
    for role in range(group.network.roles):
        ratio = shifts[:, captured.roles == role].mean(-1) / outputs[:, roles == role].mean(-1)
        if role == SUBJECT:  # which nothing reads behind the last block
            assert ratio[1] == 0
            ratio = ratio[:1]
        assert bool(((ratio > 0.3) & (ratio < 3)).all()), ratio


def test_identity_is_not_centred_and_the_others_are(setup: MakeSetup) -> None:
    for method, centred in (({"network": "identity"}, False), ({}, True), ({"centre": False}, False)):
        parts = editor, runner, examples = setup(**method)
        found_by(parts)
        network = editor.groups[0].network
        captured = gather(
            editor.groups[0],
            list(edit_rows(runner, [e.edit for e in examples], editor.names, 4, editor.settings.tokens)),
        )
        features = torch.cat(network.features(captured.keys, captured.gradients, captured.roles), -1)
        assert bool((network.mean == 0).all()) is not centred
        for role in range(network.roles):
            mine, wanted = captured.roles == role, torch.ones(2, 96)
            if centred:
                torch.testing.assert_close(features[:, mine].mean(1), torch.zeros(2, 96), atol=1e-3, rtol=0)
                continue
            if role == SUBJECT:
                wanted[1, 64:] = 0  # the gradients behind which nothing reads
            torch.testing.assert_close(features[:, mine].square().mean(1), wanted, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "method", [{}, {"network": "identity"}, {"tokens": "answer"}, {"tokens": "all"}, {"tokens": "all", "centre": False}]
)
def test_a_single_fact(setup: MakeSetup, method: dict[str, Any]) -> None:
    parts = editor, runner, examples = setup(1, **method)
    found = found_by(parts)
    assert math.isfinite(found.learned)
    shift = Malmen(editor).shift(runner, [examples[0].edit], ["one"], batch_size=4)
    norms = [float(module.matrix().norm()) for module in shift.modules.values()]
    assert all(0 < norm < math.inf for norm in norms)


@pytest.mark.parametrize(
    "method",
    [
        {"tokens": "subject"},
        {"tokens": "all"},
        # Without centring; a single row, centred, is at its own mean and would not push.
        *({"tokens": tokens, "network": "identity"} for tokens in ("answer", "subject", "all")),
    ],
    ids=str,
)
def test_a_single_fact_of_one_token_is_not_held_back_by_rows_that_do_not_push(
    setup: MakeSetup, method: dict[str, Any]
) -> None:
    """A role with one row has the limit of all rows, of which most have no gradient behind the last block."""
    editor, runner, (example,) = setup(1, **method)
    edit = replace(example.edit, ids=example.edit.ids[: example.edit.n_prompt + 1])
    assert len(edit.answer) == 1
    found_by((editor, runner, [replace(example, edit=edit)]))
    (group,) = editor.groups
    captured = gather(group, list(edit_rows(runner, [edit], editor.names, 4, method["tokens"])))
    with torch.no_grad():
        pseudo_keys, pseudo_gradients = group.network.features(captured.keys, captured.gradients, captured.roles)
    push = (captured.keys * pseudo_keys).sum(-1).abs() * pseudo_gradients.norm(dim=-1)
    answer = captured.roles == PROMPT_END
    assert bool((push[:, answer] > 0).all())
    for module in range(2):
        pushing = push[module][push[module] > 0]
        limit = group.network.limit[module, PROMPT_END].item()
        assert limit == pytest.approx(PUSH_LIMIT * pushing.median().item(), rel=1e-4)
    shift = Malmen(editor).shift(runner, [edit], ["one"], batch_size=4)
    assert all(float(module.matrix().norm()) > 1e-3 for module in shift.modules.values())


def test_nan_everywhere_is_a_numerics_error(setup: MakeSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_module, "meta_loss", lambda *a, **o: MetaLoss(math.nan, 0.0, {}))
    with pytest.raises(NumericsError, match="no step with a finite meta-loss"):
        found_by(setup())


def test_steps_without_a_finite_loss_are_left_out_of_the_record(
    setup: MakeSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tried` goes into malmen.json, and JSON has no NaN."""
    true, count = calibration_module.meta_loss, 0

    def overflowing(*arguments: Any, **options: Any) -> MetaLoss:
        nonlocal count
        count += 1
        found = true(*arguments, **options)
        return MetaLoss(math.nan, math.inf, {}) if count in (2, 3) else found

    monkeypatch.setattr(calibration_module, "meta_loss", overflowing)
    found = found_by(setup())
    assert all(map(math.isfinite, found.tried.values()))
    assert len(found.tried) == count - 2
    assert not {f"{STEPS[LIKELY - 1]:.4g}", f"{STEPS[LIKELY - 2]:.4g}"} & set(found.tried)
    assert found.step > STEPS[LIKELY - 1]


def test_notes_and_repetition(setup: MakeSetup) -> None:
    notes: list[str] = []
    first = found_by(setup(), note=notes.append)
    assert len(notes) == len(first.tried)
    assert notes[0].startswith(f"step {STEPS[LIKELY]:.3g}: learned ")
    assert found_by(setup()) == first


def test_scaled() -> None:
    left, right = torch.randn(4, 2), torch.randn(2, 3)
    found = scaled(Shift({"a": ModuleShift(IN_OUT, left=left, right=right)}), -2.0).modules["a"]
    assert found.layout == IN_OUT
    torch.testing.assert_close(found.matrix(), -2 * left @ right)


# ---------------------------------------------------------------- roles


def without_subject(setup: Setup, keep: int = 0) -> Setup:
    """The same, with no subject known but in the first `keep` facts."""
    editor, runner, examples = setup
    bare = [replace(e, edit=replace(e.edit, subject=None)) for e in examples[keep:]]
    return editor, runner, examples[:keep] + bare


@pytest.mark.parametrize("method", [{}, {"network": "identity"}], ids=["centred", "not centred"])
@pytest.mark.parametrize("keep", [0, 1])
def test_a_role_without_rows_takes_the_normaliser_of_all_rows(
    setup: MakeSetup, method: dict[str, Any], keep: int
) -> None:
    """One row alone has no spread: what is divided by it would be a million times too large."""
    parts = editor, runner, examples = without_subject(setup(**method), keep)
    found_by(parts)
    (group,) = editor.groups
    captured = gather(group, list(edit_rows(runner, [e.edit for e in examples], editor.names, 4, "subject")))
    assert captured.roles.eq(SUBJECT).sum() == keep
    rows = torch.cat([captured.keys, captured.gradients], -1)
    network = group.network
    wanted_mean = torch.zeros(2, 96) if method else rows.mean(1)
    wanted = rows.square().mean(1).sqrt() if method else rows.std(1)
    torch.testing.assert_close(network.mean[:, SUBJECT], wanted_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(network.std[:, SUBJECT], wanted, rtol=1e-4, atol=1e-7)
    for role in range(SUBJECT):
        mine = rows[:, captured.roles == role]
        wanted = mine.square().mean(1).sqrt() if method else mine.std(1)
        torch.testing.assert_close(network.std[:, role], wanted, rtol=1e-4, atol=1e-7)
    assert bool(network.log_lr.isfinite().all())
    known = [e.edit for e in setup(**method)[2]]
    (later,) = edit_rows(runner, known, editor.names, 100, "subject")
    everything = gather(group, [later])
    features = torch.cat(network.features(everything.keys, everything.gradients, everything.roles), -1)
    assert float(features.detach().abs().max()) < 100


@pytest.mark.parametrize("tokens", ["answer", "subject", "all"])
def test_the_limit_is_some_times_the_median_push_of_a_role(setup: MakeSetup, tokens: str) -> None:
    parts = editor, runner, examples = setup(tokens=tokens)
    found_by(parts)
    (group,) = editor.groups
    captured = gather(group, list(edit_rows(runner, [e.edit for e in examples], editor.names, 4, tokens)))
    with torch.no_grad():
        pseudo_keys, pseudo_gradients = group.network.features(captured.keys, captured.gradients, captured.roles)
    push = (captured.keys * pseudo_keys).sum(-1).abs() * pseudo_gradients.norm(dim=-1)
    for role in range(group.network.roles):
        median = push[:, captured.roles == role].median(-1).values.clamp(min=torch.finfo(torch.float32).tiny)
        torch.testing.assert_close(group.network.limit[:, role], PUSH_LIMIT * median, rtol=1e-4, atol=0)


@pytest.mark.parametrize("tokens", ["subject", "all"])
@pytest.mark.parametrize("method", [{}, {"network": "identity"}, {"aggregation": "sum"}], ids=str)
def test_gradients_of_zero_leave_every_scale_finite(setup: MakeSetup, tokens: str, method: dict[str, Any]) -> None:
    """Nothing reads the subject behind the last block: its value gradient there is exactly 0."""
    parts = editor, runner, examples = setup(tokens=tokens, **method)
    found = found_by(parts)
    (group,) = editor.groups
    edits = [e.edit for e in examples]
    captured = gather(group, list(edit_rows(runner, edits, editor.names, 4, tokens)))
    subject = captured.roles == SUBJECT
    assert not captured.gradients[1, subject].any()
    assert captured.gradients[0, subject].any(-1).all()
    network = group.network
    for name, tensor in editor.state().items():
        assert bool(tensor.isfinite().all()), name
    assert bool((network.std > 0).all())
    passes = editor.settings.passes
    expected = found.step * (SHARE / passes if passes > 1 else 1)  # of an output of 1, for want of a push
    assert network.log_lr[1, SUBJECT].item() == pytest.approx(math.log(expected), rel=1e-5)
    with torch.no_grad():
        values = network.value_shifts(captured.keys, captured.gradients, captured.roles)
    assert bool(values.isfinite().all())
    assert not values[1, subject].any()
    assert values[0, subject].any(-1).all()


@pytest.mark.parametrize("tokens", ["answer", "subject", "all"])
def test_calibration_does_not_depend_on_batches_or_the_order_of_facts(setup: MakeSetup, tokens: str) -> None:
    states = []
    for batch_size, reverse in ((1, False), (3, True), (100, False)):
        editor, runner, examples = without_subject(setup(tokens=tokens), keep=5)
        found_by((editor, runner, examples[::-1] if reverse else examples), batch_size=batch_size)
        states.append(editor.state())
    for state in states[1:]:
        for name in ("0.mean", "0.std", "0.limit", "0.log_lr", "0.log_lambda"):
            wanted = states[0][name]
            torch.testing.assert_close(state[name], wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


# ---------------------------------------------------------------- preserved keys


def test_preserved_keys_are_the_second_moment_of_every_real_token(setup: MakeSetup) -> None:
    editor, runner, _ = setup(preserved_rank=64)
    texts = sampled_texts(runner.base, 5, 7, seed=0) + sampled_texts(runner.base, 5, 2, seed=1)
    preserve(editor, runner, texts, 3)
    group = editor.groups[0]
    keys = torch.cat([group.stack(part) for part in all_keys(runner, texts, editor.names, 100)], 1)
    assert keys.shape[1] == 5 * 9 + 5 * 4
    expected = keys.mT @ keys / keys.shape[1]
    torch.testing.assert_close(group.preserved.times(torch.eye(64).repeat(2, 1, 1)), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("settings", [{"preserved_rank": 0}, {"aggregation": "sum"}])
def test_none_are_preserved_where_they_have_no_part(setup: MakeSetup, settings: dict[str, Any]) -> None:
    editor, runner, _ = setup(**settings)
    preserve(editor, runner, sampled_texts(runner.base, 2, 3), 2)
    assert editor.groups[0].preserved.energies.numel() == 0


def test_none_are_preserved_without_text(setup: MakeSetup) -> None:
    editor, runner, _ = setup()
    preserve(editor, runner, [], 2)
    assert editor.groups[0].preserved.energies.numel() == 0
