"""T18-T21 through the commands themselves: a stranger's checkpoint, editor or delta is one line and exit 4."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from malmen_cli.cli.errors import main

Spoil = Callable[[Path], None]


def change_config(**values: Any) -> Spoil:
    def spoil(base: Path) -> None:
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        (base / "config.json").write_text(json.dumps(config | values), encoding="utf-8")

    return spoil


def put(name: str, data: bytes, *, size: int | None = None) -> Spoil:
    """`data` in the file `name`; size: made so long without taking any room."""

    def spoil(base: Path) -> None:
        (base / name).write_bytes(data)
        if size is not None:
            os.truncate(base / name, size)

    return spoil


def indexed(weight_map: dict[str, str]) -> Spoil:
    def spoil(base: Path) -> None:
        (base / "model.safetensors").rename(base.parent / "outside.safetensors")
        (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")

    return spoil


def pickled(base: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


UNSOUND = "not a sound safetensors file"
EXABYTE = json.dumps({"w": {"dtype": "F32", "shape": [2**58], "data_offsets": [0, 0]}}).encode()

# What was done to a sound checkpoint, and what the line says.
FOLDERS: dict[str, tuple[Spoil, str]] = {
    "index out": (indexed({"w": "../outside.safetensors"}), "may name only files beside it"),
    "index absolute": (indexed({"w": "/etc/passwd"}), "may name only files beside it"),
    "index of pickles": (indexed({"w": "w.bin"}), "not safetensors"),
    "index nested": (put("model.safetensors", b"[" * 10_000), UNSOUND),
    "pickle": (pickled, "is a pickle"),
    "header of an exabyte": (put("model.safetensors", struct.pack("<Q", 2**60) + b"{}"), UNSOUND),
    "shape of an exabyte": (put("model.safetensors", struct.pack("<Q", len(EXABYTE)) + EXABYTE), UNSOUND),
    "config of a gigabyte": (put("config.json", b"{", size=1 << 30), "more than the"),
    "tokenizer of a terabyte": (put("tokenizer.json", b"{", size=1 << 40), "more than the"),
    "config nested": (put("config.json", b'{"a":' * 100_000), "not a model configuration"),
    "a billion layers": (change_config(n_layer=10**9), "cannot hold"),
    "a vocabulary of 2^60": (change_config(vocab_size=2**60), "which no checkpoint has"),
    "a context of 2^60": (change_config(n_positions=2**60), "which no checkpoint has"),
    "another's manifest": (put("malmen.json", b'{"files": {}, "seal": "0"}'), "damaged or edited by hand"),
}
# Refused by the loader, which diff does not need.
LOADED: dict[str, tuple[Spoil, str]] = {
    "no attention heads": (change_config(n_head=0), "transformers cannot load it"),
    "tokenizer of nothing": (put("tokenizer.json", b"{}"), "transformers cannot load it"),
    "tokenizer nested": (put("tokenizer.json", b"[" * 100_000), "transformers cannot load it"),
    "tokenizer settings nested": (put("tokenizer_config.json", b'{"a":' * 100_000), "transformers cannot load it"),
    "an unknown kind": (change_config(model_type="no-such-model"), "transformers cannot load it"),
    "width of one": (change_config(n_embd=1), "transformers cannot load it"),
    "code of its own": (change_config(auto_map={"AutoConfig": "x.C"}, model_type="own"), "transformers cannot load it"),
}
COMMANDS = ("apply", "train-editor", "eval", "stats", "diff")


@pytest.fixture
def spoilt(tiny_gpt2: Path, tmp_path: Path) -> Callable[[Spoil], Path]:
    """A copy of a sound checkpoint, spoilt."""

    def make(spoil: Spoil) -> Path:
        base = Path(shutil.copytree(tiny_gpt2, tmp_path / "base"))
        spoil(base)
        return base

    return make


def argv(command: str, base: Path, facts: Path, out: Path) -> list[str]:
    return {
        "apply": ["apply", str(base), str(facts), "-o", str(out)],
        "train-editor": ["train-editor", str(base), str(facts), "-o", str(out)],
        "eval": ["eval", str(base), str(facts), "--per-fact", str(out)],
        "stats": ["stats", str(base)],
        "diff": ["diff", str(base), str(base)],
    }[command]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", FOLDERS)
def test_a_hostile_folder(
    name: str, command: str, spoilt: Any, facts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is loaded, in every command."""
    spoil, said = FOLDERS[name]
    refused(argv(command, spoilt(spoil), facts_file, tmp_path / "out"), said, tmp_path, capsys)


@pytest.mark.parametrize("name", LOADED)
def test_a_hostile_folder_that_only_the_loader_sees_through(
    name: str, spoilt: Any, facts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, said = LOADED[name]
    refused(argv("apply", spoilt(spoil), facts_file, tmp_path / "out"), said, tmp_path, capsys)


def refused(argv: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*argv, "-q"]) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("malmen: error: ")
    assert said in line
    assert len(line) < 1000
    assert not (folder / "out").exists()


@pytest.mark.parametrize("settings", [{"rank": 2**40}, {"blocks": 10**9}, {"rank": 5}, {"network": "identity"}])
def test_an_editor_that_asks_for_more_than_it_brings(
    settings: dict[str, Any], tiny_gpt2: Path, facts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sealed rightly, as a stranger can: its network is not even built."""
    from dataclasses import asdict

    from malmen_cli.artifact.editors import save_editor
    from malmen_cli.base.model import load_base
    from malmen_cli.editing.editor import Editor
    from malmen_cli.editing.settings import MalmenSettings

    base = load_base(str(tiny_gpt2), device="cpu")
    own = MalmenSettings(last_blocks=1, rank=4)
    said = {"base": {"fingerprint": base.fingerprint}, "method": "malmen", "settings": asdict(own) | settings}
    save_editor(tmp_path / "editor", Editor.fresh(base.model, own).state(), said, force=False)
    given = [*argv("apply", tiny_gpt2, facts_file, tmp_path / "out"), "--editor", str(tmp_path / "editor")]
    refused(given, "the editor does not fit its settings", tmp_path, capsys)


def test_a_gguf_file_that_claims_an_exabyte(
    facts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60))
    refused(argv("apply", tmp_path / "m.gguf", facts_file, tmp_path / "out"), "more than its", tmp_path, capsys)
