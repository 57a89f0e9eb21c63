"""T34: a token of this machine is in nothing that is printed, and in no file that is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from malmen_cli.cli.errors import main

SECRET = "hf_" + "QqWwEeRrTtYyUuIi" * 2


@pytest.mark.parametrize("name", ["merged", "delta", "adapter", "train-editor", "convert", "stats", "eval"])
def test_no_token_in_any_output(
    name: str, make_writer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor the home folder, which says who somebody is."""
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN"):
        monkeypatch.setenv(variable, SECRET)
    writer = make_writer(name)
    verbose = [] if name in ("convert", "stats", "eval") else ["-v"]
    assert main([*writer.argv, *verbose, *(["--json"] if name != "convert" else [])]) == 0
    said = capsys.readouterr()
    files = [file for output in writer.outputs for file in ([output] if output.is_file() else output.rglob("*"))]
    written = b"".join(file.read_bytes() for file in files if file.is_file())
    assert len(written) > 100
    assert SECRET not in said.out + said.err
    assert SECRET.encode() not in written
    assert os.environ["MALMEN_HOME"].encode() not in written
    if name != "convert":
        assert str(Path.home()).encode() + b"/" not in written
