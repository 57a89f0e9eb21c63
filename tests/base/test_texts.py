"""Ordinary text as windows of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from malmen_cli.base.model import load_base
from malmen_cli.base.prompts import encode_prompt
from malmen_cli.base.texts import PIECE, WINDOW, read_texts, windows
from malmen_cli.exceptions import FactsError


@pytest.fixture(scope="module")
def tokenizer(tiny_gpt2: Path) -> Any:
    return load_base(str(tiny_gpt2), device="cpu").tokenizer


def test_a_file_is_read_in_pieces_of_whole_lines(tmp_path: Path) -> None:
    lines = [f"Line {i} is {'long ' * (i % 40)}\n" for i in range(300)]
    path = tmp_path / "text.txt"
    path.write_text("\ufeff" + "".join(lines), encoding="utf-8")
    pieces = list(read_texts(str(path)))
    assert "".join(pieces) == "".join(lines)
    assert len(pieces) > 2
    assert all(piece.endswith("\n") and len(piece) < PIECE + 250 for piece in pieces)


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_a_data_set_s_texts(tmp_path: Path, kind: str) -> None:
    import datasets

    made = datasets.Dataset.from_dict({"text": ["Snow is white.", "Rome", ""], "id": [1, 2, 3]})
    place = tmp_path / ("set" if kind == "folder" else "set.parquet")
    made.save_to_disk(place) if kind == "folder" else made.to_parquet(place)
    assert list(read_texts(str(place))) == ["Snow is white.", "Rome", ""]


def test_windows_are_the_first_tokens(tokenizer: Any) -> None:
    texts = ["Snow is white. " * 50, " ", "Paris", "never read" * 10]
    whole = encode_prompt(tokenizer, texts[0])
    found = windows(tokenizer, iter(texts), len(whole) + 2)
    assert [len(ids) for ids in found] == [WINDOW, len(whole) - WINDOW, 2]
    assert found[0] + found[1] == whole
    assert found[2] == encode_prompt(tokenizer, "Paris")[:2]
    assert {len(ids) for ids in windows(tokenizer, texts[:1], 100, room=20)} == {20}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        (b"caf\xe9", r"not UTF-8 \(save the file as UTF-8\)"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FactsError, match=f"text.txt: {said}"):
        list(read_texts(str(path)))


def test_a_data_set_without_texts_is_refused(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"sentence": ["a"]}).to_parquet(tmp_path / "set.parquet")
    with pytest.raises(FactsError, match=r"set.parquet:1:text: missing, or not a text \(name a data set with"):
        list(read_texts(str(tmp_path / "set.parquet")))
