"""The command tree, its help, and how little of it is imported (T30, T31)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

import pytest

import malmen_cli
from malmen_cli.cli.errors import main

HEAVY = ("torch", "transformers", "datasets", "numpy", "safetensors", "huggingface_hub", "tokenizers", "peft", "yaml")
COMMANDS = ("apply", "train-editor", "eval", "diff", "stats", "facts check", "facts convert")
IDLE_SECONDS = 0.3


def run(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "malmen_cli", *argv], capture_output=True, text=True, env=os.environ | environment
    )


def heavy_modules_after(code: str) -> list[str]:
    program = f"import sys\n{code}\nprint(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1].split()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr() == (f"malmen {malmen_cli.__version__}\n", "")


def test_python_dash_m_is_malmen() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"malmen {malmen_cli.__version__}\n", "")
    assert run("nonsense").returncode == 2


def test_help_lists_every_command_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for command in ("apply", "train-editor", "eval", "diff", "stats", "facts"):
        assert re.search(rf"^│ {command} +[A-Z]\w+", out, re.MULTILINE), command


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_s_help_has_examples_that_begin_with_it(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    out = capsys.readouterr().out
    examples = out.partition("Examples:")[2].partition("╭")[0]
    assert examples.count(f"malmen {command} ") >= 2


@pytest.mark.parametrize("command", COMMANDS)
def test_options_of_one_name_are_one_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """-q is --quiet everywhere, and every command has it."""
    assert main([*command.split(), "-h"]) == 0
    assert re.search(r"--quiet +-q ", capsys.readouterr().out)


def test_help_loads_nothing_heavy() -> None:
    assert heavy_modules_after("from malmen_cli.cli.errors import main\nmain(['--help'])") == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_s_help_loads_nothing_heavy(command: str) -> None:
    assert heavy_modules_after(f"from malmen_cli.cli.errors import main\nmain({[*command.split(), '--help']})") == []


@pytest.mark.parametrize("room", ["facts.fact", "facts.files", "exceptions"])
def test_facts_are_light(room: str) -> None:
    """A facts file is checked in the time a linter takes: no torch, transformers or datasets."""
    assert not set(heavy_modules_after(f"import malmen_cli.{room}")) - {"yaml"}


def test_checking_a_facts_file_loads_no_torch(facts_file: os.PathLike[str]) -> None:
    code = f"from malmen_cli.cli.errors import main\nassert main(['facts', 'check', {str(facts_file)!r}]) == 0"
    assert not set(heavy_modules_after(code)) & {"torch", "transformers", "datasets"}


def test_help_takes_no_longer_than_a_blink() -> None:
    """Against the interpreter's own start, so that a busy machine is no failure; the best of five."""

    def best(*command: str) -> float:
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            subprocess.run([sys.executable, *command], capture_output=True, check=True)
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    alone = best("-c", "pass")
    assert best("-m", "malmen_cli", "--help") < max(IDLE_SECONDS, 20 * alone)


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "GITHUB_ACTIONS"])
def test_help_into_a_file_has_no_escape_codes(variable: str) -> None:
    done = run("apply", "--help", **{variable: "1"})
    assert done.returncode == 0
    assert "\x1b" not in done.stdout


def test_completion_offers_commands_and_options() -> None:
    completing = {"_MALMEN_COMPLETE": "complete_bash", "COMP_WORDS": "malmen tr", "COMP_CWORD": "1"}
    code = "import sys\nfrom malmen_cli.cli.errors import main\nsys.exit(main([]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | completing)
    assert done.stdout.split() == ["train-editor"]


def test_libraries_are_quiet_and_the_user_s_own_setting_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "debug")
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    monkeypatch.delenv("DATASETS_VERBOSITY", raising=False)
    assert main(["--version"]) == 0
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "debug"
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"
    assert os.environ["DATASETS_VERBOSITY"] == "error"
