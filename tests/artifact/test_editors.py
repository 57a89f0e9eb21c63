"""Editors on disk: saved, found again by their base, refused when anything is off."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import malmen_cli
from malmen_cli.artifact.delta import CARD
from malmen_cli.artifact.disk import file_sha256
from malmen_cli.artifact.editors import (
    DESCRIPTION,
    TENSORS,
    find_editor,
    install_editor,
    load_editor,
    save_editor,
    shipped,
)
from malmen_cli.artifact.manifest import read_sealed, sealed
from malmen_cli.base.locate import cache_home
from malmen_cli.editing.settings import MalmenSettings, from_mapping
from malmen_cli.exceptions import EditorError, NumericsError, OutputError

PACKAGE = Path(malmen_cli.__file__).parent
SHIPPED = sorted(path.parent for path in PACKAGE.glob("editors/*/editor.json"))
SHIPPED_BYTES = 20_000_000  # of one editor's folder: what a package of code can ask of everybody's disk
OURS, OTHER = "ab" * 32, "cd" * 32
WEIGHTS = {
    "net.0.w": torch.randn(3, 4),
    "lr": torch.tensor(0.5),
    "steps": torch.tensor([7]),
    "b": torch.ones(2).bfloat16(),
}
ABOUT: dict[str, Any] = {"base": {"name": "org/model", "fingerprint": OURS}, "rank": 4, "settings": {"x": [1, 2]}}


@pytest.fixture
def editor(tmp_path: Path) -> Path:
    save_editor(tmp_path / "editor", WEIGHTS, ABOUT, force=False)
    return tmp_path / "editor"


def test_comes_back_bitwise(editor: Path) -> None:
    assert sorted(os.listdir(editor)) == ["README.md", "editor.json", "editor.safetensors"]
    tensors, description = load_editor(editor, fingerprint=OURS)
    assert tensors.keys() == WEIGHTS.keys()
    for name, tensor in WEIGHTS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert {key: description[key] for key in ABOUT} == ABOUT
    assert description["files"][TENSORS]


def test_slices_are_saved_as_their_numbers(tmp_path: Path) -> None:
    """One of a single number, too, which counts as contiguous whatever its stride."""
    grid = torch.arange(12.0).reshape(3, 4)
    slices = {"one": grid[1:2, 2], "column": grid[:, 1], "turned": grid.T, "none": grid[:0], "number": grid[2, 3]}
    save_editor(tmp_path / "slices", slices, ABOUT, force=False)
    tensors, _ = load_editor(tmp_path / "slices")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in slices.items())


def test_another_base_is_refused(editor: Path) -> None:
    """T22."""
    with pytest.raises(EditorError, match="another base \\(org/model"):
        load_editor(editor, fingerprint=OTHER)
    with pytest.raises(EditorError, match="another base"):
        install_editor(editor, OTHER)
    assert find_editor(OTHER) is None


@pytest.mark.parametrize("name", [TENSORS, DESCRIPTION])
def test_cuts_and_bit_flips(editor: Path, name: str) -> None:
    """T20: every cut and 100 flips in each file."""
    whole = (editor / name).read_bytes()
    chance = random.Random(1)
    damaged = [whole[:size] for size in range(len(whole))]
    for _ in range(100):
        flipped = bytearray(whole)
        flipped[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        damaged.append(bytes(flipped))
    for data in damaged:
        (editor / name).write_bytes(data)
        with pytest.raises(EditorError):
            load_editor(editor)


@pytest.mark.parametrize(
    "change", [{"tensors": {}}, {"tensors": None}, {"files": []}, {"files": {}}, {"format": "delta"}]
)
def test_a_description_of_something_else(editor: Path, change: dict[str, Any]) -> None:
    (editor / DESCRIPTION).write_bytes(sealed(read_sealed(editor / DESCRIPTION) | change))
    with pytest.raises(EditorError):
        load_editor(editor)


def test_values_that_are_not_finite(tmp_path: Path, editor: Path) -> None:
    """T21: neither written nor, if somebody else wrote them, read."""
    bad = {"w": torch.tensor([1.0, float("nan")])}
    with pytest.raises(NumericsError, match="editor's w is not finite"):
        save_editor(tmp_path / "bad", bad, ABOUT, force=False)
    assert not (tmp_path / "bad").exists()
    from safetensors.torch import save_file

    save_file(bad, editor / TENSORS)
    change = {"files": {TENSORS: file_sha256(editor / TENSORS)}, "tensors": {"w": [2]}}
    (editor / DESCRIPTION).write_bytes(sealed(read_sealed(editor / DESCRIPTION) | change))
    with pytest.raises(NumericsError, match="editor's w is not finite"):
        load_editor(editor)


def test_installed_editors_are_found_by_fingerprint(editor: Path, tmp_path: Path) -> None:
    assert find_editor(OURS) is None
    place = install_editor(editor, OURS)
    assert place == cache_home() / "editors" / OURS
    assert find_editor(OURS) == place
    assert sorted(os.listdir(place)) == sorted(os.listdir(editor))
    assert all((place / name).read_bytes() == (editor / name).read_bytes() for name in os.listdir(editor))
    save_editor(tmp_path / "newer", {"w": torch.ones(1)}, ABOUT, force=False)
    install_editor(tmp_path / "newer", OURS)
    assert list(load_editor(place)[0]) == ["w"]


def test_an_editor_that_comes_with_the_package(editor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Used where the user has none of his own."""
    monkeypatch.setattr(malmen_cli, "__file__", str(tmp_path / "package" / "__init__.py"))
    place = tmp_path / "package" / "editors" / OURS
    save_editor(place, WEIGHTS, ABOUT, force=False)
    assert find_editor(OURS) == shipped(OURS) == place
    assert find_editor(OTHER) is None
    assert install_editor(editor, OURS) == find_editor(OURS) != place


def test_where_a_shipped_editor_lies() -> None:
    assert shipped(OURS) == PACKAGE / "editors" / OURS


def test_the_card_has_the_digest_of_the_tensors(editor: Path) -> None:
    digest = file_sha256(editor / TENSORS)
    assert read_sealed(editor / DESCRIPTION)["files"][TENSORS] == digest
    assert f"- sha256 of {TENSORS}: {digest}\n" in (editor / CARD).read_text(encoding="utf-8")


@pytest.fixture(params=SHIPPED or [None], ids=lambda folder: folder.name[:8] if folder else "none")
def shipped_editor(request: pytest.FixtureRequest) -> Path:
    if request.param is None:
        pytest.skip("no editor comes with this version of the package")
    folder: Path = request.param
    return folder


def test_a_shipped_editor_is_small_whole_and_says_what_it_is(shipped_editor: Path) -> None:
    """Everybody who installs the package downloads it, so that it must be worth its bytes and checkable."""
    fingerprint = shipped_editor.name
    assert find_editor(fingerprint) == shipped(fingerprint) == shipped_editor
    assert sorted(os.listdir(shipped_editor)) == ["README.md", "editor.json", "editor.safetensors"]
    assert sum(path.stat().st_size for path in shipped_editor.iterdir()) <= SHIPPED_BYTES
    _, description = load_editor(shipped_editor, fingerprint=fingerprint)  # reads the seal, too
    from_mapping(MalmenSettings, description["settings"], "settings")
    card = (shipped_editor / CARD).read_text(encoding="utf-8")
    told = [
        file_sha256(shipped_editor / TENSORS),
        fingerprint,
        *(description[part]["sha256"] for part in ("facts", "validation_facts")),
        *(source for part in ("facts", "validation_facts") for source in description[part]["sources"]),
    ]
    assert [item for item in told if item not in card] == []
    assert description["facts"]["sources"]
    assert not any("/" in item or "\\" in item for item in told)


@pytest.mark.parametrize("fingerprint", ["", "../x", "ab", "AB" * 32, "ab" * 32 + "/.."])
def test_a_fingerprint_is_64_hex_digits(fingerprint: str) -> None:
    with pytest.raises(EditorError, match="not a fingerprint"):
        find_editor(fingerprint)


def test_saved_over_an_older_one_only_with_force(editor: Path) -> None:
    with pytest.raises(OutputError, match="--force"):
        save_editor(editor, {"w": torch.ones(1)}, ABOUT, force=False)
    assert load_editor(editor)[0].keys() == WEIGHTS.keys()
    save_editor(editor, {"w": torch.ones(1)}, ABOUT, force=True)
    assert list(load_editor(editor)[0]) == ["w"]


def test_a_folder_that_holds_no_editor(tmp_path: Path) -> None:
    with pytest.raises(EditorError, match="not found"):
        load_editor(tmp_path)


def test_the_editor_of_schema_1_still_loads() -> None:
    """T17: written once and kept."""
    tensors, description = load_editor(Path(__file__).parent / "data" / "editor-schema-1", fingerprint=OURS)
    assert torch.equal(tensors["w"], torch.tensor([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]]))
    assert tensors["steps"].tolist() == [7]
    assert description["base"]["name"] == "example/base"
