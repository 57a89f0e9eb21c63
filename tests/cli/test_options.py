"""Options that several commands share: sizes of memory."""

from __future__ import annotations

import pytest

from malmen_cli.cli import options
from malmen_cli.cli.errors import main


@pytest.mark.parametrize(
    ("text", "size"), [("64MB", 64 << 20), ("2gb", 2 << 30), ("1.5 GB", 3 << 29), ("0KB", 0), ("10kb", 10240)]
)
def test_a_size_is_bytes(text: str, size: int) -> None:
    assert options._size(text) == size


@pytest.mark.parametrize("text", ["", "64", "MB", "-1GB", "1TBs", "nanGB", "infGB", "1e999GB", "2 G B"])
def test_what_is_no_size_is_a_usage_error(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["apply", "base", "facts.jsonl", "-o", "out", f"--max-memory={text}"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "is not a size; write it as 512MB or 2GB" in said.err
    assert said.err.count("\n") == 1
