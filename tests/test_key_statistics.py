"""Key statistics: built once for a base, a module and a text, and built again where what is kept is not whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import malmen_cli.key_statistics as key_statistics
from malmen_cli.artifact.manifest import sealed
from malmen_cli.artifact.statistics import load_statistics, save_statistics, statistics_folder
from malmen_cli.base.locate import cache_home
from malmen_cli.base.model import Base, load_base
from malmen_cli.base.prompts import Encoded
from malmen_cli.editing.moments import second_moments
from malmen_cli.editing.replay import Runner
from malmen_cli.exceptions import FactsError, OutputError
from malmen_cli.key_statistics import Text, gather_statistics, missing_statistics

NAMES = [f"transformer.h.{i}.mlp.c_proj" for i in (0, 1)]


@pytest.fixture(scope="module")
def base(tiny_gpt2: Path) -> Base:
    return load_base(str(tiny_gpt2), device="cpu")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The modules of every pass that was made."""
    passes: list[list[str]] = []

    def counted(runner, sequences, names, *others):
        passes.append(list(names))
        return second_moments(runner, sequences, names, *others)

    monkeypatch.setattr(key_statistics, "second_moments", counted)
    return passes


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The capital of France is Paris. Snow is white.\n" * 20, encoding="utf-8")
    return path


def folder_of(base: Base, text: Text, name: str = NAMES[0]) -> Path:
    return statistics_folder(base.fingerprint, name, text.source)


def test_statistics_of_a_file_are_the_direct_ones_and_kept(base: Base, text_file: Path, built: list) -> None:
    text = Text(base, str(text_file), 150)
    assert missing_statistics(base, NAMES, text) == NAMES
    found, new = gather_statistics(base, NAMES, text, batch_size=4)
    wanted = second_moments(Runner(base), [Encoded(ids, len(ids)) for ids in text.windows()], NAMES, 4)
    assert new == NAMES
    assert (found.tokens, found.source["name"], found.source["tokens"]) == (150, "text.txt", 150)
    written = sorted(path.name for path in folder_of(base, text).iterdir())
    assert written == ["statistics.json", "statistics.safetensors"]
    again, new = gather_statistics(base, NAMES, Text(base, str(text_file), 150), batch_size=9)
    assert new == []
    for name in NAMES:
        assert torch.equal(found.moments[name], again.moments[name])
        assert torch.equal(found.moments[name], wanted[name])
    assert built == [NAMES]
    assert missing_statistics(base, NAMES, text) == []


def test_only_what_is_missing_is_built(base: Base, text_file: Path, built: list) -> None:
    gather_statistics(base, NAMES[1:], Text(base, str(text_file), 90), batch_size=4)
    _, new = gather_statistics(base, NAMES, Text(base, str(text_file), 90), batch_size=4)
    gather_statistics(base, NAMES, Text(base, str(text_file), 90), batch_size=4, again=True)
    assert new == NAMES[:1]
    assert built == [NAMES[1:], NAMES[:1], NAMES]


def test_another_text_base_or_type_has_statistics_of_its_own(
    base: Base, tiny_gpt2: Path, tiny_model_factory, tmp_path: Path, text_file: Path
) -> None:
    text = Text(base, str(text_file), 90)
    gather_statistics(base, NAMES, text, batch_size=4)
    other = tmp_path / "other" / "text.txt"  # of the same name
    other.parent.mkdir()
    other.write_text("Snow is white.\n" * 90, encoding="utf-8")
    half = load_base(str(tiny_gpt2), device="cpu", dtype="bfloat16")
    third = load_base(str(tiny_model_factory("gpt2", seed=1)), device="cpu")
    assert missing_statistics(base, NAMES, text) == []
    for place, name, tokens in ((base, str(other), 90), (base, str(text_file), 91), (base, None, 90)):
        assert missing_statistics(place, NAMES, Text(place, name, tokens)) == NAMES
    for place in (half, third):
        assert missing_statistics(place, NAMES, Text(place, str(text_file), 90)) == NAMES


@pytest.mark.parametrize("damage", ["tensors", "cut", "description", "missing", "other module", "not finite"])
def test_what_is_damaged_is_built_again(base: Base, text_file: Path, damage: str) -> None:
    text = Text(base, str(text_file), 60)
    wanted, _ = gather_statistics(base, NAMES, text, batch_size=4)
    folder = folder_of(base, text)
    tensors, description = folder / "statistics.safetensors", folder / "statistics.json"
    if damage == "tensors":
        data = bytearray(tensors.read_bytes())
        data[-5] ^= 1
        tensors.write_bytes(data)
    elif damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:100])
    elif damage == "description":
        description.write_text(description.read_text().replace('"tokens": 60', '"tokens": 61'))
    elif damage == "missing":
        tensors.unlink()
    elif damage == "other module":
        said = json.loads(description.read_text())
        description.write_bytes(sealed(said | {"module": NAMES[1]}))
    else:
        save_statistics(base.fingerprint, NAMES[0], text.source, torch.full((64, 64), torch.nan), 60)
    assert load_statistics(base.fingerprint, NAMES[0], text.source, 64) is None
    found, new = gather_statistics(base, NAMES, text, batch_size=4)
    assert new == NAMES[:1]
    assert torch.equal(found.moments[NAMES[0]], wanted.moments[NAMES[0]])
    assert load_statistics(base.fingerprint, NAMES[0], text.source, 64) is not None


def test_a_cache_that_cannot_be_written_costs_time_alone(base: Base, text_file: Path) -> None:
    notes: list[str] = []
    (cache_home()).mkdir(parents=True, exist_ok=True)
    (cache_home() / "statistics").write_text("in the way")
    text = Text(base, str(text_file), 60)
    found, new = gather_statistics(base, NAMES, text, batch_size=4, note=notes.append)
    assert new == NAMES
    assert set(found.moments) == set(NAMES)
    assert "could not be kept" in notes[-1]
    with pytest.raises(OutputError):
        gather_statistics(base, NAMES, text, batch_size=4, must_keep=True)


def test_a_text_of_nothing_is_refused(base: Base, tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.write_text(" \n\n", encoding="utf-8")
    with pytest.raises(FactsError, match=r"empty\.txt: holds no text"):
        Text(base, str(path), 60)
