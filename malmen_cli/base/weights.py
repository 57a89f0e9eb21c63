"""The weights of a checkpoint folder: found, read and identified without running or believing any of it.

Only safetensors are opened. The index of a sharded checkpoint is a list of file names written by somebody
else, so a name is joined to the folder only after a check; transformers itself follows `../outside`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from malmen_cli.base.cache import cached_digest
from malmen_cli.base.header import MAX_TENSORS, TensorEntry, load_json, read_header, shown
from malmen_cli.exceptions import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = [
    "INDEX_FILE",
    "SINGLE_FILE",
    "TensorEntry",
    "fingerprint",
    "is_plain",
    "read_index",
    "read_tensor",
    "stored_dtype",
]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

LONGEST_NAME = 255  # of a file, on the file systems there are
MAX_INDEX_BYTES = 256 * 1024**2
CHUNK_BYTES = 8 * 1024**2
EDITABLE = ("F64", "F32", "F16", "BF16")

TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
}


def read_index(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of the checkpoint in `folder`, by name, sorted.

    `model.safetensors` is taken before an index, as transformers does. Each `file` is `folder / shard`.
    Raises CheckpointError on anything missing, unsafe or broken.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if _is_there(single):
        found = {entry.name: entry for entry in read_header(_checked(folder, SINGLE_FILE))}
    elif _is_there(index):
        found = _read_shards(folder, _weight_map(_checked(folder, INDEX_FILE)))
    else:
        raise CheckpointError(_no_weights(folder))
    if not found:
        raise CheckpointError(f"{folder}: its safetensors hold no tensor; fetch the checkpoint again")
    return dict(sorted(found.items()))


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _no_weights(folder: Path) -> str:
    """Why there is nothing to read; pickles are seen by name only, never opened."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        return f"{folder}: cannot be read: {error.strerror or error}"
    pickle = next((name for name in names if name.lower().endswith(PICKLE_SUFFIXES)), None)
    if pickle is None:
        return f"{folder}: no {SINGLE_FILE} or {INDEX_FILE} in it; pass a folder that save_pretrained wrote"
    load = f"A.from_pretrained({str(folder)!r}).save_pretrained({str(folder) + '-safe'!r})"
    command = "python -c " + json.dumps(f"from transformers import AutoModelForCausalLM as A; {load}")
    return (
        f"{folder}: {pickle} is a pickle, not opened as it could run code; if you trust it, convert it with: {command}"
    )


def _weight_map(index: Path) -> dict[str, str]:
    """tensor name -> file name, as the index has it: sized and typed, the file names not yet checked."""
    try:
        if index.stat().st_size > MAX_INDEX_BYTES:
            raise CheckpointError(f"{index}: more than {MAX_INDEX_BYTES} bytes, which no checkpoint needs; refused")
        weight_map = _weight_map_of(load_json(index.read_text(encoding="utf-8")))
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read: {error.strerror or error}") from None
    except RecursionError:
        raise CheckpointError(f"{index}: nested too deep to be an index; fetch it again") from None
    except ValueError as error:
        raise CheckpointError(f"{index}: not a safetensors index: {error}; fetch it again") from None
    if len(weight_map) >= MAX_TENSORS:
        raise CheckpointError(f"{index}: names {len(weight_map)} tensors, {MAX_TENSORS} or more; refused")
    return weight_map


def _weight_map_of(document: Any) -> dict[str, str]:
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError("it has no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise ValueError(f"the file of tensor {shown(tensor)} is not a string")
    return weight_map


def _read_shards(folder: Path, weight_map: dict[str, str]) -> dict[str, TensorEntry]:
    # every name is judged before any file is opened
    shards = {name: _checked(folder, name) for name in sorted(set(weight_map.values()))}
    found: dict[str, TensorEntry] = {}
    for name, file in shards.items():
        for entry in read_header(file):
            if weight_map.get(entry.name) != name:
                what = f"tensor {shown(entry.name)} is in it but {INDEX_FILE} does not say so"
                raise CheckpointError(f"{file}: {what}; fetch the checkpoint again")
            found[entry.name] = entry
    if absent := sorted(weight_map.keys() - found.keys()):
        what = f"{len(absent)} tensors that {INDEX_FILE} puts there are missing, the first {shown(absent[0])}"
        raise CheckpointError(f"{folder / weight_map[absent[0]]}: {what}; fetch the checkpoint again")
    return found


def _checked(folder: Path, name: str) -> Path:
    """`folder / name` once `name` is known to be a plain file of the folder. Raises CheckpointError."""
    where = f"{folder / INDEX_FILE}: names the file {shown(name)}"
    if not is_plain(name):
        raise CheckpointError(f"{where}, but may name only files beside it; do not use this checkpoint")
    if not name.endswith((".safetensors", INDEX_FILE)):
        raise CheckpointError(f"{where}, which is not safetensors and is not opened; convert the checkpoint")
    path = folder / name
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise CheckpointError(f"{path}: missing; fetch the checkpoint again") from None
    if not any(target.is_relative_to(room) for room in rooms(folder)):
        raise CheckpointError(f"{path}: a symlink to a file outside its folder; copy the file there if you trust it")
    if not target.is_file():
        raise CheckpointError(f"{path}: not a file; fetch the checkpoint again")
    return path


def is_plain(name: str) -> bool:
    """One component on every system: no separator, drive, parent, control character or lone surrogate, not endless."""
    if name in ("", ".", "..") or len(name) > LONGEST_NAME or any(character in "/\\:" for character in name):
        return False
    return name.isprintable() and name.isascii()


def rooms(folder: Path) -> Iterable[Path]:
    """Where the files of `folder` may truly lie: in it, or for a snapshot in the hub cache's blob stores."""
    real = folder.resolve()
    yield real
    repository = real.parent.parent
    if real.parent.name == "snapshots" and repository.name.startswith("models--"):
        yield repository / "blobs"
        yield repository.parent / "blobs"  # one store for all repositories, since huggingface_hub 2


def fingerprint(folder: Path) -> str:
    """The identity of the checkpoint in `folder`: 64 hex digits, remembered while its files do not change.

    sha256 over every tensor's name, dtype, shape and bytes, by name; how the tensors are spread over files,
    the order in which they lie there and the files' metadata do not count. Raises CheckpointError.
    """
    entries = read_index(folder).values()
    try:
        return cached_digest((entry.file for entry in entries), lambda: _digest(entries))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror or error}") from None


def _digest(entries: Iterable[TensorEntry]) -> str:
    """Memory stays at one chunk, whatever the tensors' sizes."""
    digest = hashlib.sha256()
    chunk = memoryview(bytearray(CHUNK_BYTES))
    for entry in entries:
        digest.update(json.dumps([entry.name, entry.dtype, entry.shape]).encode() + b"\n")
        with entry.file.open("rb") as stream:
            for start in range(entry.start, entry.end, CHUNK_BYTES):
                part = chunk[: min(CHUNK_BYTES, entry.end - start)]
                _fill(part, stream, start, entry)
                digest.update(part)
    return digest.hexdigest()


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The torch dtype that most bytes of the checkpoint's matrices are in, of those that weights are edited in (16 bits
    and more); None where there is no such matrix. Raises CheckpointError.
    """
    import torch

    sizes: Counter[str] = Counter()
    for entry in read_index(folder).values():
        if entry.dtype in EDITABLE and len(entry.shape) == 2:
            sizes[entry.dtype] += entry.end - entry.start
    return getattr(torch, TORCH_NAMES[max(sizes, key=lambda name: sizes[name])]) if sizes else None


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """The tensor itself, on the CPU, in its own dtype and shape. Raises CheckpointError."""
    import torch

    dtype = getattr(torch, TORCH_NAMES[entry.dtype])
    if entry.start == entry.end:  # frombuffer refuses to make empty tensors
        return torch.empty(entry.shape, dtype=dtype)
    raw = bytearray(entry.end - entry.start)
    try:
        with entry.file.open("rb") as stream:
            _fill(memoryview(raw), stream, entry.start, entry)
    except OSError as error:
        raise CheckpointError(f"{entry.file}: cannot be read: {error.strerror or error}") from None
    return torch.frombuffer(raw, dtype=dtype).reshape(entry.shape)


def _fill(part: memoryview, stream: BufferedReader, start: int, entry: TensorEntry) -> None:
    """Read the bytes from `start` on into `part`; a file may have been cut since its header was read."""
    stream.seek(start)
    if stream.readinto(part) != len(part):
        raise CheckpointError(f"{entry.file}: became shorter while it was read; fetch the checkpoint again")
