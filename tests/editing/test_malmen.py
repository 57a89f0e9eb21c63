"""The method as a whole: one shift whatever the batches, exact factors, and gradients by hand against autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from malmen_cli.editing.capture import ROLES, SUBJECT, edit_rows, places, row_count
from malmen_cli.editing.editor import Editor, Group
from malmen_cli.editing.hypernetwork import HyperNetwork
from malmen_cli.editing.methods.malmen import Malmen
from malmen_cli.editing.replay import Runner
from malmen_cli.editing.ridge import Preserved, solve_dual, solve_primal
from malmen_cli.editing.settings import MalmenSettings
from malmen_cli.editing.shift import Shift, applied
from malmen_cli.editing.stacked import Captured, gather
from malmen_cli.exceptions import NumericsError

F64 = torch.float64
LOW_RANK, STREAMED = {"mlp": 128}, {"mlp": 8}  # more, or fewer, input dimensions than the facts below have rows
FORMS = [pytest.param(LOW_RANK, id="low-rank"), pytest.param(STREAMED, id="streamed")]
TWO_SHAPES = {"modules": ("*.mlp.c_fc", "*.mlp.c_proj")}


def matrices(shift: Shift) -> Tensor:
    return torch.cat([shift.modules[name].matrix().flatten() for name in sorted(shift.modules)])


def ids(count: int) -> list[str]:
    return [f"fact-{i}" for i in range(count)]


def difference(mine: Shift, theirs: Shift) -> float:
    return float((matrices(mine) - matrices(theirs)).norm() / matrices(theirs).norm())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# ---------------------------------------------------------------- one shift whatever the batches


@pytest.fixture(scope="module")
def reference(make_editor: Callable, facts: Callable) -> Callable[..., Shift]:
    """The shift of `count` facts, one at a time and all rows in one chunk; computed once."""
    known: dict[str, Shift] = {}

    def compute(count: int, settings: dict[str, Any], options: dict[str, Any]) -> Shift:
        key = repr((count, settings, options))
        if key not in known:
            editor, runner = make_editor("gpt2", settings, **options)
            edits = facts(runner.base.tokenizer, count)
            known[key] = Malmen(editor, chunk=10**6).shift(runner, edits, ids(count), batch_size=1)
        return known[key]

    return compute


@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize("batch_size", [1, 7, 32])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 17])
def test_the_shift_does_not_depend_on_batch_or_chunk(
    make_editor: Callable, facts: Callable, reference: Callable, count: int, batch_size: int, options: dict
) -> None:
    editor, runner = make_editor("gpt2", **options)
    edits = facts(runner.base.tokenizer, count)
    wanted = reference(count, {}, options)
    for chunk in (1, 7, 1024):
        found = Malmen(editor, chunk=chunk).shift(runner, edits, ids(count), batch_size=batch_size)
        assert difference(found, wanted) <= 1e-5
        assert found.row_facts == wanted.row_facts
        assert found.residual <= 1e-8


@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize(
    "settings",
    [
        {"aggregation": "sum"},
        {"network": "identity"},
        {"centre": False},
        {"tokens": "answer"},
        {"tokens": "all"},
        {"tokens": "all", "aggregation": "sum"},
    ],
    ids=str,
)
def test_nor_does_it_in_the_other_variants(
    make_editor: Callable, facts: Callable, reference: Callable, settings: dict, options: dict
) -> None:
    editor, runner = make_editor("gpt2", settings, **options)
    edits = facts(runner.base.tokenizer, 9)
    wanted = reference(9, settings, options)
    for batch_size, chunk in ((1, 7), (7, 1), (32, 1024)):
        found = Malmen(editor, chunk=chunk).shift(runner, edits, ids(9), batch_size=batch_size)
        assert difference(found, wanted) <= 1e-5


@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"aggregation": "sum"}, {"tokens": "answer"}, {"tokens": "all"}, {"tokens": "all", "aggregation": "sum"}],
    ids=str,
)
def test_the_order_of_facts_does_not_matter(
    make_editor: Callable, facts: Callable, reference: Callable, settings: dict, options: dict
) -> None:
    editor, runner = make_editor("gpt2", settings, **options)
    edits, order = facts(runner.base.tokenizer, 9), [4, 0, 8, 2, 6, 1, 7, 3, 5]
    wanted = reference(9, settings, options)
    found = Malmen(editor, chunk=7).shift(runner, [edits[i] for i in order], [ids(9)[i] for i in order], batch_size=4)
    assert difference(found, wanted) <= 1e-5
    if wanted.row_facts:
        tokens = editor.settings.tokens
        assert found.row_facts == tuple(f"fact-{i}" for i in order for _ in places(edits[i], tokens))


@pytest.mark.parametrize("options", FORMS)
def test_the_guard_grows_with_the_facts(make_editor: Callable, facts: Callable, options: dict) -> None:
    """2K'K + lambda I + 2n mu C0 is twice the system of half the lambda: preserved keys hold as well as before."""
    editor, runner = make_editor("gpt2", **options)
    edits = facts(runner.base.tokenizer, 5)
    once = Malmen(editor).shift(runner, edits, ids(5), batch_size=4)
    with torch.no_grad():
        for group in editor.groups:
            group.network.log_lambda += math.log(2)
    twice = Malmen(editor).shift(runner, edits + edits, ids(10), batch_size=4)
    assert difference(twice, once) <= 1e-5


@pytest.mark.parametrize("tokens", sorted(ROLES))
def test_rows_know_their_facts(make_editor: Callable, facts: Callable, tokens: str) -> None:
    editor, runner = make_editor("gpt2", {"tokens": tokens}, **LOW_RANK)
    edits = facts(runner.base.tokenizer, 9)
    found = Malmen(editor).shift(runner, edits, ids(9), batch_size=4)
    assert found.row_facts == tuple(f"fact-{i}" for i, edit in enumerate(edits) for _ in places(edit, tokens))
    for module in found.modules.values():
        assert module.rank == len(found.row_facts)
        assert module.dense is None


@pytest.mark.parametrize(("extra", "rank"), [(0, "exact"), (1, None)])
def test_factors_are_kept_up_to_dk_rows(make_editor: Callable, facts: Callable, extra: int, rank: str | None) -> None:
    _, runner = make_editor("gpt2")
    edits = facts(runner.base.tokenizer, 5)
    rows = row_count(edits, "subject")
    editor, runner = make_editor("gpt2", mlp=rows - extra)
    found = Malmen(editor).shift(runner, edits, ids(5), batch_size=2)
    assert {module.rank for module in found.modules.values()} == {rows if rank else None}
    assert bool(found.row_facts) == bool(rank)


def test_dropping_a_fact_s_rows_from_the_factors_is_editing_without_it(make_editor: Callable, facts: Callable) -> None:
    """V = (K P K' + I) right comes back from the factors, so that rows can go without running the model."""
    editor, runner = make_editor("gpt2", preserved=False, **LOW_RANK)
    edits = facts(runner.base.tokenizer, 5)
    whole = Malmen(editor).shift(runner, edits, ids(5), batch_size=2)
    without = Malmen(editor).shift(runner, edits[:2] + edits[3:], ids(5)[:2] + ids(5)[3:], batch_size=2)
    stay = torch.tensor([fact != "fact-2" for fact in whole.row_facts])
    (group,) = editor.groups
    for i, name in enumerate(editor.names):
        module, lam = whole.modules[name], group.network.log_lambda[i].exp().item()
        left, right = module.left.double(), module.right.double()  # type: ignore[union-attr]
        system = left.T @ left * lam + torch.eye(left.shape[1])  # left = K' / lambda
        values = (system @ right)[stay]
        again = left[:, stay] @ torch.linalg.solve(system[stay][:, stay], values)
        wanted = without.modules[name].matrix().double()
        assert float((again - wanted).norm()) <= 1e-5 * float(wanted.norm())  # of factors rounded to fp32


# ---------------------------------------------------------------- the right shift


@torch.no_grad()
def by_hand(editor: Editor, runner: Runner, edits: list) -> dict[str, Tensor]:
    """Every module's shift from one fact at a time, in fp64, by the normal equations as they are written."""
    found = {}
    parts = [part for edit in edits for part in edit_rows(runner, [edit], editor.names, 1, editor.settings.tokens)]
    roles = [role for edit in edits for _, role in places(edit, editor.settings.tokens)]
    for group in editor.groups:
        network = group.network
        for i, name in enumerate(group.names):
            keys = torch.cat([part.keys[name] for part in parts])
            stacked = torch.stack([torch.cat([part.keys[n] for part in parts]) for n in group.names])
            gradients = torch.stack([torch.cat([part.gradients[n] for part in parts]) for n in group.names])
            pseudo = network.features(stacked, gradients, torch.tensor(roles))
            pseudo_keys, pseudo_gradients = (t[i].double() for t in pseudo)
            keys, steps = keys.double(), [network.log_lr[i, role].exp().item() for role in roles]
            rows = list(zip(steps, keys, pseudo_keys, pseudo_gradients, strict=True))
            if editor.settings.aggregation == "sum":
                found[name] = -sum(step * torch.outer(p, g) for step, _, p, g in rows)
                continue
            values = torch.stack([-step * (k @ p) * g for step, k, p, g in rows])
            unit = torch.eye(group.dk, dtype=F64)
            second_moment = group.preserved.to(F64).times(unit.repeat(len(group.names), 1, 1))[i]
            mu = len(keys) * network.log_mu[i].exp()
            system = keys.T @ keys + network.log_lambda[i].exp() * unit + mu * second_moment
            found[name] = torch.linalg.solve(system, keys.T @ values)
    return found


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"aggregation": "sum"}, {"network": "identity"}, {"tokens": "answer"}, {"tokens": "all"}],
    ids=str,
)
def test_the_shift_is_what_the_equations_say(
    make_editor: Callable, facts: Callable, family: str, options: dict, settings: dict
) -> None:
    editor, runner = make_editor(family, settings, **options)
    edits = facts(runner.base.tokenizer, 6)
    found = Malmen(editor).shift(runner, edits, ids(6), batch_size=4)
    for name, wanted in by_hand(editor, runner, edits).items():
        mine = found.modules[name].matrix().double()
        assert float((mine - wanted).norm() / wanted.norm()) <= 1e-5
        assert mine.shape == (options["mlp"], 32)


@pytest.mark.parametrize("count", [3, 12, 17])
def test_modules_of_two_shapes_are_shifted_together(make_editor: Callable, facts: Callable, count: int) -> None:
    """At 12 facts the narrow matrices' rows are streamed and the wide ones' are kept."""
    editor, runner = make_editor("gpt2", TWO_SHAPES, mlp=72)
    edits = facts(runner.base.tokenizer, count)
    rows = row_count(edits, "subject")
    found = Malmen(editor).shift(runner, edits, ids(count), batch_size=4)
    assert list(found.modules) == editor.names
    for name, wanted in by_hand(editor, runner, edits).items():
        module = found.modules[name]
        assert float((module.matrix().double() - wanted).norm() / wanted.norm()) <= 1e-5
        assert module.rank == (rows if rows <= wanted.shape[0] else None)
    low_rank = [module for module in found.modules.values() if module.rank is not None]
    assert len(found.row_facts) == (rows if low_rank else 0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("mlp", [32, 96])
def test_outputs_on_captured_keys_move_as_predicted(
    make_editor: Callable, facts: Callable, family: str, mlp: int
) -> None:
    editor, runner = make_editor(family, mlp=mlp)
    edits = facts(runner.base.tokenizer, 4)
    found = Malmen(editor).shift(runner, edits, ids(4), batch_size=4)
    (rows,) = edit_rows(runner, edits, editor.names, 4, "subject")
    with applied(runner.model, found):
        for name in editor.names:
            moved = runner.model.get_submodule(name)(rows.keys[name]) - rows.values[name]
            predicted = rows.keys[name] @ found.modules[name].matrix()
            torch.testing.assert_close(moved, predicted, rtol=1e-5, atol=1e-5 * float(rows.values[name].abs().max()))


def test_the_untrained_step_lowers_the_edit_loss(load: Callable, facts: Callable) -> None:
    """The identity network moves values against their gradients: a small step must help."""
    base = load("gpt2", mlp=96)
    editor, runner = Editor.fresh(base.model, MalmenSettings(last_blocks=2, network="identity")), Runner(base)
    for parameter in (editor.groups[0].network.log_lr,):
        parameter.data.fill_(-2.0)
    edits = facts(base.tokenizer, 4)
    found = Malmen(editor).shift(runner, edits, ids(4), batch_size=4)
    before = sum(part.loss for part in edit_rows(runner, edits, editor.names, 4, "subject"))
    with applied(base.model, found):
        after = sum(part.loss for part in edit_rows(runner, edits, editor.names, 4, "subject"))
    assert after < before


@pytest.mark.parametrize("tokens", sorted(ROLES))
def test_facts_without_a_subject_have_rows_at_the_answer_alone(
    make_editor: Callable, facts: Callable, tokens: str
) -> None:
    """Whether a subject is known makes no difference to `answer`, and no other to `subject` than its row."""
    editor, runner = make_editor("gpt2", {"tokens": tokens}, **LOW_RANK)
    edits = facts(runner.base.tokenizer, 6)
    bare = [replace(edit, subject=None) for edit in edits]
    mine, theirs = (Malmen(editor).shift(runner, some, ids(6), batch_size=4) for some in (edits, bare))
    known = sum(edit.subject is not None for edit in edits)
    assert 0 < known < len(edits)
    assert len(mine.row_facts) - len(theirs.row_facts) == (known if tokens == "subject" else 0)
    if tokens == "answer":
        assert torch.equal(matrices(mine), matrices(theirs))
    else:
        assert difference(mine, theirs) > 1e-3
    for name, wanted in by_hand(editor, runner, bare).items():
        assert float((theirs.modules[name].matrix().double() - wanted).norm() / wanted.norm()) <= 1e-5


@torch.no_grad()
def test_each_role_has_a_step_of_its_own(make_editor: Callable, facts: Callable) -> None:
    """The shift is linear in value shifts: with the subject's step at e^-60, it is that of their rows set to 0."""
    editor, runner = make_editor("gpt2", **LOW_RANK)
    edits = facts(runner.base.tokenizer, 6)
    (group,) = editor.groups
    step, method = group.network.log_lr, Malmen(editor)
    kept = step.clone()
    try:
        whole = method.shift(runner, edits, ids(6), batch_size=4)
        step[:, SUBJECT] = -60.0
        without = method.shift(runner, edits, ids(6), batch_size=4)
        step.copy_(kept)
        step[:, :SUBJECT] = -60.0
        alone = method.shift(runner, edits, ids(6), batch_size=4)
    finally:
        step.copy_(kept)
    assert min(float(matrices(part).norm()) for part in (without, alone)) > 1e-3 * float(matrices(whole).norm())
    total = matrices(without) + matrices(alone)
    assert float((total - matrices(whole)).norm()) <= 1e-5 * float(matrices(whole).norm())


@pytest.mark.parametrize("tokens", sorted(ROLES))
def test_replaying_gives_the_same_shift(make_editor: Callable, facts: Callable, tokens: str) -> None:
    settings = {"modules": ("model.layers.[23].mlp.down_proj",), "tokens": tokens}
    editor, runner = make_editor("llama", settings, layers=4)
    replaying = Runner(runner.base, 2)
    assert replaying.replaying
    edits = facts(runner.base.tokenizer, 9)
    mine, theirs = (Malmen(editor).shift(r, edits, ids(9), batch_size=4) for r in (replaying, runner))
    assert difference(mine, theirs) <= 1e-5


def test_progress_counts_every_fact_once(make_editor: Callable, facts: Callable) -> None:
    editor, runner = make_editor("gpt2")
    done: list[int] = []
    for chunk in (1, 7, 1024):
        done.clear()
        edits = facts(runner.base.tokenizer, 9)
        Malmen(editor, chunk=chunk).shift(runner, edits, ids(9), batch_size=2, progress=done.append)
        assert sum(done) == 9
        assert len(done) == {1: 5, 1024: 1}.get(chunk, len(done))


@pytest.mark.parametrize("options", FORMS)
def test_shifting_leaves_editor_and_base_alone(make_editor: Callable, facts: Callable, options: dict) -> None:
    editor, runner = make_editor("gpt2", TWO_SHAPES, **options)
    state = {name: tensor.clone() for name, tensor in editor.state().items()}
    weights = {name: tensor.clone() for name, tensor in runner.model.state_dict().items()}
    found = Malmen(editor).shift(runner, facts(runner.base.tokenizer, 9), ids(9), batch_size=4)
    for _ in range(100):
        with applied(runner.model, found):
            pass
    assert all(torch.equal(tensor, state[name]) for name, tensor in editor.state().items())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in runner.model.state_dict().items())
    assert all(parameter.grad is None for parameter in editor.parameters())
    assert not any(
        t is not None and t.requires_grad for m in found.modules.values() for t in (m.dense, m.left, m.right)
    )


# ---------------------------------------------------------------- numbers that run out


@pytest.fixture
def own_editor(load: Callable) -> Callable[..., tuple[Editor, Runner]]:
    """An editor that a test may break."""

    def build(**options: Any) -> tuple[Editor, Runner]:
        base = load("gpt2", **options)
        return Editor.fresh(base.model, MalmenSettings(modules=("*.mlp.c_proj",), rank=4)), Runner(base)

    return build


@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize("value", [float("-inf"), float("nan")])
def test_a_singular_problem_is_refused(own_editor: Callable, facts: Callable, options: dict, value: float) -> None:
    editor, runner = own_editor(**options)
    editor.groups[0].network.log_lambda.data[1] = value
    with pytest.raises(NumericsError):
        Malmen(editor).shift(runner, facts(runner.base.tokenizer, 6), ids(6), batch_size=4)


@pytest.mark.parametrize("options", FORMS)
def test_a_singular_second_shape_is_refused_too(own_editor: Callable, facts: Callable, options: dict) -> None:
    base = own_editor(**options)[1].base
    editor = Editor.fresh(base.model, MalmenSettings(rank=4, **TWO_SHAPES))
    for index in (0, 1):
        editor.groups[index].network.log_lambda.data.fill_(float("-inf"))
        editor.groups[1 - index].network.log_lambda.data.zero_()
        with pytest.raises(NumericsError):
            Malmen(editor).shift(Runner(base), facts(base.tokenizer, 6), ids(6), batch_size=4)


@pytest.mark.parametrize("options", FORMS)
def test_a_failed_factorisation_is_no_shift_of_zero(own_editor: Callable, facts: Callable, options: dict) -> None:
    """One fact many times and next to no lambda: finite numbers all along, and no Cholesky factor."""
    editor, runner = own_editor(**options)
    editor.groups[0].network.log_lambda.data.fill_(-70.0)
    with pytest.raises(NumericsError, match="singular"):
        Malmen(editor).shift(runner, facts(runner.base.tokenizer, 1) * 12, ids(12), batch_size=4)


@pytest.mark.parametrize("options", FORMS)
def test_a_step_without_bounds_is_refused(own_editor: Callable, facts: Callable, options: dict) -> None:
    editor, runner = own_editor(**options)
    editor.groups[0].network.log_lr.data[0] = 200.0
    with pytest.raises(NumericsError):
        Malmen(editor).shift(runner, facts(runner.base.tokenizer, 6), ids(6), batch_size=4)


# ---------------------------------------------------------------- gradients by hand


def fp64_group(n: int, blocks: int, rank: int, seed: int) -> tuple[Group, Captured, Tensor]:
    """A group of two modules with a random network in fp64, n captured rows of mixed roles, and dL/dS."""
    dk, dv, roles = 6, 4, 3
    generator = torch.Generator().manual_seed(seed)
    network = HyperNetwork(2, dk, dv, rank=3, blocks=blocks, roles=roles, generator=generator).double()
    with torch.no_grad():
        for i, parameter in enumerate(network.parameters()):
            parameter += 0.3 * normal(*parameter.shape, seed=seed + i)
        network.mean.copy_(0.2 * normal(2, roles, dk + dv, seed=seed + 20))
        network.std.copy_(0.5 + normal(2, roles, dk + dv, seed=seed + 21).abs())
        network.limit.fill_(4.0)  # some rows push harder
    preserved = Preserved.none(2, dk).to(F64)
    if rank:
        basis = torch.linalg.qr(normal(2, dk, rank, seed=seed + 22))[0]
        preserved = Preserved(basis, normal(2, rank, seed=seed + 23).abs() + 0.2, torch.full((2,), 0.1, dtype=F64))
    group = Group(("a", "b"), dk, dv, network, preserved)
    rows = normal(2, n, dk, seed=seed + 24), normal(2, n, dv, seed=seed + 25)
    captured = Captured(*rows, owners=torch.arange(n), roles=2 * torch.arange(n) % roles)
    return group, captured, normal(2, dk, dv, seed=seed + 26)


def through_autograd(group: Group, captured: Captured, upstream: Tensor, aggregation: str) -> dict[str, Tensor]:
    """d <upstream, S(theta)> / d theta with the solve inside the graph."""
    network, keys = group.network, captured.keys
    if aggregation == "sum":
        pseudo_keys, pseudo_gradients = network.features(keys, captured.gradients, captured.roles)
        steps = network.log_lr.exp()[:, captured.roles]
        shift = -torch.einsum("mn,mnk,mnv->mkv", steps, pseudo_keys, pseudo_gradients)
    else:
        unit = torch.eye(group.dk, dtype=F64).repeat(2, 1, 1)
        system = keys.mT @ keys + network.log_lambda.exp()[:, None, None] * unit
        mu = keys.shape[1] * network.log_mu.exp()
        system = system + mu[:, None, None] * group.preserved.times(unit)
        shift = torch.linalg.solve(system, keys.mT @ network.value_shifts(keys, captured.gradients, captured.roles))
    names, parameters = zip(*network.named_parameters(), strict=True)
    gradients = torch.autograd.grad((upstream * shift).sum(), parameters, allow_unused=True)
    pairs = zip(names, parameters, gradients, strict=True)
    return {name: torch.zeros_like(p) if g is None else g for name, p, g in pairs}


def same_gradients(network: HyperNetwork, wanted: dict[str, Tensor], relative: float = 1e-8) -> None:
    for name, parameter in network.named_parameters():
        mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert float((mine - wanted[name]).norm()) <= relative * float(wanted[name].norm()) + 1e-13, name


@pytest.mark.parametrize("form", [solve_dual, solve_primal])
@pytest.mark.parametrize("rank", [0, 3, 6])
@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("n", [1, 5, 15])
def test_pull_back_is_autograd_end_to_end(
    make_editor: Callable, form: Callable, rank: int, blocks: int, n: int
) -> None:
    group, captured, upstream = fp64_group(n, blocks, rank, seed=n + 100 * blocks)
    wanted = through_autograd(group, captured, upstream, "ridge")
    method = Malmen(make_editor("gpt2")[0], chunk=4)
    solution = form(captured.keys, method.value_shifts(group, captured), group.penalty(n, F64))
    method.pull_back(group, captured, upstream, solution)
    same_gradients(group.network, wanted)
    # A step of its own for every role that has rows, and none for the others.
    assert torch.equal(wanted["log_lr"] != 0, torch.isin(torch.arange(3), captured.roles).expand(2, 3))
    if rank:
        assert bool(wanted["log_mu"].all())


@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("n", [1, 5, 15])
def test_pull_back_of_a_sum_is_autograd_end_to_end(make_editor: Callable, blocks: int, n: int) -> None:
    group, captured, upstream = fp64_group(n, blocks, 0, seed=n)
    wanted = through_autograd(group, captured, upstream, "sum")
    Malmen(make_editor("gpt2")[0], chunk=4).pull_back(group, captured, upstream, None)
    same_gradients(group.network, wanted)


@pytest.mark.parametrize("aggregation", ["ridge", "sum"])
@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_pull_back_adds_up_over_calls_and_chunks(make_editor: Callable, aggregation: str, chunk: int) -> None:
    group, captured, upstream = fp64_group(9, 2, 3, seed=5)
    wanted = {name: 2 * g for name, g in through_autograd(group, captured, upstream, aggregation).items()}
    method = Malmen(make_editor("gpt2")[0], chunk=chunk)
    for _ in range(2):
        solution = None
        if aggregation == "ridge":
            solution = solve_dual(captured.keys, method.value_shifts(group, captured), group.penalty(9, F64))
        with torch.no_grad():
            method.pull_back(group, captured, upstream, solution)
    same_gradients(group.network, wanted)


@pytest.mark.parametrize(
    "settings", [{}, {"aggregation": "sum"}, {"network": "identity"}, {"tokens": "all"}, {"tokens": "answer"}], ids=str
)
@pytest.mark.parametrize("options", FORMS)
def test_a_training_step_s_shift_is_the_edit_s(
    make_editor: Callable, facts: Callable, settings: dict, options: dict
) -> None:
    editor, runner = make_editor("gpt2", {**TWO_SHAPES, **settings}, **options)
    method, edits = Malmen(editor, chunk=7), facts(runner.base.tokenizer, 6)
    parts = list(edit_rows(runner, edits, editor.names, 4, editor.settings.tokens))
    captured = [gather(group, parts) for group in editor.groups]
    assert all(rows.owners.tolist() == sorted(rows.owners.tolist()) for rows in captured)
    joined, solutions = method.joined(captured)
    wanted = method.shift(runner, edits, ids(6), batch_size=3)
    for name in editor.names:
        mine, theirs = joined.modules[name], wanted.modules[name]
        assert mine.layout == theirs.layout
        assert float((mine.matrix() - theirs.matrix()).norm() / theirs.matrix().norm()) <= 1e-4
    assert [solution is None for solution in solutions] == [settings.get("aggregation") == "sum"] * 2


@pytest.mark.parametrize("options", FORMS)
def test_fp32_training_gradients_are_the_fp64_ones(make_editor: Callable, facts: Callable, options: dict) -> None:
    editor, runner = make_editor("gpt2", **options)
    method, edits = Malmen(editor), facts(runner.base.tokenizer, 6)
    (group,) = editor.groups
    captured = gather(group, edit_rows(runner, edits, editor.names, 4, "subject"))
    upstream = normal(2, group.dk, group.dv, seed=1).float()
    _, (solution,) = method.joined([captured])
    try:
        method.pull_back(group, captured, upstream, solution)
        found = {name: p.grad.double() for name, p in group.network.named_parameters()}
        group.network.zero_grad()
        penalty = group.penalty(len(captured.roles), F64)
        exact = solve_dual(captured.keys.double(), method.value_shifts(group, captured).double(), penalty)
        method.pull_back(group, captured, upstream, exact)
        for name, parameter in group.network.named_parameters():
            assert float((found[name] - parameter.grad).norm()) <= 1e-3 * float(parameter.grad.norm()), name
    finally:
        group.network.zero_grad()


# ---------------------------------------------------------------- devices


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("options", FORMS)
def test_cpu_and_cuda_shifts_agree(
    make_editor: Callable, facts: Callable, tiny_model_factory, family: str, options: dict
) -> None:
    """T35: to 1e-4, with TF32 off."""
    from malmen_cli.base.model import load_base

    kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        editor, runner = make_editor(family, **options)
        base = load_base(str(tiny_model_factory(family, **options)), device="cuda")
        there = Editor.restored(base.model, editor.settings, editor.state())
        edits = facts(base.tokenizer, 9)
        mine = Malmen(there).shift(Runner(base), edits, ids(9), batch_size=4)
        theirs = Malmen(editor).shift(runner, edits, ids(9), batch_size=4)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept
    assert mine.row_facts == theirs.row_facts
    for name, module in mine.modules.items():
        wanted = theirs.modules[name].matrix()
        assert module.matrix().is_cuda
        assert float((module.matrix().cpu() - wanted).norm() / wanted.norm()) <= 1e-4
