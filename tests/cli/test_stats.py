"""`malmen stats`: what it builds, where apply finds it, and what it says."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import valid

from malmen_cli.cli.errors import main

MODULES = [f"transformer.h.{block}.mlp.c_proj" for block in (1, 2)]
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def base(tiny_model_factory: Callable[..., Path]) -> Path:
    return tiny_model_factory("gpt2", layers=4)


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text("method: memit\nsettings: {blocks: [1, 2], stats_tokens: 200}\n", encoding="utf-8")
    return path


@pytest.fixture
def run(base: Path, spec: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(*options)`: the document of `malmen stats BASE --spec ... --json`."""

    def go(*options: object) -> dict[str, Any]:
        assert main(["stats", str(base), "--spec", str(spec), "--json", *map(str, options)]) == 0
        return valid("stats", capsys.readouterr().out)

    return go


def test_it_builds_what_is_missing_and_keeps_it(run: Run, base: Path) -> None:
    first, second, third = run(), run(), run("--force")
    assert [list(found["modules"]) for found in (first, second, third)] == [MODULES] * 3
    built = [{module["built"] for module in found["modules"].values()} for found in (first, second, third)]
    assert built == [{True}, {False}, {True}]
    assert first["text"] == {"name": "sampled", "tokens": 200, "dtype": "float32"}
    assert (first["base"]["name"], first["method"]) == (str(base), "memit")
    for module in first["modules"].values():
        folder = Path(module["folder"])
        assert folder.is_relative_to(os.environ["MALMEN_HOME"])
        assert sorted(path.name for path in folder.iterdir()) == ["statistics.json", "statistics.safetensors"]


def test_apply_finds_them(
    run: Run, base: Path, spec: Path, tmp_path: Path, facts_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, named = tmp_path / "text.txt", tmp_path / "named.jsonl"
    text.write_text("The capital of France is Paris.\n" * 40, encoding="utf-8")
    named.write_text(facts_file.read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8")
    run("--stats-from", text)
    given = ["apply", str(base), str(named), "-o", str(tmp_path / "out"), "--spec", str(spec), "--score", "0"]
    assert main([*given, "--stats-from", str(text)]) == 0
    assert "key statistics" not in capsys.readouterr().err
    assert main([*given, "--force"]) == 0
    assert "key statistics of 2 modules over 200 tokens of sampled" in capsys.readouterr().err


def test_dry_run_builds_nothing(run: Run) -> None:
    found = run("--dry-run")
    assert found["dry_run"] is True
    assert {module["built"] for module in found["modules"].values()} == {True}
    assert not (Path(os.environ["MALMEN_HOME"]) / "statistics").exists()


def test_progress_counts_tokens_and_prose_is_on_stderr(
    base: Path, spec: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stats", str(base), "--spec", str(spec)]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "key statistics, tokens: 200/200" in err
    assert "2 of 2 modules built" in err
    assert main(["stats", str(base), "--spec", str(spec), "-q"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--method", "malmen"], 3, "malmen needs no statistics; memit, rome and alphaedit do"),
        (["--method", "memitt"], 3, "did you mean 'memit'?"),
        (["--method", "rome"], 3, "rome changes one matrix, but 2 are named"),
        (["--stats-from", "nowhere.txt"], 3, "nowhere.txt: no such file"),
    ],
)
def test_what_is_refused(
    base: Path, tmp_path: Path, options: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("settings: {blocks: [1, 2]}\n", encoding="utf-8")
    method = [] if "--method" in options else ["--method", "memit"]
    given = [] if options[1] in ("malmen", "memitt") else ["--spec", str(path)]
    assert main(["stats", str(base), *given, *method, *options]) == code
    assert said in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_exit_6(run: Run, base: Path, spec: Path) -> None:
    home = Path(os.environ["MALMEN_HOME"])
    home.mkdir(parents=True, exist_ok=True)
    (home / "statistics").write_text("in the way")
    assert main(["stats", str(base), "--spec", str(spec)]) == 6
