"""A base with a shift added, as an ordinary checkpoint: edited tensors rounded once, every other byte copied."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from malmen_cli.artifact.atomic import Staging
from malmen_cli.artifact.delta import CARD, norm_of, shape_of, with_shift
from malmen_cli.artifact.disk import existing_ancestor
from malmen_cli.artifact.manifest import MANIFEST, sealed
from malmen_cli.artifact.output import check_output, plan_bytes
from malmen_cli.artifact.placing import MARKS
from malmen_cli.artifact.staged import StagedFile
from malmen_cli.artifact.tensors import raw_bytes
from malmen_cli.base.cache import still_remembered
from malmen_cli.base.weights import EDITABLE, INDEX_FILE, TensorEntry, read_index, read_tensor, rooms
from malmen_cli.editing.shift import IN_OUT, ModuleShift, Shift
from malmen_cli.exceptions import CheckpointError, NumericsError

SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.spm", "vocab*", "LICENSE*", "NOTICE*")
CODE_AND_WEIGHTS = (
    "*.py",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.safetensors",
    "*.gguf",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.index.json",
)
Sharing = Literal["none", "reflink", "hardlink"]
TEMPLATES = "additional_chat_templates"  # the one folder transformers 5 keeps in a checkpoint


def write_merged(
    out: Path,
    base_folder: Path,
    shift: Shift,
    manifest: Mapping[str, object],
    *,
    card: str,
    force: bool,
    share: Sharing = "none",
) -> None:
    """Write the checkpoint round(fp32 W + fp32 S) in the base's shards, order and dtypes, one tensor at a time.

    Files other than weights are copied byte for byte if they belong to a model or tokenizer; what was not is listed in
    malmen.json under `left_out`. share: what the output has in common with the base where nothing is edited, as far as
    the file system can: blocks until either changes, or whole shards by hard links (listed under `linked`). Raises
    CheckpointError, NumericsError (naming the module) and OutputError.
    """
    shift.check_finite()
    check_output(out, base_folder=base_folder, force=force)
    index = read_index(base_folder)
    edits = {tensor: module for module, tensor in merge_plan(base_folder, shift).items()}
    measured: dict[str, dict[str, float]] = {}
    to_link = unedited_shards(base_folder, shift.modules, out) if share == "hardlink" else []
    need = plan_bytes("merged", base_folder=base_folder, linked=to_link)
    with Staging(out, force=force, need=need, share=share == "reflink") as staging:
        linked = _link(staging, to_link, {entry.file for entry in index.values()})
        for shard in sorted({entry.file for entry in index.values()}.difference(linked)):
            edited = sorted((index[name] for name in edits if index[name].file == shard), key=lambda entry: entry.start)
            with staging.file(shard.name) as file:
                position = 0
                for entry in edited:
                    _copy_range(file, shard, position, entry.start)
                    name = edits[entry.name]
                    weight, measured[name] = merged_weight(name, read_tensor(entry), shift.modules[name])
                    file.write(raw_bytes(weight))
                    position = entry.end
                _copy_range(file, shard, position, None)
        copied, left_out = side_files(base_folder, {entry.file for entry in index.values()})
        for name in copied:
            _refuse_link_out(base_folder, name)
            with staging.file(name) as file:
                _copy_range(file, base_folder / name, 0, None)
        staging.write(CARD, card.encode())
        content = with_shift(manifest, shift, measured)
        content |= {"format": "merged", "files": dict(staging.sha256), "left_out": left_out}
        content |= {"linked": [shard.name for shard in linked]} if linked else {}
        staging.write(MANIFEST, sealed(content))


def unedited_shards(base_folder: Path, modules: Iterable[str], out: Path) -> list[Path]:
    """Shards without a weight of `modules` that `out` can have by hard links, since they lie on its device."""
    index = read_index(base_folder)
    edited = {index[_tensor_name(base_folder, index, name)].file for name in modules}
    device = existing_ancestor(Path(os.path.abspath(out)).parent).stat().st_dev
    return sorted(file for file in {e.file for e in index.values()} - edited if file.stat().st_dev == device)


def merge_plan(base_folder: Path, shift: Shift) -> dict[str, str]:
    """Module name -> name of its weight in the checkpoint.

    A checkpoint of the inner model lacks the prefix a loaded module has ("transformer."), another may have one more;
    such a name is used when it is the only one. Raises CheckpointError where there is none or more than one, and where
    the tensor there has another shape or no float dtype.
    """
    index = read_index(base_folder)
    plan = {name: _tensor_name(base_folder, index, name) for name in shift.modules}
    for name, tensor in plan.items():
        _check_tensor(base_folder, name, index[tensor], shift.modules[name])
    if len(set(plan.values())) < len(plan):
        raise CheckpointError(
            f"{base_folder}: two edited modules have one weight in the checkpoint; edit only one of them"
        )
    return plan


def merged_weight(name: str, weight: Tensor, module: ModuleShift) -> tuple[Tensor, dict[str, float]]:
    """round(W + S) in W's dtype, computed in fp32 (fp64 for fp64 weights), and how much of S survived the rounding.

    realised: ||round(W + S) - W|| / ||S||, which noise can lift over 1 where a shift is smaller than the dtype's steps;
    rounding_error: ||round(W + S) - (W + S)|| / ||S||, which then is large; relative_norm: ||S|| / ||W||.
    Raises NumericsError when the result is not finite.
    """
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    summed = exact + module.for_weight().to(exact.device)  # the shift may lie on an accelerator
    rounded = summed.to(weight.dtype)
    kept = rounded.to(exact.dtype, copy=True)
    lost = float((summed - kept).double().norm())
    if not math.isfinite(lost):
        raise NumericsError(
            f"{name}: base plus shift is not finite in {weight.dtype}; check the base, or try a smaller step"
        )
    norm, moved, size = norm_of(module), float(kept.sub_(exact).double().norm()), float(exact.double().norm())
    return rounded, {
        "realised": moved / norm if norm else 1.0,
        "rounding_error": lost / norm if norm else 0.0,
        "relative_norm": norm / size if size else 0.0,
    }


def measure(base_folder: Path, shift: Shift) -> dict[str, dict[str, float]]:
    """The figures of `merged_weight` for every module, before anything is written."""
    index = read_index(base_folder)
    plan = merge_plan(base_folder, shift)
    return {
        name: merged_weight(name, read_tensor(index[tensor]), shift.modules[name])[1] for name, tensor in plan.items()
    }


def side_files(folder: Path, weights: set[Path]) -> tuple[list[str], list[str]]:
    """The files beside the weights that a merged checkpoint copies, and those it leaves out, sorted."""
    own = {CARD, *MARKS, *(path.name for path in weights)}
    paths = [path for path in folder.iterdir() if path.name not in own and path.name != TEMPLATES]
    if (folder / TEMPLATES).is_dir():
        paths += (folder / TEMPLATES).iterdir()
    sharded = not any(path.name == "model.safetensors" for path in weights)
    copied = [path.relative_to(folder).as_posix() for path in paths if _belongs(path, sharded)]
    left_out = {path.relative_to(folder).as_posix() for path in paths} - set(copied)
    return sorted(copied), sorted(left_out)


def _belongs(path: Path, sharded: bool) -> bool:
    if path.name == INDEX_FILE:
        return sharded
    if not path.is_file() or any(fnmatchcase(path.name, pattern) for pattern in CODE_AND_WEIGHTS):
        return False
    return any(fnmatchcase(path.name, pattern) for pattern in SIDE_FILES)


def _refuse_link_out(folder: Path, name: str) -> None:
    """A link may not carry a file from elsewhere on this machine into an output that may be published."""
    if not any((folder / name).resolve().is_relative_to(room) for room in rooms(folder)):
        raise CheckpointError(f"{folder / name}: a symlink to a file outside its folder; copy it there if you trust it")


def _tensor_name(folder: Path, index: Mapping[str, TensorEntry], module: str) -> str:
    wanted = f"{module}.weight"
    if wanted in index:
        return wanted
    close = [name for name in index if wanted.endswith("." + name) or name.endswith("." + wanted)]
    if len(close) != 1:
        what = (
            f"no tensor {wanted}"
            if not close
            else f"{len(close)} tensors that may be {wanted} ({', '.join(close[:3])})"
        )
        raise CheckpointError(f"{folder}: {what}; the shift was made for another base")
    return close[0]


def _check_tensor(folder: Path, name: str, entry: TensorEntry, module: ModuleShift) -> None:
    dk, dv = shape_of(module)
    wanted = (dk, dv) if module.layout == IN_OUT else (dv, dk)
    if tuple(entry.shape) != wanted:
        raise CheckpointError(
            f"{folder}: {entry.name} has shape {tuple(entry.shape)}, the shift of {name} needs {wanted}; "
            "the shift was made for another base"
        )
    if entry.dtype not in EDITABLE:
        raise CheckpointError(
            f"{folder}: {entry.name} is {entry.dtype}, which a shift cannot be added to; use an unquantised base"
        )


def _link(staging: Staging, shards: Sequence[Path], files: Iterable[Path]) -> list[Path]:
    """Those of `shards` that could be linked; what is remembered of the base, all its `files`, holds."""
    if not shards:
        return []
    linked = []
    with still_remembered(files):
        for shard in shards:
            try:
                linked += [shard] if staging.link(shard.name, shard) else []
            except OSError as error:
                raise CheckpointError(f"{shard}: cannot be read: {error.strerror or error}") from error
    return linked


def _copy_range(file: StagedFile, source: Path, start: int, end: int | None) -> None:
    """Copy the bytes from `start` to `end` (the end of the file when None)."""
    try:
        end = source.stat().st_size if end is None else end
        copied = file.copy(source, start, end)
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be read: {error.strerror or error}") from error
    if start + copied < end:
        raise CheckpointError(f"{source}: became shorter while it was read; start again")
