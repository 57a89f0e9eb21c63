"""A `.gguf` file turned, once, into a folder of safetensors that everything else can work on."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from malmen_cli.artifact import disk
from malmen_cli.artifact.atomic import write_file
from malmen_cli.base.cache import cache_home, cached_digest
from malmen_cli.base.gguf_header import check_gguf
from malmen_cli.base.weights import read_index
from malmen_cli.exceptions import CheckpointError, OutputError

PARAMETER_BYTES = 2  # in bfloat16


def converted(gguf: Path, *, note: Callable[[str], None] | None = None) -> Path:
    """The folder with the checkpoint of `gguf` in bfloat16, made on first use. Raises CheckpointError.

    It lies under `cache_home()/bases` and is named after the file's stem and sha256, so a changed file is
    another folder. Processes that want the same one wait for each other.
    """
    digest = cached_digest([gguf], lambda: _sha256(gguf))
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", gguf.stem).lstrip(".") or "model"
    target = cache_home() / "bases" / f"{stem}-{digest[:12]}"
    if target.is_dir():
        return target
    try:
        with _alone(target):
            if not target.is_dir():
                if note is not None:
                    note(f"converting {gguf.name} to safetensors, once, about 30 s for 135M parameters")
                _convert(gguf, target)
    except OutputError as error:
        raise CheckpointError(f"{error}; it is MALMEN_HOME that names the folder") from None
    except OSError as error:
        raise CheckpointError(
            f"{target}: cannot be written: {error.strerror or error}; set MALMEN_HOME to a folder with room"
        ) from None
    return target


def _sha256(gguf: Path) -> str:
    try:
        with gguf.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{gguf}: cannot be read: {error.strerror or error}") from None


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Hold the lock of this conversion; what a killed one left is removed."""
    from filelock import FileLock  # torch and huggingface_hub bring it

    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f".malmen-{target.name}.lock"):
        for leftover in target.parent.glob(f".malmen-{target.name}-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield


def _convert(gguf: Path, target: Path) -> None:
    disk.check_free(target, PARAMETER_BYTES * check_gguf(gguf))
    work = Path(tempfile.mkdtemp(prefix=f".malmen-{target.name}-", dir=target.parent))
    try:
        source, built = work / "source", work / "built"
        source.mkdir()
        # alone in its folder: a config or an adapter lying beside the file must not change what is read
        os.symlink(gguf.resolve(), source / "model.gguf")
        _load_and_save(gguf, source, built)
        _clear_quantization(built / "config.json")
        read_index(built)
        for path in (*built.rglob("*"), built):
            disk.sync_at(path)
        disk.rename(built, target)
        disk.sync_at(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _load_and_save(gguf: Path, source: Path, built: Path) -> None:
    """Read `source/model.gguf` with transformers and write the folder `built`; `gguf` is for messages."""
    from safetensors import SafetensorError

    try:
        with _quiet():
            model, tokenizer, absent = _load(source)
    except MemoryError:
        raise
    except ImportError:
        raise CheckpointError(f"{gguf}: reading it takes two more packages; run: pip install gguf accelerate") from None
    except Exception as error:  # gguf, tokenizers and transformers raise anything at all on a file they cannot read
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(f"{gguf}: transformers cannot read it: {reason}") from error
    if absent:
        raise CheckpointError(f"{gguf}: {len(absent)} tensors are missing, the first {absent[0]}; fetch it again")
    # plain bfloat16 from here on: a checkpoint that still says GGUF is not loaded, or not saved
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    try:
        with _quiet():
            model.save_pretrained(built)
            tokenizer.save_pretrained(built)
    except SafetensorError as error:  # how a full disk is reported
        raise OSError(str(error)) from None


def _load(source: Path) -> tuple[Any, Any, list[str]]:
    """The model in bfloat16, the tokenizer, and the names of the tensors the file lacks."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": "model.gguf", "local_files_only": True}
    packing = {}
    if hasattr(transformers, "GgufConfig"):  # releases with it leave the blocks packed where they have a kernel
        packing["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model, report = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, output_loading_info=True, **packing, **options
    )
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    return model, tokenizer, sorted(str(key) for key in report["missing_keys"])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the loaders' bars and advice off stderr: they cannot be told apart from ours, nor acted upon."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)


def _clear_quantization(config: Path) -> None:
    settings = json.loads(config.read_text(encoding="utf-8"))
    if settings.pop("quantization_config", None) is not None:
        write_file(config, (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode())
