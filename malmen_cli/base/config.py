"""A checkpoint's config.json and the small files beside it, judged before transformers builds anything by them.

A hostile config may ask for a billion layers, or be a gigabyte long. No honest one comes near these bounds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from malmen_cli.base.header import load_json, shown
from malmen_cli.exceptions import CheckpointError

MAX_CONFIG_BYTES = 16 * 1024**2
MAX_SIDE_BYTES = 64 * 1024**2  # of any other file of text that transformers reads
MAX_TOKENIZER_BYTES = 512 * 1024**2  # the largest published are about 35 MB
MAX_SIZE = 2**27  # of any width, vocabulary or context
# What transformers opens; whatever else lies in the folder (a corpus, a trainer's log) is nobody's business.
SIDE_FILES = (
    "*config.json", "tokenizer.*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "chat_template*", "*.jinja", "*.model", "*.tiktoken", "*.spm",
)  # fmt: skip
_LAYERS = re.compile(r"^(num_hidden_layers|num_layers|n_layers?|(num_)?(en|de)coder_layers|num_blocks|n_blocks|depth)$")
_SIZES = re.compile(r"size|dim$|heads?$|embd|position|inner|experts?$|width|ctx|groups?$")
_NO_SIZES = ("id2label", "label2id", "task_specific_params", "quantization_config")  # keys in it are anybody's words


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as plain data, once it and the text files beside it are known to be small enough.

    Raises CheckpointError.
    """
    config = folder / "config.json"
    for file in sorted({file for pattern in SIDE_FILES for file in folder.glob(pattern)}):
        _refuse_large(file)
    try:
        settings = load_json(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{config}: not a model configuration: {shown(error)}") from None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{config}: not a model configuration: it is no JSON object")
    return settings


def check_sizes(folder: Path, settings: dict[str, Any], tensors: int) -> None:
    """Raise CheckpointError for more layers than the checkpoint has tensors, and for sizes out of all proportion."""
    for key, value in _numbers(settings):
        most = tensors if _LAYERS.search(key) else MAX_SIZE if _SIZES.search(key) else None
        if most is not None and not -1 <= value <= most:
            why = f"which its {tensors} tensors cannot hold" if most == tensors else "which no checkpoint has"
            raise CheckpointError(
                f"{folder / 'config.json'}: {shown(key)} is {shown(value)}, {why}; do not use this checkpoint"
            )


def _numbers(settings: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Every whole number by its key, in nested objects too."""
    for key, value in settings.items():
        if isinstance(value, int) and not isinstance(value, bool):
            yield key, value
        elif isinstance(value, dict) and key not in _NO_SIZES:
            yield from _numbers(value)


def _refuse_large(file: Path) -> None:
    most = MAX_TOKENIZER_BYTES if file.name.startswith("tokenizer.") or file.suffix == ".model" else MAX_SIDE_BYTES
    most = MAX_CONFIG_BYTES if file.name == "config.json" else most
    try:
        size = file.stat().st_size
    except FileNotFoundError:  # a link to nowhere: what needs the file says so
        return
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from None
    if size > most and not file.name.endswith(".index.json"):  # an index has a bound of its own
        raise CheckpointError(f"{file}: {size:,} bytes, more than the {most:,} any checkpoint needs; not opened")
