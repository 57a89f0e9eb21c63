"""safetensors files with the same bytes for the same tensors, and reading them back with every doubt removed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from malmen_cli.artifact.atomic import Staging
from malmen_cli.artifact.disk import file_sha256
from malmen_cli.exceptions import EditorError

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def tensors_bytes(tensors: Mapping[str, Tensor]) -> int:
    """The size of the file `write_tensors` would write."""
    return len(_header(tensors)) + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def write_tensors(staging: Staging, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, one tensor at a time.

    One metadata key only: the safetensors library writes two or more in random order, and readers expect `format`.
    """
    with staging.file(name) as file:
        file.write(_header(tensors))
        for key in _order(tensors):
            file.write(raw_bytes(tensors[key]))


def read_tensors(path: Path, sha256: object) -> dict[str, Tensor]:
    """The tensors of a file whose sha256 is known. Raises EditorError when missing or damaged."""
    try:
        if file_sha256(path) != sha256:
            raise EditorError(f"{path}: damaged (its sha256 is not the one written beside it); write the folder again")
        return dict(load_file(path))
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise EditorError(f"{path}: cannot be read: {error}") from error


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes as safetensors keeps them: row-major, little-endian."""
    # A single number counts as contiguous whatever its stride, which a view as bytes minds.
    flat = tensor.detach().cpu().contiguous().as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Widest type first, so that every tensor is aligned to its own element size; then by name."""
    return sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for key in _order(tensors):
        tensor = tensors[key]
        end = start + tensor.numel() * tensor.element_size()
        entries[key] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
