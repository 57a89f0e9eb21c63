"""MEMIT, ROME and AlphaEdit: their closed forms, what they leave alone, and what they do not depend on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import malmen_cli.editing.constraints as constraints_module
import malmen_cli.editing.methods.memit as memit_module
from malmen_cli.base.batch import make_batch
from malmen_cli.base.model import Base
from malmen_cli.base.prompts import Encoded
from malmen_cli.base.sampling import sampled_windows
from malmen_cli.editing.capture import all_keys, fact_loss
from malmen_cli.editing.constraints import FLOOR, Chain, Ridge, penalty
from malmen_cli.editing.methods.memit import Memit, _keys, memit_modules, written_blocks
from malmen_cli.editing.moments import Statistics, second_moments
from malmen_cli.editing.replay import Runner
from malmen_cli.editing.ridge import Penalty, Triangular
from malmen_cli.editing.settings import MemitSettings, from_mapping
from malmen_cli.editing.shift import IN_OUT, ModuleShift, Shift, applied
from malmen_cli.editing.targets import Wordings, find_targets, wordings_of
from malmen_cli.exceptions import NumericsError, SpecError

Load = Callable[..., Base]
DK, DV = 12, 7
CONSTRAINTS = ("least_squares", "equality", "null_space")
# A random model has little that reads the subject: targets may go far, and their own keys count.
SETTINGS = MemitSettings(
    blocks=(0, 1), steps=25, lr=0.3, clamp=4.0, kl_factor=0.01, decay=0.01, moment_weight=1.0, ridge=1e-3
)
SUBJECTS = ("Australia", "Apple", "Sweden", "Brazil", "Microsoft", "Hamlet", "Peru")
TARGETS = ("Rome", "Bill Gates", "Tim Cook", "one hundred degrees")


def settings_of(constraint: str, **given: Any) -> MemitSettings:
    one = {"blocks": (0,)} if constraint == "equality" else {}
    return replace(SETTINGS, constraint=constraint, **({"null_threshold": 0.5} | one | given))


def wordings(base: Base, count: int = 4, prefixes: tuple[str, ...] = ()) -> list[Wordings]:
    return [
        wordings_of(
            base.tokenizer,
            f"The capital of {SUBJECTS[i % 7]}{'' if i < 7 else f' in {i}'} is",
            TARGETS[i % 4],
            SUBJECTS[i % 7],
            prefixes,
        )
        for i in range(count)
    ]


def statistics(base: Base, names: list[str]) -> Statistics:
    texts = [Encoded(ids, len(ids)) for ids in sampled_windows(base, 600)]
    return Statistics(second_moments(Runner(base), texts, names, 16), 600)


def insert(base: Base, facts: list[Wordings], settings: MemitSettings, **options: Any) -> Shift:
    names = memit_modules(base.model, settings)
    method = Memit(settings, statistics(base, names))
    return method.shift(base, names, facts, **({"batch_size": 32} | options))


def loss(base: Base, facts: list[Wordings]) -> float:
    runner, edits = Runner(base), [fact.contexts[0] for fact in facts]
    batch = make_batch(edits, base.device)
    with torch.no_grad():
        return float(fact_loss(runner.full_logits(batch), batch)) / len(facts)


def problem(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Keys (n, dk), residuals (n, dv) and a second moment (dk, dk) of full rank, fp64."""
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((count, DK), (count, DV))]
    spread = torch.randn(40, DK, generator=generator, dtype=torch.float64) * torch.logspace(0, -3, DK).double()
    return draw[0], draw[1], spread.T @ spread / 40


def solved(settings: MemitSettings, moment: Tensor, keys: Tensor, values: Tensor, rows: int | None = None) -> Tensor:
    kind = Chain if settings.constraint == "equality" else Ridge
    solver = kind(penalty(settings, moment, "m"), len(keys) if rows is None else rows, DK, DV)
    for start in range(0, len(keys), 3):
        solver.add(keys[start : start + 3], values[start : start + 3])
    shift, residual = solver.finish(IN_OUT)
    assert residual < 1e-9
    return shift.matrix().double()


# ---------------------------------------------------------------- closed forms
# Solved in fp64 and kept in fp32: 1e-6 relative is the rounding of the factors, a few times over.


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=3e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("count", [1, 5, DK, 30])
def test_memit_is_its_dense_closed_form(count: int) -> None:
    keys, values, moment = problem(count)
    floor = FLOOR * moment.trace() / DK * torch.eye(DK, dtype=torch.float64)
    settings = settings_of("least_squares", moment_weight=7.0)
    wanted = torch.linalg.solve(7 * (moment + floor) + keys.T @ keys, keys.T @ values)
    close(solved(settings, moment, keys, values), wanted)


@pytest.mark.parametrize("count", [1, 5, DK, 30])
def test_rome_is_its_steps_one_after_the_other(count: int) -> None:
    keys, values, moment = problem(count)
    inverse = torch.linalg.inv(moment + FLOOR * moment.trace() / DK * torch.eye(DK, dtype=torch.float64))
    wanted = torch.zeros(DK, DV, dtype=torch.float64)
    for key, value in zip(keys, values, strict=True):
        along = inverse @ key
        wanted += torch.outer(along, value - key @ wanted) / (along @ key)
        torch.testing.assert_close(key @ wanted, value, rtol=1e-9, atol=1e-9)  # right behind its own step
    close(solved(settings_of("equality"), moment, keys, values), wanted)
    close(keys[-1] @ wanted, keys[-1] @ solved(settings_of("equality"), moment, keys, values))


def test_rome_in_parts_is_rome_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond dk facts the chain is solved some facts at a time."""
    import malmen_cli.editing.constraints as constraints

    keys, values, moment = problem(11)
    whole = solved(settings_of("equality"), moment, keys, values)
    monkeypatch.setattr(constraints, "CHAIN", 4)
    close(solved(settings_of("equality"), moment, keys, values, rows=DK + 1), whole)


def test_one_fact_of_rome_is_exact() -> None:
    keys, values, moment = problem(1)
    close(keys @ solved(settings_of("equality"), moment, keys, values), values)


@pytest.mark.parametrize("count", [1, 5, 30])
def test_alphaedit_is_its_dense_closed_form_and_leaves_what_is_kept(count: int) -> None:
    keys, values, moment = problem(count)
    energies, vectors = torch.linalg.eigh(moment)
    threshold = float(energies[DK // 2])
    free = vectors[:, energies < threshold]
    projection = free @ free.T
    settings = settings_of("null_space", null_threshold=threshold, ridge=0.3)
    eye = torch.eye(DK, dtype=torch.float64)
    wanted = torch.linalg.solve(projection @ keys.T @ keys @ projection + 0.3 * eye, projection @ keys.T @ values)
    found = solved(settings, moment, keys, values)
    close(found, wanted)
    kept = vectors[:, energies >= threshold]
    assert kept.shape[1] == DK - DK // 2
    assert (kept.T @ found).abs().max() <= 1e-6 * found.abs().max()  # fp32 factors


@pytest.mark.parametrize("constraint", ["least_squares", "null_space"])
def test_sums_over_facts_are_the_factors(constraint: str) -> None:
    """Nine facts kept as rows, and the same nine as sums."""
    keys, values, moment = problem(9)
    settings = settings_of(constraint, null_threshold=float(torch.linalg.eigvalsh(moment)[6]))
    close(solved(settings, moment, keys, values), solved(settings, moment, keys, values, rows=DK + 1))


@pytest.mark.parametrize("constraint", ["least_squares", "equality"])
@pytest.mark.parametrize("count", [3, 30])
def test_a_cholesky_factor_gives_what_an_eigendecomposition_gives(
    constraint: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And takes its place, for a fraction of the arithmetic."""
    keys, values, moment = problem(count)
    settings = settings_of(constraint, moment_weight=7.0)
    assert isinstance(penalty(settings, moment, "m"), Triangular)
    found = solved(settings, moment, keys, values)
    monkeypatch.setattr(constraints_module, "_by_cholesky", lambda settings, moment: None)
    assert isinstance(penalty(settings, moment, "m"), Penalty)
    close(found, solved(settings, moment, keys, values))


@pytest.mark.parametrize("below", [-0.6, -0.9, -0.999, -3.0])
@pytest.mark.parametrize("seed", range(3))
def test_energies_that_rounding_made_negative_count_as_none(below: float, seed: int) -> None:
    """Where they eat into the floor, or through it, the eigendecomposition tells them from the others: in whatever
    direction they lie, a Cholesky factor's pivots may all be far above."""
    keys, values, moment = problem(5)
    energies = torch.linalg.eigvalsh(moment)
    drawn = torch.randn(DK, DK, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    vectors = torch.linalg.qr(drawn)[0]
    energies[0] = below * FLOOR * float(energies[1:].sum()) / DK
    rounded = vectors @ energies.diag() @ vectors.T
    settings = settings_of("least_squares", moment_weight=7.0)
    assert isinstance(penalty(settings, rounded, "m"), Penalty)
    found = solved(settings, rounded, keys, values)
    energies[0] = 0.0
    close(found, solved(settings, vectors @ energies.diag() @ vectors.T, keys, values))


def test_a_moment_that_is_singular_still_gives_a_shift() -> None:
    keys, values, _ = problem(4)
    moment = keys[:2].T @ keys[:2] / 2
    for constraint in CONSTRAINTS:
        assert bool(torch.isfinite(solved(settings_of(constraint), moment, keys, values)).all())


def test_moments_that_leave_nothing_are_refused() -> None:
    _, _, moment = problem(1)
    with pytest.raises(SpecError, match=r"null_threshold: the keys of m have energy 1e-09 or more .* raise it"):
        penalty(settings_of("null_space", null_threshold=1e-9), moment, "m")
    with pytest.raises(NumericsError, match="m: its keys are all zero"):
        penalty(settings_of("least_squares"), torch.zeros(DK, DK), "m")


def test_a_threshold_that_leaves_nothing_is_refused_before_targets_are_looked_for(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load("gpt2", layers=4)
    monkeypatch.setattr(memit_module, "find_targets", lambda *_, **__: pytest.fail("looked"))
    with pytest.raises(SpecError, match="null_threshold"):
        insert(base, wordings(base), settings_of("null_space", null_threshold=1e-9))


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize("batch_size", [1, 100])
def test_keys_are_the_mean_over_prefixes_on_the_model_as_it_is(load: Load, batch_size: int) -> None:
    """By the rows of every token of the whole texts; block 1 sees what was put into block 0."""
    base = load("llama", layers=4)
    facts = wordings(base, 3, ("Snow is white", "Paris and Rome"))
    name = "model.layers.1.mlp.down_proj"
    change = Shift({"model.layers.0.mlp.down_proj": ModuleShift("out_in", dense=0.1 * torch.randn(64, 32))})
    with applied(base.model, change):
        runner = Runner(base)
        wanted = []
        for fact in facts:
            each = [next(all_keys(runner, [c], [name], 1))[name][c.subject] for c in fact.contexts]
            wanted.append(torch.stack(each).mean(0))
        parts = list(_keys(Runner(base, 1), facts, name, 2, batch_size))
        states = [
            base.model(torch.tensor([f.contexts[0].ids]), output_hidden_states=True).hidden_states[3] for f in facts
        ]
    found = torch.cat([keys for _, keys, _ in parts])
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-4, atol=1e-5)
    assert torch.cat([rows for rows, _, _ in parts]).tolist() == [0, 1, 2]
    hidden = torch.stack([s[0, f.contexts[0].subject] for s, f in zip(states, facts, strict=True)])
    torch.testing.assert_close(torch.cat([h for _, _, h in parts]), hidden, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- the whole method


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_edits_make_their_facts_likelier_and_leave_the_model_bitwise(load: Load, family: str, constraint: str) -> None:
    base = load(family, layers=4)
    facts, settings = wordings(base), settings_of(constraint)
    weights = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    counted: list[int] = []
    notes: list[str] = []
    shift = insert(base, facts, settings, progress=counted.append, note=notes.append)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in base.model.state_dict().items())
    assert list(shift.modules) == memit_modules(base.model, settings)
    assert {module.rank for module in shift.modules.values()} == {4}
    assert shift.row_facts == ()
    assert shift.residual < 1e-9
    assert sum(counted) == 4
    assert notes[-1].startswith("targets at ")
    assert [note.partition("; block ")[2] for note in notes] == [*map(str, settings.blocks or ()), ""]
    before = loss(base, facts)
    with applied(base.model, shift):
        assert loss(base, facts) < before - 0.2


def test_the_way_is_spread_over_the_blocks_by_what_is_left(load: Load) -> None:
    """Algorithm 1 written out: an equal share of what is still missing, keys and states of the model edited so far."""
    base = load("gpt2", layers=4)
    facts, settings = wordings(base), settings_of("least_squares", blocks=(0, 1, 2))
    names = memit_modules(base.model, settings)
    known = statistics(base, names)
    wanted_states = find_targets(Runner(base, 2), 2, facts, settings, batch_size=32).states
    found = Memit(settings, known).shift(base, names, facts, batch_size=32)
    done: dict[str, ModuleShift] = {}
    for left, name in ((3, names[0]), (2, names[1]), (1, names[2])):
        keys, states = [], []
        with applied(base.model, Shift(done)):
            for fact in facts:
                ids, place = torch.tensor([fact.contexts[0].ids]), fact.contexts[0].subject
                keys.append(next(all_keys(Runner(base), fact.contexts[:1], [name], 1))[name][place])
                states.append(base.model(ids, output_hidden_states=True).hidden_states[3][0, place])
        stacked, missing = torch.stack(keys).double(), (wanted_states - torch.stack(states)).double()
        moment = known.moments[name].double()
        floor = FLOOR * moment.trace() / len(moment) * torch.eye(len(moment), dtype=torch.float64)
        matrix = torch.linalg.solve(moment + floor + stacked.T @ stacked, stacked.T @ missing / left)
        done[name] = ModuleShift(IN_OUT, dense=matrix.float())
        shift = found.modules[name].matrix()
        torch.testing.assert_close(shift, matrix.float(), rtol=0, atol=1e-4 * float(matrix.abs().max()))  # fp32 states


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_a_base_in_half_precision(load: Load, constraint: str) -> None:
    base = load("llama", layers=4, dtype="bfloat16")
    facts, settings = wordings(base), settings_of(constraint)
    weights = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    shift = insert(base, facts, settings)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in base.model.state_dict().items())
    assert all(module.matrix().dtype == torch.float32 for module in shift.modules.values())
    before = loss(base, facts)
    with applied(base.model, shift):
        assert loss(base, facts) < before - 0.2


@pytest.mark.gpu
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_cpu_and_cuda_shifts_agree(load: Load, tiny_model_factory: Callable[..., Any], constraint: str) -> None:
    """T35, with TF32 off; to 1e-3, since targets are what twenty-five steps of Adam make of rounding."""
    from malmen_cli.base.model import load_base

    here, there = load("gpt2", layers=4), load_base(str(tiny_model_factory("gpt2", layers=4)), device="cuda")
    settings = settings_of(constraint, steps=5)
    names = memit_modules(here.model, settings)
    known = statistics(here, names)
    kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        mine, theirs = (
            Memit(settings, known).shift(base, names, wordings(base, 4, ("Snow is white",)), batch_size=8)
            for base in (here, there)
        )
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept
    for name, module in mine.modules.items():
        found, wanted = theirs.modules[name].matrix(), module.matrix()
        assert not found.is_cuda
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3 * float(wanted.abs().max()))  # steps of Adam


def test_a_residual_that_nothing_holds_back_is_taken_up_whole(load: Load) -> None:
    """With next to no weight on ordinary keys the hidden states become the targets, to the ridge that is left."""
    base = load("gpt2", layers=4)
    facts, settings = wordings(base), settings_of("least_squares", moment_weight=1e-6)
    names = memit_modules(base.model, settings)
    targets = find_targets(Runner(base, 1), 1, facts, settings, batch_size=32)
    with applied(base.model, insert(base, facts, settings)):
        (part,) = _keys(Runner(base), facts, names[-1], 1, 32)
    assert (part[2] - targets.states).norm() < 1e-2 * targets.deltas.norm()


def test_rome_s_target_holds_at_the_last_fact(load: Load) -> None:
    base = load("llama", layers=4)
    facts, settings = wordings(base), settings_of("equality")
    targets = find_targets(Runner(base, 0), 0, facts, settings, batch_size=32)
    with applied(base.model, insert(base, facts, settings)):
        (part,) = _keys(Runner(base), facts, "model.layers.0.mlp.down_proj", 0, 32)
    torch.testing.assert_close(part[2][-1], targets.states[-1], rtol=1e-3, atol=1e-3)  # fp32 weights and forwards


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_prompts_a_forward_only_round(load: Load, constraint: str) -> None:
    base = load("gpt2", layers=4)
    facts = wordings(base, 4, ("Snow is white",))
    settings = settings_of(constraint, steps=10)
    one, other = (insert(base, facts, settings, batch_size=size) for size in (3, 64))
    for name, module in one.modules.items():
        wanted = other.modules[name].matrix()
        torch.testing.assert_close(module.matrix(), wanted, rtol=0, atol=1e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_more_facts_than_a_key_is_wide_are_dense(load: Load, constraint: str) -> None:
    base = load("gpt2", layers=4, mlp=16)
    facts = wordings(base, 20)
    modules = tuple(f"transformer.h.{i}.mlp.c_proj" for i in ((0,) if constraint == "equality" else (0, 1)))
    settings = settings_of(constraint, steps=3, blocks=None, modules=modules, null_threshold=5.0)
    shift = insert(base, facts, settings)
    assert {module.rank for module in shift.modules.values()} == {None}
    assert all(module.matrix().norm() > 0 for module in shift.modules.values())


def test_a_base_of_nan_is_named(load: Load) -> None:
    base = load("gpt2", layers=4)
    names = memit_modules(base.model, SETTINGS)
    method = Memit(SETTINGS, statistics(base, names))
    bias = base.model.transformer.h[0].mlp.c_fc.bias
    kept = bias.detach().clone()
    try:
        bias.data[0] = torch.nan
        with pytest.raises(NumericsError, match=r"fact 0 .* not finite"):
            method.shift(base, names, wordings(base, 1), batch_size=4)
    finally:
        bias.data.copy_(kept)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("layers", "given", "blocks"),
    [
        (12, {}, [2, 3, 4, 5, 6]),
        (12, {"constraint": "equality"}, [2]),
        (12, {"blocks": (5, 3, 3)}, [3, 5]),
        (4, {}, [0, 1, 2]),
        (2, {}, [0]),
        (4, {"modules": ("*.[12].mlp.c_proj",)}, [1, 2]),
        (4, {"modules": ("*.1.attn.c_proj",)}, [1]),
    ],
)
def test_which_matrices(load: Load, layers: int, given: dict[str, Any], blocks: list[int]) -> None:
    leaf = "attn.c_proj" if "attn" in str(given) else "mlp.c_proj"
    found = memit_modules(load("gpt2", layers=layers).model, MemitSettings(**given))
    assert found == [f"transformer.h.{block}.{leaf}" for block in blocks]


@pytest.mark.parametrize(
    ("depth", "first", "last"),
    [(1, 0, 0), (2, 0, 0), (3, 0, 1), (12, 2, 6), (28, 4, 8), (30, 4, 8), (32, 4, 8), (48, 6, 10)],
)
def test_facts_are_written_from_an_eighth_of_the_depth_and_never_into_the_last_block(
    depth: int, first: int, last: int
) -> None:
    assert written_blocks(depth) == list(range(first, last + 1))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"blocks": (1, 4)}, "blocks: the model has blocks 0 to 3, not 4"),
        ({"blocks": (2, 3)}, r"blocks: transformer\.h\.3\.mlp\.c_proj is in the last block"),
        ({"modules": ("*.3.mlp.c_proj",)}, r"modules: transformer\.h\.3\.mlp\.c_proj is in the last block"),
        ({"blocks": (1, 2), "constraint": "equality"}, "blocks: rome changes one matrix, but 2 are named"),
        ({"modules": ("*.1.*c_proj",)}, "modules: memit changes one matrix a block"),
        ({"modules": ("*.1.mlp.c_fc",)}, "does not write to the residual stream, which is 32 wide"),
        ({"modules": ("nothing",)}, "'nothing' matches no Linear or Conv1D"),
    ],
)
def test_matrices_that_cannot_be_edited(load: Load, given: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        memit_modules(load("gpt2", layers=4).model, MemitSettings(**given))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"step": 3}, "unknown setting 'step'; did you mean 'steps'"),
        ({"steps": 0}, "steps: must be at least 1"),
        ({"prefixes": -1}, "prefixes: must be at least 0"),
        ({"prefix_tokens": 0}, "prefix_tokens: must be at least 1"),
        ({"stats_tokens": 0}, "stats_tokens: must be at least 1"),
        ({"lr": 0}, "lr: must be above 0"),
        ({"clamp": 0}, "clamp: must be above 0"),
        ({"decay": -1}, "decay: must be at least 0"),
        ({"kl_factor": -1}, "kl_factor: must be at least 0"),
        ({"moment_weight": 0}, "moment_weight: must be above 0"),
        ({"null_threshold": 0}, "null_threshold: must be above 0"),
        ({"ridge": 0}, "ridge: must be above 0"),
        ({"constraint": "hard"}, "'hard' is not one of least_squares, equality, null_space"),
        ({"blocks": []}, r"blocks: must be numbers from 0, not \[\]"),
        ({"blocks": [-1, 2]}, r"blocks: must be numbers from 0, not \[-1, 2\]"),
        ({"blocks": [1], "modules": ["*.c_proj"]}, "blocks: `modules` names the matrices already"),
    ],
)
def test_settings_that_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        from_mapping(MemitSettings, given, "settings")
