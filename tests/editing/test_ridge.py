"""The ridge problem: its two closed forms, its gradients, and what happens where numbers run out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from malmen_cli.editing.ridge import (
    RESIDUAL_LIMIT,
    NormalEquations,
    Penalty,
    Preserved,
    Solution,
    solve,
    solve_dual,
    solve_primal,
)
from malmen_cli.exceptions import NumericsError

F64 = torch.float64
SIZES = st.integers(1, 64)
LAMBDAS = st.floats(-6, 3).map(lambda exponent: 10.0**exponent)
SEEDS = st.integers(0, 2**31)


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, dtype=F64, generator=generator))[0]


def draw_keys(n: int, width: int, generator: torch.Generator) -> Tensor:
    """(n, width) with singular values in [0.5, 2]: the rounding of the method, not of the problem, is measured."""
    small = min(n, width)
    values = 0.5 + 1.5 * torch.rand(small, dtype=F64, generator=generator)
    return orthonormal(n, small, generator) * values @ orthonormal(width, small, generator).T


def problem(
    n: int, width: int, lam: float, seed: int, mu: float = 0.0, rank: int = 0
) -> tuple[Tensor, Tensor, Penalty]:
    """Two modules: keys, values and a penalty in fp64; C0 has energies in [0.1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.stack([draw_keys(n, width, generator) for _ in range(2)])
    values = torch.randn(2, n, 3, dtype=F64, generator=generator)
    if mu == 0:
        preserved = Preserved.none(2, width).to(F64)
    else:
        basis = torch.stack([orthonormal(width, rank, generator) for _ in range(2)])
        energies = 0.1 + 0.9 * torch.rand(2, rank, dtype=F64, generator=generator)
        preserved = Preserved(basis, energies, torch.full((2,), 0.1, dtype=F64))
    scales = torch.tensor([1.0, 0.5], dtype=F64)
    return keys, values, Penalty(lam * scales, mu * scales, preserved)


def by_lstsq(keys: Tensor, values: Tensor, penalty: Penalty) -> Tensor:
    """Least squares on [K; sqrt(lambda) I; sqrt(mu) C0^(1/2)] S = [V; 0; 0], module by module."""
    found = []
    width, out = keys.shape[-1], values.shape[-1]
    second_moment = penalty.preserved.times(torch.eye(width, dtype=F64).repeat(len(keys), 1, 1))
    for k, v, lam, mu, c0 in zip(keys, values, penalty.lam, penalty.mu, second_moment, strict=True):
        energies, basis = torch.linalg.eigh(c0)
        root = energies.clamp(min=0).sqrt()[:, None] * basis.T
        left = torch.cat([k, lam.sqrt() * torch.eye(width, dtype=F64), mu.sqrt() * root])
        right = torch.cat([v, torch.zeros(2 * width, out, dtype=F64)])
        found.append(torch.linalg.lstsq(left, right, driver="gelsd").solution)
    return torch.stack(found)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@settings(max_examples=200, deadline=None)
@given(SIZES, SIZES, LAMBDAS, SEEDS)
def test_the_chosen_form_is_least_squares(n: int, width: int, lam: float, seed: int) -> None:
    """T1: the form that is chosen for the shape is `lstsq` on the augmented system."""
    keys, values, penalty = problem(n, width, lam, seed)
    solution = solve(keys, values, penalty)
    assert error(solution.matrix(), by_lstsq(keys, values, penalty)) <= 1e-10
    assert (solution.dense is None) == (n <= width)


@settings(max_examples=200, deadline=None)
@given(SIZES, SIZES, LAMBDAS, SEEDS)
def test_primal_and_dual_agree(n: int, width: int, lam: float, seed: int) -> None:
    """T1: so is the other one, as far as its condition allows."""
    keys, values, penalty = problem(n, width, lam, seed)
    wanted = by_lstsq(keys, values, penalty)
    # The form that is not chosen has lambda alone on its null space: its condition number bounds what fp64 gives.
    bound = max(1e-10, 32 * torch.finfo(F64).eps * 4 / (lam / 2))
    assert error(solve_dual(keys, values, penalty).matrix(), wanted) <= bound
    assert error(solve_primal(keys, values, penalty).matrix(), wanted) <= bound


@settings(max_examples=200, deadline=None)
@given(SIZES, SIZES, LAMBDAS, LAMBDAS, SEEDS, st.data())
def test_preserved_keys_are_least_squares_too(
    n: int, width: int, lam: float, mu: float, seed: int, data: st.DataObject
) -> None:
    rank = data.draw(st.one_of(st.just(width), st.integers(0, width)), label="rank")
    keys, values, penalty = problem(n, width, lam, seed, mu, rank)
    solution = solve(keys, values, penalty)
    wanted = by_lstsq(keys, values, penalty)
    assert error(solution.matrix(), wanted) <= 1e-10
    other = (solve_primal if n <= width else solve_dual)(keys, values, penalty)
    assert error(other.matrix(), wanted) <= max(1e-10, 1e-13 / min(1, lam + 0.1 * mu))


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, LAMBDAS, LAMBDAS, SEEDS)
def test_whitening_is_the_root_of_the_inverse_penalty(n: int, width: int, lam: float, mu: float, seed: int) -> None:
    _, _, penalty = problem(n, width, lam, seed, mu, rank=(width + 1) // 2)
    unit = torch.eye(width, dtype=F64).repeat(2, 1, 1)
    inverse = penalty.whiten(penalty.whiten(unit))
    matrix = penalty.lam[:, None, None] * unit + penalty.mu[:, None, None] * penalty.preserved.times(unit)
    torch.testing.assert_close(inverse @ matrix, unit, rtol=0, atol=1e-10)


def test_one_number_by_hand() -> None:
    """k = 2, v = 3, lambda = 1, mu = 4, C0 = 0.25: S = 2 * 3 / (4 + 1 + 1) = 1."""
    one = torch.ones(1, 1, 1, dtype=F64)
    preserved = Preserved(one, 0.25 * one[0], 0 * one[0, 0])
    penalty = Penalty(one[0, 0], 4 * one[0, 0], preserved)
    for form in (solve, solve_dual, solve_primal):
        assert float(form(2 * one, 3 * one, penalty).matrix()) == pytest.approx(1.0, abs=1e-15)


# ---------------------------------------------------------------- preserved keys


def test_all_of_a_second_moment_is_kept_at_full_rank() -> None:
    keys = torch.randn(2, 50, 12, generator=torch.Generator().manual_seed(0))
    moment = keys.mT @ keys / 50
    preserved = Preserved.of(moment, 12)
    torch.testing.assert_close(preserved.times(torch.eye(12).repeat(2, 1, 1)), moment, rtol=1e-5, atol=1e-5)
    assert Preserved.of(moment, 99).basis.shape == (2, 12, 12)


def test_a_whole_second_moment_is_kept_in_fp64() -> None:
    keys = torch.randn(2, 20, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moment = keys.mT @ keys / 20
    whole = Preserved.whole(moment)
    assert whole.basis.dtype == torch.float64
    torch.testing.assert_close(whole.times(moment), moment @ moment, rtol=1e-12, atol=1e-12)


def test_forbidden_keys_lose_everything_and_the_others_keep_the_ridge_alone() -> None:
    keys = torch.randn(1, 20, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = Preserved.whole(keys.mT @ keys / 20)
    one = torch.ones(1, dtype=torch.float64)
    whitened = Penalty(4 * one, one, whole.forbidden(float(whole.energies[0, 7]))).whiten(whole.basis)
    torch.testing.assert_close(whitened[..., :7], whole.basis[..., :7] / 2, rtol=1e-12, atol=1e-12)
    assert whitened[..., 7:].abs().max() < 1e-14


@pytest.mark.parametrize("rank", [0, 1, 5, 11])
def test_a_part_of_a_second_moment_keeps_the_largest_energies_and_the_trace(rank: int) -> None:
    moment = torch.diag(torch.arange(12, 0, -1.0)).repeat(2, 1, 1)
    preserved = Preserved.of(moment, rank)
    form = preserved.times(torch.eye(12).repeat(2, 1, 1))
    assert form.diagonal(dim1=-2, dim2=-1).sum(-1).tolist() == pytest.approx([78, 78])
    torch.testing.assert_close(form[:, :rank, :rank], moment[:, :rank, :rank])
    assert preserved.rest.tolist() == pytest.approx([(12 - rank + 1) / 2] * 2)


def test_a_second_moment_without_full_rank_has_no_negative_energy() -> None:
    keys = torch.randn(1, 3, 10, generator=torch.Generator().manual_seed(1))
    preserved = Preserved.of(keys.mT @ keys, 6)
    assert bool((preserved.energies >= 0).all())
    assert bool((preserved.rest >= 0).all())


def test_preserved_keys_hold_what_the_module_does_on_them() -> None:
    generator = torch.Generator().manual_seed(4)
    keys, values, penalty = problem(6, 20, 1e-3, 4)
    ordinary = torch.randn(2, 8, 20, dtype=F64, generator=generator)
    energies, basis = torch.linalg.eigh(ordinary.mT @ ordinary / 8)
    kept = Preserved(basis, energies.clamp(min=0), torch.zeros(2, dtype=F64))
    free = solve(keys, values, penalty).matrix()
    held = solve(keys, values, Penalty(penalty.lam, torch.full((2,), 100.0, dtype=F64), kept)).matrix()
    assert float((ordinary @ held).norm()) < 0.05 * float((ordinary @ free).norm())


# ---------------------------------------------------------------- sums, and numbers that run out


@pytest.mark.parametrize("chunk", [1, 3, 40])
def test_normal_equations_add_up(chunk: int) -> None:
    keys, values, penalty = problem(40, 9, 0.1, 5, mu=2.0, rank=4)
    equations = NormalEquations(penalty, 9, 3)
    for k, v in zip(keys.split(chunk, 1), values.split(chunk, 1), strict=True):
        equations.add(k, v)
    torch.testing.assert_close(equations.solve().matrix(), by_lstsq(keys, values, penalty), rtol=1e-11, atol=1e-13)


def test_the_dual_keeps_exact_factors() -> None:
    keys, values, penalty = problem(5, 30, 0.1, 6)
    solution = solve_dual(keys, values, penalty)
    assert solution.left is not None
    assert solution.right is not None
    assert solution.left.shape == (2, 30, 5)
    torch.testing.assert_close(solution.left, keys.mT / penalty.lam[:, None, None], rtol=1e-12, atol=1e-12)
    # The value shifts come back from the factors alone: (K K' / lambda + I) right = V.
    system = keys @ solution.left + torch.eye(5, dtype=F64)
    torch.testing.assert_close(system @ solution.right, values, rtol=1e-10, atol=1e-12)


def test_fp32_falls_back_to_fp64_where_it_must() -> None:
    generator = torch.Generator().manual_seed(7)
    scales = 3 * torch.logspace(0, -2, 128)  # K K' / lambda spans ten decades, more than fp32 has
    keys, values = torch.randn(1, 128, 128, generator=generator) * scales, torch.randn(1, 128, 16, generator=generator)
    penalty = Penalty(torch.tensor([1e-3]), torch.zeros(1), Preserved.none(1, 128))
    assert not solve_dual(keys, values, penalty).residual <= RESIDUAL_LIMIT
    solution = solve(keys, values, penalty)
    assert solution.factor.dtype == F64
    assert solution.residual <= 1e-8
    assert error(solution.matrix(), by_lstsq(keys.double(), values.double(), penalty.to(F64))) <= 1e-8


def test_fp32_stays_fp32_where_it_can() -> None:
    keys, values, penalty = problem(10, 30, 1.0, 8)
    solution = solve(keys.float(), values.float(), penalty.to(torch.float32))
    assert solution.factor.dtype == torch.float32
    assert error(solution.matrix().double(), by_lstsq(keys, values, penalty)) <= 1e-5


@pytest.mark.parametrize("n", [3, 30])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("broken", ["no lambda", "infinite key", "nan value"])
def test_a_singular_problem_is_refused(n: int, dtype: torch.dtype, broken: str) -> None:
    keys, values, penalty = problem(n, 8, 1.0, 9)
    if broken == "no lambda":
        penalty = Penalty(penalty.lam * 0, penalty.mu, penalty.preserved)
    elif broken == "infinite key":
        keys[0, 0, 0] = float("inf")
    else:
        values[1, 0, 0] = float("nan")
    with pytest.raises(NumericsError, match="raise lambda"):
        solve(keys.to(dtype), values.to(dtype), penalty.to(dtype))


def test_nothing_to_move_is_no_shift() -> None:
    keys, values, penalty = problem(4, 8, 1.0, 10)
    solution = solve(keys, values * 0, penalty)
    assert solution.residual == 0
    assert not solution.matrix().any()


# ---------------------------------------------------------------- gradients


def through_autograd(keys: Tensor, values: Tensor, penalty: Penalty, upstream: Tensor) -> tuple[Tensor, ...]:
    values = values.clone().requires_grad_(True)
    log_lam, log_mu = (t.log().requires_grad_(True) for t in (penalty.lam, penalty.mu))
    unit = torch.eye(keys.shape[-1], dtype=F64).repeat(len(keys), 1, 1)
    system = keys.mT @ keys + log_lam.exp()[:, None, None] * unit
    system = system + log_mu.exp()[:, None, None] * penalty.preserved.times(unit)
    shift = torch.linalg.solve(system, keys.mT @ values)
    return torch.autograd.grad((upstream * shift).sum(), [values, log_lam, log_mu], allow_unused=True)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 16), st.integers(1, 16), st.floats(-2, 2), st.floats(-2, 2), st.integers(0, 16), SEEDS)
def test_pull_back_is_autograd_through_the_solve(
    n: int, width: int, log_lam: float, log_mu: float, rank: int, seed: int
) -> None:
    """T2: by value, log lambda and log mu."""
    keys, values, penalty = problem(n, width, 10**log_lam, seed, 10**log_mu, min(rank, width))
    upstream = torch.randn(2, width, 3, dtype=F64, generator=torch.Generator().manual_seed(seed))
    wanted = through_autograd(keys, values, penalty, upstream)
    for form in (solve_dual, solve_primal):
        for mine, theirs in zip(form(keys, values, penalty).pull_back(keys, upstream), wanted, strict=True):
            scale = float(theirs.abs().max())
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9 * scale + 1e-12)


def test_pull_back_without_preserved_keys_leaves_mu_alone() -> None:
    keys, values, penalty = problem(5, 9, 0.3, 11)
    penalty = Penalty(penalty.lam, torch.ones(2, dtype=F64), penalty.preserved)
    upstream = torch.randn(2, 9, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    for form in (solve_dual, solve_primal):
        by_value, by_lambda, by_mu = form(keys, values, penalty).pull_back(keys, upstream)
        wanted = through_autograd(keys, values, penalty, upstream)
        torch.testing.assert_close(by_value, wanted[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(by_lambda, wanted[1], rtol=1e-9, atol=1e-12)
        assert not by_mu.any()


def test_pull_back_of_a_mixed_precision_solve() -> None:
    """fp32 keys and gradient meet an fp64 solution (after the fallback)."""
    keys, values, penalty = problem(5, 9, 0.3, 12, mu=1.0, rank=9)
    keys, upstream = keys.float(), torch.ones(2, 9, 3)
    solution: Solution = solve_primal(keys.double(), values, penalty)
    for mine, theirs in zip(
        solution.pull_back(keys, upstream),
        through_autograd(keys.double(), values, penalty, upstream.double()),
        strict=True,
    ):
        assert mine.dtype == F64
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)
