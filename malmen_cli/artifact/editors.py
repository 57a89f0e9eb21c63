"""A trained editor on disk, and where the one for a base is found.

An editor folder holds `editor.safetensors`, `editor.json` (settings, base, sha256 of the tensors) and a card. Editors
are installed under the cache as `editors/<fingerprint of the base>`; some come with the package.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import malmen_cli
from malmen_cli.artifact.atomic import Staging
from malmen_cli.artifact.card import editor_card
from malmen_cli.artifact.delta import CARD
from malmen_cli.artifact.manifest import check_base, read_sealed, sealed
from malmen_cli.artifact.output import SIDE_FILES_BYTES, check_output
from malmen_cli.artifact.tensors import read_tensors, tensors_bytes, write_tensors
from malmen_cli.base.locate import cache_home
from malmen_cli.exceptions import EditorError, NumericsError

TENSORS = "editor.safetensors"
DESCRIPTION = "editor.json"
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


def save_editor(
    out: Path,
    tensors: Mapping[str, Tensor],
    description: Mapping[str, object],
    *,
    force: bool,
    previous: Path | None = None,
) -> None:
    """Write an editor folder. `description` is any JSON object; `base.fingerprint` in it ties the editor to a base.

    previous: where an editor that is replaced is kept. Raises NumericsError for a tensor that is not finite and
    OutputError when the folder cannot be written.
    """
    _check_finite(str(out), tensors)
    check_output(out, base_folder=None, force=force)
    with Staging(out, force=force, need=tensors_bytes(tensors) + SIDE_FILES_BYTES, previous=previous) as staging:
        write_tensors(staging, TENSORS, tensors)
        files = dict(staging.sha256)
        staging.write(CARD, editor_card(dict(description) | {"files": files}).encode())
        content = dict(description) | {
            "format": "editor",
            "files": dict(staging.sha256),
            "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()},
        }
        staging.write(DESCRIPTION, sealed(content))


def load_editor(folder: Path, *, fingerprint: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the description of an editor.

    fingerprint: the base's, to be sure that the editor is for it. Raises EditorError for another base and for anything
    missing or damaged, NumericsError for values that are not finite.
    """
    description = read_sealed(folder / DESCRIPTION)
    files, shapes = description.get("files"), description.get("tensors")
    if description.get("format") != "editor" or not isinstance(files, dict):
        raise EditorError(f"{folder / DESCRIPTION}: not the description of an editor; train the editor again")
    check_base(folder, description, fingerprint)
    tensors = read_tensors(folder / TENSORS, files.get(TENSORS))
    if {name: list(tensor.shape) for name, tensor in tensors.items()} != shapes:
        raise EditorError(f"{folder / TENSORS}: not the tensors {DESCRIPTION} describes; train the editor again")
    _check_finite(str(folder), tensors)
    return tensors, description


def install_editor(folder: Path, fingerprint: str) -> Path:
    """Copy an editor to where `find_editor` looks, replacing an older one; the folder it is in now."""
    load_editor(folder, fingerprint=fingerprint)
    place = _installed(fingerprint)
    with Staging(place, force=True) as staging:
        for name in (TENSORS, CARD, DESCRIPTION):
            if (folder / name).is_file():
                staging.copy(name, folder / name)
    return place


def find_editor(fingerprint: str) -> Path | None:
    """The folder of the editor for this base: the user's own, else one that comes with the package, else None."""
    places = (_installed(fingerprint), shipped(fingerprint))
    return next((folder for folder in places if (folder / DESCRIPTION).is_file()), None)


def shipped(fingerprint: str) -> Path:
    """Where an editor for this base lies that comes with the package, if there is one."""
    return Path(malmen_cli.__file__).parent / "editors" / fingerprint


def _installed(fingerprint: str) -> Path:
    if not _FINGERPRINT.fullmatch(fingerprint):
        raise EditorError(f"{fingerprint!r} is not a fingerprint of a base (64 hexadecimal digits)")
    return cache_home() / "editors" / fingerprint


def _check_finite(place: str, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NumericsError(f"{place}: the editor's {name} is not finite; train it again with a smaller step")
