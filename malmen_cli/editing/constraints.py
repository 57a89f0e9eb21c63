"""How one block takes up a residual R for keys K: MEMIT, ROME and AlphaEdit, by what they do with `C = E[k k']`.

In row convention, S the shift (dk, dv), C over ordinary text:

    least_squares  MEMIT      S = (lambda C + K'K)^-1 K'R                                    2210.07229, equation 14
    equality       ROME       fact by fact: S <- S + C^-1 k (r - k S) / (k' C^-1 k)          2202.05262, equation 2
    null_space     AlphaEdit  S = P K' (K P K' + lambda_2 I)^-1 R, P onto what C leaves      2410.02355, section 3
"""

from __future__ import annotations

import torch
from torch import Tensor

from malmen_cli.editing.ridge import NormalEquations, Penalty, Preserved, Triangular, solve_dual
from malmen_cli.editing.settings import MemitSettings
from malmen_cli.editing.shift import ModuleShift
from malmen_cli.exceptions import NumericsError, SpecError

# Beside C's mean energy: moments of fewer tokens than dk are singular, and they are kept in fp32.
FLOOR = 1e-6
CHAIN = 512  # rows of ROME's chain solved at once where there are more than dk


def check_moment(settings: MemitSettings, moment: Tensor, name: str) -> None:
    """Raise NumericsError where the moment C of module `name` is 0, SpecError where no eigenvalue of it is below
    `null_threshold`: told by a Cholesky factor, at a small part of an eigendecomposition's cost."""
    if not bool(moment.diagonal().sum() > 0):
        raise NumericsError(f"{name}: its keys are all zero over the text of the statistics")
    if settings.constraint == "null_space":
        above = moment.to(torch.float64, copy=True)
        above.diagonal().sub_(settings.null_threshold)
        if int(torch.linalg.cholesky_ex(above)[1]) == 0:
            least = f"{settings.null_threshold} or more"
            raise SpecError(f"null_threshold: the keys of {name} have energy {least} in every direction; raise it")


def penalty(settings: MemitSettings, moment: Tensor, name: str) -> Penalty | Triangular:
    """What holds the weight of module `name`, with C = `moment` (dk, dk), in fp64: `lambda C` (MEMIT), `C` (ROME), or
    everything outside C's null space, and lambda_2 inside (AlphaEdit).

    By a Cholesky factor where that will do. Raises as `check_moment` does.
    """
    check_moment(settings, moment, name)
    if settings.constraint != "null_space" and (found := _by_cholesky(settings, moment)) is not None:
        return found
    kept = Preserved.whole(moment[None])
    mean = kept.energies.mean(-1)
    if settings.constraint == "null_space":
        held = kept.forbidden(settings.null_threshold)
        return Penalty(torch.full_like(mean, settings.ridge), torch.ones_like(mean), held)
    weight = _weight(settings)
    return Penalty(weight * FLOOR * mean, torch.full_like(mean, weight), kept)


def _by_cholesky(settings: MemitSettings, moment: Tensor) -> Triangular | None:
    """The same penalty from a Cholesky factor. None where rounding has made an energy so negative that it takes half of
    what FLOOR gives or more: such energies have to be told from the others."""
    weighted = _weight(settings) * moment.double()
    floor = FLOOR * weighted.diagonal().mean()
    weighted.diagonal().add_(floor)
    lower = torch.linalg.cholesky_ex(weighted[None])[0]
    weighted.diagonal().sub_(floor / 2)  # positive definite exactly where every energy is above -floor / 2
    return Triangular(floor[None], lower) if int(torch.linalg.cholesky_ex(weighted)[1]) == 0 else None


def _weight(settings: MemitSettings) -> float:
    """lambda: ROME's equality knows none."""
    weight = settings.for_facts(0).moment_weight if settings.constraint == "least_squares" else 1.0
    assert weight is not None
    return weight


class Ridge:
    """MEMIT and AlphaEdit: exact factors up to dk facts, beyond them sums alone."""

    def __init__(self, penalty: Penalty | Triangular, rows: int, dk: int, dv: int) -> None:
        self.penalty = penalty
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.sums = NormalEquations(penalty, dk, dv) if rows > dk else None

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Rows of some facts: keys (n, dk), values (n, dv)."""
        if self.sums is not None:
            self.sums.add(keys[None], values[None])
        else:
            self.keys.append(keys)
            self.values.append(values)

    def finish(self, layout: str) -> tuple[ModuleShift, float]:
        """The module's shift in host memory, and the relative residual of its solve."""
        if self.sums is not None:
            solution = self.sums.solve()
            return ModuleShift(layout, dense=_host(solution.matrix()[0])), solution.residual
        dtype = self.penalty.lam.dtype
        solution = solve_dual(
            torch.cat(self.keys).to(dtype)[None], torch.cat(self.values).to(dtype)[None], self.penalty
        )
        assert solution.left is not None and solution.right is not None
        return _factors(layout, solution.left[0], solution.right[0]), solution.residual


class Chain:
    """ROME, one fact after the other: `k S = r` holds for each when it is put in, and later ones may move it again.

    With G = K C^-1 K' the whole chain is S = C^-1 K' A, tril(G) A = R: row i of it is the step of fact i. Up to dk
    facts that is one solve, whose factors are kept; beyond, the shift so far is, and CHAIN facts are put in at a time.
    """

    def __init__(self, penalty: Penalty | Triangular, rows: int, dk: int, dv: int) -> None:
        self.penalty = penalty
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.residual = 0.0
        like = penalty.lam
        self.dense = torch.zeros(dk, dv, dtype=like.dtype, device=like.device) if rows > dk else None

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Rows of the next facts: keys (n, dk), values (n, dv)."""
        self.keys.append(keys)
        self.values.append(values)
        if self.dense is not None and sum(map(len, self.keys)) >= CHAIN:
            self._put_in(self.dense)

    def finish(self, layout: str) -> tuple[ModuleShift, float]:
        """The module's shift in host memory, and the worst relative residual of its solves."""
        if self.dense is not None:
            if self.keys:
                self._put_in(self.dense)
            return ModuleShift(layout, dense=_host(self.dense)), self.residual
        left, right = self._solved()
        return _factors(layout, left, right), self.residual

    def _put_in(self, dense: Tensor) -> None:
        left, right = self._solved(dense)
        dense += left @ right

    def _solved(self, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Factors (dk, n) and (n, dv) of the chain over the rows held, behind the shift `before`; they are let go."""
        dtype = self.penalty.lam.dtype
        keys, values = torch.cat(self.keys).to(dtype), torch.cat(self.values).to(dtype)
        self.keys, self.values = [], []
        if before is not None:
            values = values - keys @ before
        whitened = self.penalty.whiten(keys.T[None])
        system = (whitened[0].T @ whitened[0]).tril()
        right = torch.linalg.solve_triangular(system, values, upper=False)
        error = (system @ right - values).norm() / values.norm().clamp(min=torch.finfo(dtype).tiny)
        self.residual = max(self.residual, float(error.nan_to_num(torch.inf)))
        return self.penalty.back(whitened)[0], right


def _factors(layout: str, left: Tensor, right: Tensor) -> ModuleShift:
    """`left @ right` as factors that bear being rounded to fp32: the columns of `C^-1 K'` all but coincide where C is
    small, so that large parts of them cancel in the product. Their rows are no longer one a fact."""
    basis, triangle = torch.linalg.qr(left)
    return ModuleShift(layout, left=_host(basis), right=_host(triangle @ right))


def _host(matrix: Tensor) -> Tensor:
    return matrix.float().cpu().contiguous()
