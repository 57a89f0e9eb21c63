"""The ridge problem that joins value shifts into one parameter shift, with preserved keys.

    S = argmin ||K S - V||^2 + lambda ||S||^2 + mu E||k0 S||^2

Everything is written in whitened keys `Kw = K P^(1/2)` with `P = (lambda I + mu C0)^-1`, where the problem is a
ridge problem with lambda 1 and `S = P^(1/2) (Kw'Kw + I)^-1 Kw' V`. Tensors carry a leading module axis m:
modules of one shape are one batched computation.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from malmen_cli.base import ranks
from malmen_cli.exceptions import NumericsError

RESIDUAL_LIMIT = 1e-4  # a worse relative residual in fp32 is solved again in fp64
EXACT_WIDTH = 4096  # of C0, beyond which its leading part is found by random projection: eigh is cubic


@dataclass(frozen=True)
class Preserved:
    """`C0 = E[k0 k0']` of keys that must not change, as `U diag(e - c) U' + c I`.

    basis U: (m, dk, r) orthonormal columns; energies e: (m, r); rest c: (m,) the mean of the energies left out.
    """

    basis: Tensor
    energies: Tensor
    rest: Tensor

    @classmethod
    def of(cls, second_moment: Tensor, rank: int) -> Preserved:
        """The best such form of second moments (m, dk, dk)."""
        width = second_moment.shape[-1]
        rank = min(rank, width)
        pairs = [_leading(matrix.double(), rank) for matrix in second_moment]  # one at a time: dk can be large
        kept = torch.stack([energies for energies, _ in pairs]).clamp(min=0)
        basis = torch.stack([vectors for _, vectors in pairs])
        trace = second_moment.double().diagonal(dim1=-2, dim2=-1).sum(-1)
        rest = (trace - kept.sum(-1)).clamp(min=0) / (width - rank) if width > rank else kept[:, 0]
        return cls(basis.float().contiguous(), kept.float(), rest.float())

    @classmethod
    def whole(cls, second_moment: Tensor) -> Preserved:
        """Second moments (m, dk, dk) as they are, in fp64; what rounding made negative is 0."""
        pairs = [torch.linalg.eigh(matrix.double()) for matrix in second_moment]
        energies = torch.stack([energies for energies, _ in pairs]).clamp(min=0)
        return cls(torch.stack([vectors for _, vectors in pairs]), energies, energies[:, 0])

    def forbidden(self, threshold: float) -> Preserved:
        """Of one module's moments: energies from `threshold` on infinite, so that nothing may change along them, the
        others 0. Energies are ascending."""
        kept = self.energies[0] >= threshold
        return Preserved(
            self.basis[..., kept], torch.full_like(self.energies[:, kept], torch.inf), torch.zeros_like(self.rest)
        )

    @classmethod
    def none(cls, modules: int, width: int, device: torch.device | None = None) -> Preserved:
        """No preserved keys: C0 = 0."""
        return cls(
            torch.zeros(modules, width, 0, device=device),
            torch.zeros(modules, 0, device=device),
            torch.zeros(modules, device=device),
        )

    def part(self, modules: slice) -> Preserved:
        return Preserved(self.basis[modules], self.energies[modules], self.rest[modules])

    def to(self, target: torch.dtype | torch.device) -> Preserved:
        return Preserved(*(tensor.to(target) for tensor in (self.basis, self.energies, self.rest)))

    def times(self, matrix: Tensor) -> Tensor:
        """`C0 @ matrix` for a matrix (m, dk, *)."""
        inner = (self.energies - self.rest[:, None])[..., None] * (self.basis.mT @ matrix)
        return self.basis @ inner + self.rest[:, None, None] * matrix


@dataclass(frozen=True)
class Penalty:
    """`lambda ||S||^2 + mu E||k0 S||^2`, applied as `P^(1/2)`. lam, mu: (m,)."""

    lam: Tensor
    mu: Tensor
    preserved: Preserved

    def part(self, modules: slice) -> Penalty:
        """That of some of the modules."""
        return Penalty(self.lam[modules], self.mu[modules], self.preserved.part(modules))

    def to(self, target: torch.dtype | torch.device) -> Penalty:
        return Penalty(self.lam.to(target), self.mu.to(target), self.preserved.to(target))

    def whiten(self, matrix: Tensor) -> Tensor:
        """`P^(1/2) @ matrix` for a matrix (m, dk, *), by the closed form on C0's basis."""
        matrix = matrix.contiguous()  # of rows that stand transposed the product takes three times as long
        floor = self.lam + self.mu * self.preserved.rest
        along = self.lam[:, None] + self.mu[:, None] * self.preserved.energies
        shrink = 1 - (floor[:, None] / along).sqrt()
        basis = self.preserved.basis
        projected = shrink[..., None] * (basis.mT @ matrix)
        result: Tensor = (matrix - basis @ projected) * floor.rsqrt()[:, None, None]
        return result

    def back(self, matrix: Tensor) -> Tensor:
        """`P^(1/2)' @ matrix`: this root is symmetric."""
        return self.whiten(matrix)

    def inverse(self, matrix: Tensor) -> Tensor:
        """`P @ matrix` for a matrix (m, dk, *), in half the time of its root twice; where much of the matrix lies along
        C0's heavy directions, to fewer digits."""
        matrix = matrix.contiguous()
        floor = self.lam + self.mu * self.preserved.rest
        along = self.lam[:, None] + self.mu[:, None] * self.preserved.energies
        basis = self.preserved.basis
        projected = (1 - floor[:, None] / along)[..., None] * (basis.mT @ matrix)
        result: Tensor = (matrix - basis @ projected) / floor[:, None, None]
        return result


@dataclass(frozen=True)
class Triangular:
    """`tr(S' M S)` for positive definite M, applied as the root L^-1 of P = M^-1 where M = L L': for a fraction of what
    the eigendecomposition behind a `Penalty` of full rank costs, but with no derivatives by lambda and mu.

    lam: (m,) what M has on its diagonal beside moments; lower: (m, dk, dk).
    """

    lam: Tensor
    lower: Tensor

    def to(self, target: torch.dtype | torch.device) -> Triangular:
        return Triangular(self.lam.to(target), self.lower.to(target))

    def whiten(self, matrix: Tensor) -> Tensor:
        """`L^-1 @ matrix` for a matrix (m, dk, *)."""
        found: Tensor = torch.linalg.solve_triangular(self.lower, matrix.contiguous(), upper=False)
        return found

    def back(self, matrix: Tensor) -> Tensor:
        """`L^-T @ matrix` for a matrix (m, dk, *)."""
        found: Tensor = torch.linalg.solve_triangular(self.lower.mT, matrix.contiguous(), upper=True)
        return found


@dataclass(frozen=True)
class Solution:
    """The shift of m modules: dense (m, dk, dv), or factors left (m, dk, n) and right (m, n, dv).

    `pull_back(gradient)` needs the Cholesky factor and whitened keys of the solve; they are kept here. values: the V
    that were joined, with the graph that made them, where their maker has another use for it.
    """

    left: Tensor | None
    right: Tensor | None
    dense: Tensor | None
    factor: Tensor
    whitened: Tensor | None
    penalty: Penalty | Triangular
    residual: float
    values: Tensor | None = None

    def matrix(self) -> Tensor:
        """(m, dk, dv)."""
        if self.dense is not None:
            return self.dense
        assert self.left is not None and self.right is not None
        return self.left @ self.right

    def pull_back(self, keys: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From X = dL/dS (m, dk, dv): dL/dV = K M (m, n, dv), dL/dlog lambda and dL/dlog mu (m,).

        M = A^-1 X with A = K'K + lambda I + mu C0; dL/dlog lambda = -lambda <M, S>, dL/dlog mu = -mu <M, C0 S>.
        """
        penalty, whiten = self.penalty, self.penalty.whiten
        assert isinstance(penalty, Penalty)
        gradient = gradient.to(self.factor.dtype)
        if self.left is not None and self.right is not None and self.right.shape[-2] <= self.right.shape[-1]:
            # S = left right with left = P K', and M = P (X - K' dL/dV): no product need be wider than the n rows.
            by_value = torch.cholesky_solve(self.left.mT @ gradient, self.factor)
            inner = penalty.inverse(gradient @ self.right.mT) - self.left @ (by_value @ self.right.mT)
            shift = self.left  # M right', and <M right', left> is <M, S>
        else:
            pulled, shift = whiten(gradient), self.matrix()
            if self.whitened is not None:
                by_value = torch.cholesky_solve(self.whitened @ pulled, self.factor)
                inner = whiten(pulled - self.whitened.mT @ by_value)
            else:
                inner = whiten(torch.cholesky_solve(pulled, self.factor))
                by_value = keys.to(inner.dtype) @ inner
        by_lambda = -penalty.lam * (inner * shift).sum((-2, -1))
        by_mu = -penalty.mu * (inner * penalty.preserved.times(shift)).sum((-2, -1))
        return by_value, by_lambda, by_mu


def solve_dual(keys: Tensor, values: Tensor, penalty: Penalty | Triangular) -> Solution:
    """S = P K' (K P K' + I)^-1 V, exactly of rank n: for n <= dk. keys (m, n, dk), values (m, n, dv)."""
    whitened = penalty.whiten(keys.mT).mT
    system = whitened @ whitened.mT
    system.diagonal(dim1=-2, dim2=-1).add_(1)
    alpha, factor, residual = _solve(system, values)
    return Solution(penalty.back(whitened.mT), alpha, None, factor, whitened, penalty, residual)


class NormalEquations:
    """Kw'Kw and Kw'V as sums over rows: memory does not grow with the number of facts."""

    def __init__(self, penalty: Penalty | Triangular, width: int, out: int) -> None:
        modules, like = len(penalty.lam), penalty.lam
        self.penalty = penalty
        self.gram = torch.zeros(modules, width, width, dtype=like.dtype, device=like.device)
        self.cross = torch.zeros(modules, width, out, dtype=like.dtype, device=like.device)

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Add rows: keys (m, n, dk), values (m, n, dv)."""
        whitened = self.penalty.whiten(keys.to(self.gram.dtype).mT)
        self.gram.baddbmm_(whitened, whitened.mT)
        self.cross.baddbmm_(whitened, values.to(self.cross.dtype))

    def add_up(self) -> None:
        """Take in the rows of all ranks."""
        ranks.add_up(self.gram, self.cross)

    def part(self, modules: slice) -> NormalEquations:
        """Those of some of the modules; they are the same sums."""
        assert isinstance(self.penalty, Penalty)
        part = copy(self)
        part.penalty, part.gram, part.cross = self.penalty.part(modules), self.gram[modules], self.cross[modules]
        return part

    def solve(self) -> Solution:
        """The shift; no more rows can be added."""
        self.gram.diagonal(dim1=-2, dim2=-1).add_(1)
        inner, factor, residual = _solve(self.gram, self.cross)
        return Solution(None, None, self.penalty.back(inner), factor, None, self.penalty, residual)


def solve_primal(keys: Tensor, values: Tensor, penalty: Penalty) -> Solution:
    """S = (K'K + lambda I + mu C0)^-1 K'V, for n > dk. keys (m, n, dk), values (m, n, dv)."""
    equations = NormalEquations(penalty, keys.shape[-1], values.shape[-1])
    equations.add(keys, values)
    return equations.solve()


def solve(keys: Tensor, values: Tensor, penalty: Penalty) -> Solution:
    """The cheaper of the two closed forms, in the penalty's dtype; fp32 falls back to fp64 where it must. Of several
    ranks, each solves for modules of its own: where one has to fall back all do, and where one cannot solve all raise
    NumericsError."""
    form = solve_dual if keys.shape[-2] <= keys.shape[-1] else solve_primal
    dtype = penalty.lam.dtype
    solution = form(keys.to(dtype), values.to(dtype), penalty)
    worst = ranks.worst(solution.residual)
    if dtype == torch.float32 and not worst <= RESIDUAL_LIMIT:
        solution = form(keys.double(), values.double(), penalty.to(torch.float64))
        worst = ranks.worst(solution.residual)
    refuse_singular(worst)
    return solution


def refuse_singular(residual: float, *modules: str) -> None:
    """Raise NumericsError where a solve in fp64 left a relative residual above RESIDUAL_LIMIT, or NaN; of `modules`."""
    if not residual <= RESIDUAL_LIMIT:
        where = modules[0] + (f" to {modules[-1]}" if len(modules) > 1 else "") + ": " if modules else ""
        found = f"relative residual {residual:.1e} in fp64"
        raise NumericsError(f"{where}the normal equation is singular ({found}); raise lambda")


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` largest eigenvalues, ascending, and their vectors; by random projection where dk is large."""
    if len(matrix) <= EXACT_WIDTH:
        energies, vectors = torch.linalg.eigh(matrix)
        return energies[len(matrix) - rank :], vectors[:, len(matrix) - rank :]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vectors, energies, _ = torch.svd_lowrank(matrix, q=rank, niter=4)
    return energies.flip(0), vectors.flip(1)


def _solve(system: Tensor, right: Tensor) -> tuple[Tensor, Tensor, float]:
    """Cholesky solution of symmetric positive definite systems, the factor, and the worst relative residual."""
    factor, failed = torch.linalg.cholesky_ex(system)
    if bool(failed.any()) or not bool(torch.isfinite(factor).all()):
        return torch.zeros_like(right), factor, float("inf")
    solution = torch.cholesky_solve(right, factor)
    error = (system @ solution - right).norm(dim=(-2, -1)) / right.norm(dim=(-2, -1)).clamp(
        min=torch.finfo(right.dtype).tiny
    )
    return solution, factor, float(error.max()) if len(error) else 0.0
