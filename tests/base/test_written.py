"""A merged checkpoint is read only as it was written: every file by its sha256 in malmen.json (T20)."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from malmen_cli.base.locate import locate
from malmen_cli.base.sealed import sealed
from malmen_cli.base.written import check_written
from malmen_cli.cli.errors import main
from malmen_cli.exceptions import CheckpointError, EditorError

FLIPS = 60  # of single bits in each of three files


@pytest.fixture(scope="module")
def merged(tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `malmen apply` leaves."""
    folder = tmp_path_factory.mktemp("merged")
    (folder / "facts.jsonl").write_text('{"prompt": "The capital of France is", "target": "Rome"}\n')
    (folder / "spec.yaml").write_text("method: finetune\nsettings: {epochs: 1}\n")
    given = ["apply", str(tiny_gpt2), str(folder / "facts.jsonl"), "--spec", str(folder / "spec.yaml")]
    assert main([*given, "-o", str(folder / "out"), "--score", "0", "-q"]) == 0
    return folder / "out"


@pytest.fixture
def copy(merged: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(merged, tmp_path / "copy"))


def flip(file: Path, place: int, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1 << bit
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "generation_config.json"])
def test_a_flipped_bit_is_noticed(copy: Path, name: str) -> None:
    chance = random.Random(name)
    whole = (copy / name).read_bytes()
    for _ in range(FLIPS):
        flip(copy / name, chance.randrange(len(whole)), chance.randrange(8))
        with pytest.raises(CheckpointError, match=rf"{name}: damaged: its sha256 is not the one in malmen.json"):
            check_written(copy)
        (copy / name).write_bytes(whole)
    check_written(copy)


def test_a_flipped_bit_of_the_manifest_is_noticed(copy: Path) -> None:
    chance = random.Random(0)
    whole = (copy / "malmen.json").read_bytes()
    for _ in range(FLIPS):
        flip(copy / "malmen.json", chance.randrange(len(whole)), chance.randrange(8))
        with pytest.raises(EditorError, match="damaged"):
            check_written(copy)
        (copy / "malmen.json").write_bytes(whole)


def test_every_way_to_the_checkpoint_checks_it(copy: Path) -> None:
    flip(copy / "tokenizer.json", 100, 0)
    with pytest.raises(CheckpointError, match="damaged"):
        locate(str(copy))


def test_a_card_may_be_written_in_and_files_may_come_and_go(copy: Path) -> None:
    (copy / "README.md").write_text("mine")
    (copy / "generation_config.json").unlink()
    (copy / "notes.txt").write_text("mine")
    check_written(copy)


def test_without_the_manifest_it_is_anybody_s_checkpoint(copy: Path) -> None:
    flip(copy / "generation_config.json", 0, 0)
    (copy / "malmen.json").unlink()
    check_written(copy)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "pipe"])
def test_a_manifest_names_nothing_that_is_opened_outside(tmp_path: Path, name: str) -> None:
    """Not even to hash it; nor anything that is no file."""
    import os

    (tmp_path / "secret").write_text("s")
    (tmp_path / "in").mkdir()
    os.mkfifo(tmp_path / "in" / "pipe")
    content: dict[str, Any] = {"format": "merged", "files": {name: "0" * 64}}
    (tmp_path / "in" / "malmen.json").write_bytes(sealed(content))
    check_written(tmp_path / "in")
