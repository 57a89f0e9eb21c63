"""The table exception -> message, exit code, for every subcommand (T28), and what no message may hold (T34)."""

from __future__ import annotations

import copy
import errno
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from malmen_cli.cli import app as app_module
from malmen_cli.cli import facts as facts_module
from malmen_cli.cli.errors import exit_code, main, report
from malmen_cli.exceptions import (
    CheckpointError,
    EditorError,
    FactsError,
    MalmenError,
    MemoryLimitError,
    NumericsError,
    OutputError,
    Problem,
    SpecError,
)

COMMANDS = {
    "apply": ["apply", "base", "facts.jsonl", "-o", "out"],
    "train-editor": ["train-editor", "base", "facts.jsonl"],
    "eval": ["eval", "model", "facts.jsonl"],
    "diff": ["diff", "a", "b"],
    "stats": ["stats", "base"],
    "check": ["facts", "check", "facts.jsonl"],
    "convert": ["facts", "convert", "facts.jsonl"],
}


class OutOfMemoryError(RuntimeError):
    """Named as torch names its own."""


TRACEBACK_HINT = "run again with MALMEN_TRACEBACK=1 to see where"
RAISED: list[tuple[BaseException, int, str]] = [
    (typer.Exit(1), 1, ""),
    (typer.BadParameter("must be odd"), 2, "malmen: error: Invalid value: must be odd\n"),
    (FactsError([Problem("f", 3, "target", "empty", "say it")]), 3, "malmen: error: f:3:target: empty (say it)\n"),
    (SpecError("spec.yaml: unknown setting"), 3, "malmen: error: spec.yaml: unknown setting\n"),
    (CheckpointError("b: not there"), 4, "malmen: error: b: not there\n"),
    (EditorError("e: another base"), 4, "malmen: error: e: another base\n"),
    (NumericsError("h.0: NaN"), 5, "malmen: error: h.0: NaN\n"),
    (OutputError("out: exists"), 6, "malmen: error: out: exists\n"),
    (OSError(errno.ENOSPC, "No space left on device"), 6, "malmen: error: [Errno 28] No space left on device\n"),
    (MemoryLimitError("1.2 GB needed"), 7, "malmen: error: 1.2 GB needed\n"),
    (OutOfMemoryError("CUDA"), 7, "malmen: error: out of memory: try a smaller --batch-size, or --device cpu\n"),
    (ZeroDivisionError("by 0"), 70, f"malmen: internal error: ZeroDivisionError: by 0 ({TRACEBACK_HINT})\n"),
    (KeyboardInterrupt(), 130, "malmen: interrupted\n"),
]  # fmt: skip


def _registered(name: str) -> Any:
    commands = [*app_module.app.registered_commands, *facts_module.app.registered_commands]
    return next(command for command in commands if command.name == name)


def _raising(body: Callable[..., None], error: BaseException) -> Callable[..., None]:
    @functools.wraps(body)
    def raiser(*args: object, **kwargs: object) -> None:
        raise copy.copy(error) if isinstance(error, typer.BadParameter) else error  # typer writes its context into it

    return raiser


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("error", "code", "said"), RAISED, ids=[type(error).__name__ for error, _, _ in RAISED])
def test_every_exception_has_one_code_and_one_line_in_every_subcommand(
    command: str,
    error: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    registered = _registered(command)
    monkeypatch.setattr(registered, "callback", _raising(registered.callback, error))
    assert main(COMMANDS[command]) == code
    out, err = capsys.readouterr()
    if code == 2:
        said = said.replace("\n", f" (see malmen {'facts ' * (COMMANDS[command][0] == 'facts')}{command} --help)\n")
    assert (out, err) == ("", said)


@pytest.mark.parametrize("command", COMMANDS)
def test_success_is_zero(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    registered = _registered(command)
    monkeypatch.setattr(registered, "callback", functools.wraps(registered.callback)(lambda *args, **kwargs: None))
    assert main(COMMANDS[command]) == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"), 7),
        (RuntimeError("CUDA error: out of memory"), 7),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 7),
        (MemoryError(), 7),
        (RuntimeError("shape mismatch"), 70),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 6),
        (OSError(errno.EACCES, "Permission denied"), 70),
        (type("Narrower", (EditorError,), {})("x"), 4),
        (MalmenError("x"), 70),
        (RecursionError("deep"), 70),
    ],
    ids=str,
)
def test_exit_code(error: BaseException, code: int) -> None:
    assert exit_code(error) == code


def test_torch_s_own_out_of_memory_error() -> None:
    import torch

    assert exit_code(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")) == 7


def test_many_problems_are_a_line_each_then_the_count(capsys: pytest.CaptureFixture[str]) -> None:
    problems = [Problem("f.yaml", line, "target", "empty") for line in range(1, 21)]
    assert report(FactsError(problems, total=25)) == 3
    lines = capsys.readouterr().err.splitlines()
    assert lines[:20] == [f"f.yaml:{line}:target: empty" for line in range(1, 21)]
    assert lines[20:] == ["... and 5 more", "malmen: error: 25 problems, nothing was written"]


def test_a_message_of_many_lines_becomes_one(capsys: pytest.CaptureFixture[str]) -> None:
    report(CheckpointError("b: broken\n  because\tof this"))
    assert capsys.readouterr().err == "malmen: error: b: broken because of this\n"


def test_an_error_without_a_message_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    report(OutputError())
    assert capsys.readouterr().err == "malmen: error: OutputError\n"


@pytest.mark.parametrize(("value", "shown"), [("1", True), ("0", False), ("", False)])
def test_the_traceback_is_for_those_who_ask(
    value: str, shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MALMEN_TRACEBACK", value)
    with pytest.raises(ZeroDivisionError) as raised:
        raise ZeroDivisionError("by zero")
    assert report(raised.value) == 70
    assert ("Traceback (most recent call last)" in capsys.readouterr().err) is shown


def test_no_token_in_a_message_or_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    token, secret = "hf_" + "a1B2" * 8, "of-another-form-entirely"
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setenv("MALMEN_TRACEBACK", "1")
    for error in (RuntimeError(f"401 for {token}"), CheckpointError(f"denied: {secret}")):
        try:
            raise error
        except (RuntimeError, CheckpointError) as raised:
            report(raised)
    said = capsys.readouterr().err
    assert "401 for hf_***" in said
    assert "denied: ***" in said
    assert token not in said
    assert secret not in said


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["--nonsense"], "No such option: --nonsense"),
        (["aply"], "No such command 'aply'"),
        (["apply"], "Missing argument 'BASE'"),
        (["apply", "base", "facts.jsonl"], "Missing option"),
        (["apply", "base", "facts.jsonl", "-o", "out", "--batch-size", "0"], "--batch-size"),
        (["apply", "base", "facts.jsonl", "-o", "out", "--dtype", "int4"], "--dtype"),
        (["apply", "base", "facts.jsonl", "-o", "out", "--format", "zip"], "--format"),
        (["train-editor", "base"], "Missing argument 'FACTS...'"),
        (["train-editor", "base", "facts.jsonl", "--steps", "many"], "--steps"),
        (["eval", "model"], "Missing argument 'FACTS'"),
        (["eval", "model", "facts.jsonl", "--min-es", "95"], "--min-es"),
        (["diff", "a"], "Missing argument"),
        (["diff", "a", "b", "--seed"], "--seed"),
        (["facts", "check"], "Missing argument 'FACTS'"),
        (["facts", "convert", "x", "--json"], "--json"),
        (["facts", "nonsense"], "No such command 'nonsense'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors_are_one_line_and_exit_2(argv: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("malmen: error: ")
    assert hint in err
    assert "--help)" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("argv", [[], ["facts"]], ids=["malmen", "malmen facts"])
def test_without_a_command_the_help_is_shown_and_it_is_a_usage_error(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert "Usage: malmen" in out
    assert err == ""


@pytest.mark.parametrize("argv", [["apply", "-o", "out"], ["train-editor"], ["eval"]], ids=lambda argv: argv[0])
def test_a_missing_facts_file_is_exit_3(
    argv: list[str],
    tiny_gpt2: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    command, *rest = argv
    assert main([command, str(tiny_gpt2), "absent.jsonl", *rest]) == 3
    assert "malmen: error: absent.jsonl: no such file" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("argv", [["apply", "-o", "out"], ["train-editor"], ["eval"]], ids=lambda argv: argv[0])
def test_a_missing_checkpoint_is_exit_4(
    argv: list[str], facts_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(facts_file.parent)
    command, *rest = argv
    assert main([command, "./absent", "facts.jsonl", *rest]) == 4
    assert "absent" in capsys.readouterr().err
    assert os.listdir() == ["facts.jsonl"]


def test_diff_of_a_missing_checkpoint_is_exit_4(tiny_gpt2: Path, tmp_path: Path) -> None:
    assert main(["diff", str(tiny_gpt2), str(tmp_path / "absent")]) == 4


def test_an_output_in_the_way_is_exit_6_and_untouched(tiny_gpt2: Path, facts_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    assert main(["apply", str(tiny_gpt2), str(facts_file), "-o", str(out), "--force"]) == 6
    assert out.read_text() == "mine"


def test_a_reader_that_goes_away_ends_the_program_without_a_word(facts_file: Path) -> None:
    """As `malmen facts convert facts.jsonl | true` does, with more lines than a pipe holds."""
    line = facts_file.read_text().splitlines()[3]
    lines = (line.replace('"brazil"', f'"b{n}"').replace("Brazil", f"Brazil {n}") for n in range(2000))
    facts_file.write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "malmen_cli", "facts", "convert", str(facts_file)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    with child.stderr as stderr:
        assert stderr.read() == b""
    assert child.wait(timeout=60) == 141
