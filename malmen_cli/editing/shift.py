"""A Shift: the change of weights that edits make, and putting it into a loaded model and out again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from malmen_cli.exceptions import EditorError, NumericsError

IN_OUT = "in_out"  # Conv1D keeps its weight as (dk, dv)
OUT_IN = "out_in"  # nn.Linear keeps the transpose, (dv, dk)


def weight_layout(module: nn.Module) -> str:
    """How `module` stores its weight, by type: a square weight's shape would not tell."""
    return OUT_IN if isinstance(module, nn.Linear) else IN_OUT


@dataclass(frozen=True)
class ModuleShift:
    """The shift of one module in row convention (dk, dv): dense, or exactly `left @ right`.

    left: (dk, n) fp32; right: (n, dv) fp32; dense: (dk, dv) fp32. Either `dense` or both factors are set.
    """

    layout: str
    dense: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None

    def matrix(self) -> Tensor:
        """The shift as one (dk, dv) fp32 matrix."""
        if self.dense is not None:
            return self.dense
        assert self.left is not None and self.right is not None
        return self.left @ self.right

    @property
    def shape(self) -> tuple[int, int]:
        """(dk, dv)."""
        if self.dense is not None:
            return int(self.dense.shape[0]), int(self.dense.shape[1])
        assert self.left is not None and self.right is not None
        return int(self.left.shape[0]), int(self.right.shape[1])

    def for_weight(self) -> Tensor:
        """The shift as the module stores its weight: (dk, dv) for Conv1D, (dv, dk) for Linear."""
        matrix = self.matrix()
        return matrix if self.layout == IN_OUT else matrix.T

    def plus(self, other: ModuleShift) -> ModuleShift:
        """The sum: exact factors up to dk rows, dense beyond."""
        if self.left is not None and other.left is not None and self.right is not None and other.right is not None:
            left = torch.cat([self.left, other.left], 1)
            if left.shape[1] <= left.shape[0]:
                return ModuleShift(self.layout, left=left, right=torch.cat([self.right, other.right]))
        return ModuleShift(self.layout, dense=self.matrix() + other.matrix())

    @property
    def rank(self) -> int | None:
        """Columns of the exact factorisation (an upper bound of the rank); None when dense."""
        return None if self.left is None else int(self.left.shape[1])


@dataclass(frozen=True)
class Shift:
    """Module name -> ModuleShift, and which fact each low-rank row belongs to.

    `row_facts[j]` is the id of the fact behind row j of every module's factors (empty when dense).
    `residual` is the worst relative residual of the linear systems solved.
    """

    modules: Mapping[str, ModuleShift]
    row_facts: tuple[str, ...] = ()
    residual: float = 0.0

    def plus(self, other: Shift) -> Shift:
        """The sum of two shifts of the same modules: factors side by side while that is still low rank, else dense."""
        modules, dense = {}, False
        for name, mine in self.modules.items():
            modules[name] = mine.plus(other.modules[name])
            dense = dense or modules[name].dense is not None
        rows = () if dense else (*self.row_facts, *other.row_facts)
        return Shift(modules, rows, max(self.residual, other.residual))

    def check_finite(self) -> None:
        """Raise NumericsError naming the first module whose shift is not finite."""
        for name, shift in self.modules.items():
            for tensor in (shift.dense, shift.left, shift.right):
                if tensor is not None and not bool(torch.isfinite(tensor).all()):
                    raise NumericsError(f"the shift of {name} is not finite; try a smaller step or a larger lambda")


def check_fits(model: nn.Module, shift: Shift) -> None:
    """Raise EditorError for a module that the model does not have, or that has another shape or layout.

    Judged by the factors' shapes, before their product is made: of a stranger's delta it may be of any size.
    """
    modules = dict(model.named_modules())
    for name, module in shift.modules.items():
        found = modules.get(name)
        weight = getattr(found, "weight", None)
        if found is None or not isinstance(weight, Tensor) or weight.dim() != 2:
            raise EditorError(f"the shift changes {name}, which the model does not have; it was made for another base")
        shape = module.shape if module.layout == IN_OUT else module.shape[::-1]
        if module.layout != weight_layout(found) or tuple(weight.shape) != shape:
            raise EditorError(
                f"the shift of {name} is for a weight of shape {shape}, not {tuple(weight.shape)}; "
                "it was made for another base"
            )


@contextmanager
def applied(model: nn.Module, shift: Shift, *, stored: torch.dtype | None = None) -> Iterator[None]:
    """Run the body with every module's weight at round(fp32 weight + fp32 shift), then copy the originals back.

    Copies, never subtractions: one `+=`/`-=` round trip changes weights. stored: the dtype of the checkpoint, where the
    weights are to be what a merged output would have, though the model computes in a wider one.
    """
    shift.check_finite()
    check_fits(model, shift)
    kept: dict[str, Tensor] = {}
    try:
        for name, module_shift in shift.modules.items():
            weight = _weight(model, name)
            kept[name] = weight.detach().clone()
            summed = weight.detach().float() + module_shift.for_weight().to(weight.device)
            weight.data.copy_(summed if stored is None else summed.to(stored))
        yield
    finally:
        for name, original in kept.items():
            _weight(model, name).data.copy_(original)


def _weight(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight
