"""A shift on disk: `delta.safetensors` in fp32, `malmen.json` and a card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from malmen_cli.artifact.atomic import Staging
from malmen_cli.artifact.manifest import MANIFEST, check_base, peek, read_sealed, sealed
from malmen_cli.artifact.output import SIDE_FILES_BYTES, check_output
from malmen_cli.artifact.tensors import read_tensors, tensors_bytes, write_tensors
from malmen_cli.base.header import shown
from malmen_cli.editing.shift import IN_OUT, OUT_IN, ModuleShift, Shift
from malmen_cli.exceptions import EditorError

TENSORS = "delta.safetensors"
CARD = "README.md"
PARTS = ("dense", "left", "right")


def write_delta(out: Path, shift: Shift, manifest: Mapping[str, object], *, card: str, force: bool) -> None:
    """Write `shift` as a delta folder: exact low-rank factors where it has them, dense matrices else.

    Raises NumericsError for a shift that is not finite and OutputError when the folder cannot be written.
    """
    shift.check_finite()
    check_output(out, base_folder=None, force=force)
    tensors = {
        f"{name}.{part}": tensor.float()
        for name, module in shift.modules.items()
        for part in PARTS
        if (tensor := getattr(module, part)) is not None
    }
    with Staging(out, force=force, need=tensors_bytes(tensors) + SIDE_FILES_BYTES) as staging:
        write_tensors(staging, TENSORS, tensors)
        staging.write(CARD, card.encode())
        content = with_shift(manifest, shift) | {"format": "delta", "files": dict(staging.sha256)}
        staging.write(MANIFEST, sealed(content))


def with_shift(
    manifest: Mapping[str, object], shift: Shift, measured: Mapping[str, Mapping[str, float]] | None = None
) -> dict[str, object]:
    """The manifest with what is known of the shift: per module layout, shape, rank, norm and what was measured."""
    given = manifest.get("modules")
    said: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    modules = {
        name: dict(said.get(name, {}))
        | {"layout": module.layout, "shape": list(shape_of(module)), "rank": module.rank, "norm": norm_of(module)}
        | dict((measured or {}).get(name, {}))
        for name, module in shift.modules.items()
    }
    solver = manifest.get("solver")
    return dict(manifest) | {
        "modules": modules,
        "row_facts": list(shift.row_facts),
        "solver": (dict(solver) if isinstance(solver, Mapping) else {}) | {"residual": float(shift.residual)},
    }


def is_delta(folder: Path) -> bool:
    """Whether `folder` holds a delta, whole or damaged, rather than a checkpoint."""
    if (folder / TENSORS).is_file():
        return True
    content = peek(folder / MANIFEST)
    return content is not None and content.get("format") == "delta"


def read_delta(folder: Path, *, fingerprint: str | None) -> tuple[Shift, dict[str, Any]]:
    """The shift in a delta folder and its manifest.

    fingerprint: the base's, to be sure that the delta is for it; None to read the delta alone. Raises EditorError for
    another base and for anything missing, damaged or mis-shaped, NumericsError for values that are not finite.
    """
    manifest = read_sealed(folder / MANIFEST)
    if manifest.get("format") != "delta":
        raise EditorError(
            f"{folder}: holds a {shown(manifest.get('format'))[1:-1]}, not a delta; write one with --format delta"
        )
    check_base(folder, manifest, fingerprint)
    modules, files, row_facts = (manifest.get(key) for key in ("modules", "files", "row_facts"))
    if not isinstance(modules, dict) or not isinstance(files, dict) or not isinstance(row_facts, list):
        raise EditorError(f"{folder / MANIFEST}: not the manifest of a delta; write the delta again")
    tensors = read_tensors(folder / TENSORS, files.get(TENSORS))
    shift = Shift(
        {name: _module(folder, name, said, tensors) for name, said in modules.items()},
        row_facts=tuple(str(fact) for fact in row_facts),
        residual=_residual(folder, manifest.get("solver")),
    )
    if tensors:
        foreign = shown(min(tensors))[1:-1]
        raise EditorError(f"{folder / TENSORS}: {foreign} belongs to no module of the manifest; write the delta again")
    _check_rows(folder, shift)
    shift.check_finite()
    return shift, manifest


def shape_of(module: ModuleShift) -> tuple[int, int]:
    """(dk, dv) of a module's shift."""
    return module.shape


def norm_of(module: ModuleShift) -> float:
    """Frobenius norm of a module's shift, in fp64; of factors through whichever is smaller, their product or their Gram
    matrices, so that what is made never outgrows what was read."""
    if module.dense is not None or int(module.rank or 0) ** 2 > module.shape[0] * module.shape[1]:
        return float(module.matrix().double().norm())
    assert module.left is not None
    assert module.right is not None
    left, right = module.left.double(), module.right.double()
    squared = ((left.T @ left) * (right @ right.T)).sum()  # ||LR||^2 = tr(L'L RR')
    return float(squared.clamp(min=0.0).sqrt())


def _module(folder: Path, name: str, said: Any, tensors: dict[str, Tensor]) -> ModuleShift:
    """Take one module's tensors out of `tensors`, checked against what the manifest says of it."""
    found = {part: tensors.pop(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in tensors}
    said = said if isinstance(said, dict) else {}
    shapes = {part: list(tensor.shape) for part, tensor in found.items()}
    if (
        said.get("layout") not in (IN_OUT, OUT_IN)
        or shapes != _shapes_said(said)
        or any(tensor.dtype != torch.float32 for tensor in found.values())
    ):
        whose = shown(name)[1:-1]
        raise EditorError(
            f"{folder / TENSORS}: the tensors of {whose} are not those the manifest describes; write the delta again"
        )
    return ModuleShift(str(said["layout"]), **found)


def _shapes_said(said: Mapping[str, Any]) -> dict[str, list[int]] | None:
    shape, rank = said.get("shape"), said.get("rank")
    if not isinstance(shape, list) or len(shape) != 2:
        return None
    return {"dense": shape} if rank is None else {"left": [shape[0], rank], "right": [rank, shape[1]]}


def _residual(folder: Path, solver: object) -> float:
    """What the manifest says of the solve; 0 where it says nothing."""
    found = solver.get("residual", 0.0) if isinstance(solver, dict) else 0.0 if solver is None else solver
    if not isinstance(found, int | float):
        raise EditorError(f"{folder / MANIFEST}: its solver residual is no number; write the delta again")
    return float(found)


def _check_rows(folder: Path, shift: Shift) -> None:
    rows = len(shift.row_facts)
    if rows and any(module.rank not in (None, rows) for module in shift.modules.values()):
        raise EditorError(
            f"{folder / MANIFEST}: names {rows} rows, but the factors have another number; write the delta again"
        )
