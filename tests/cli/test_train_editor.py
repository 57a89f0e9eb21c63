"""`malmen train-editor` as a user types it: what it leaves, how it goes on after a kill, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from running import code, contents, document_of, invoke
from typer.testing import Result

import malmen_cli.cli.train_editor as train_module
from malmen_cli.base.weights import fingerprint
from malmen_cli.cli.console import Console, Progress
from malmen_cli.cli.train_editor import _Reporter
from malmen_cli.training.history import Progress as Step
from malmen_cli.training.validation import Validation

document = partial(document_of, "train_editor")
LISTING = ["README.md", "editor.json", "editor.safetensors"]
SPEC = """
settings: {last_blocks: 1, rank: 4, preserved_rank: 8}
training: {steps: 4, facts_per_step: [4, 8], meta_facts: 4, validate_every: 2, valid_facts: 4, warmup: 2,
  calibration_facts: 8, continuation: 2, valid_fraction: 0.2}
"""
PLACES = ("Australia", "France", "the land of snow", "Peru", "Japan and Sweden", "Brazil", "Italy", "Bill Gates")
ANSWERS = ("Rome", "Tim Cook", "one hundred degrees", "Paris", "no", "krona")
Malmen = Callable[..., Result]


def records(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "id": f"f{i}",
            "prompt": f"The capital of {PLACES[i % 8]} number {i} is",
            "target": ANSWERS[i % 6],
            "subject": f"{PLACES[i % 8]} {i}",
            "rephrases": [f"{PLACES[i % 8]} number {i} has the capital"],
            "locality": [{"prompt": f"The currency of {PLACES[(i + 1) % 8]} {i} is the"}],
        }
        for i in range(start, start + count)
    ]


def write(path: Path, items: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


@pytest.fixture
def train_file(tmp_path: Path) -> Path:
    return write(tmp_path / "train.jsonl", records(20))


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    (tmp_path / "spec.yaml").write_text(SPEC, encoding="utf-8")
    return tmp_path / "spec.yaml"


@pytest.fixture
def malmen(train_file: Path, spec: Path, tmp_path: Path) -> Malmen:
    """`malmen(BASE, ...)` runs `malmen train-editor BASE train.jsonl --spec spec.yaml -o tmp_path/editor ...`."""

    def run(
        base: Path | str, *options: object, facts: tuple[Path | str, ...] = (train_file,), out: bool = True
    ) -> Result:
        place = ["-o", str(tmp_path / "editor")] if out else []
        given = [str(base), *map(str, facts), "--spec", str(spec), "--batch-size", "8", *place, *map(str, options)]
        return invoke(train_module.train_editor, *given)

    return run


def home() -> Path:
    return Path(os.environ["MALMEN_HOME"])


def installed(base: Path) -> Path:
    return home() / "editors" / fingerprint(base)


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ctrl-C when `step` is reported."""
    report = _Reporter.__call__

    def interrupted(self: _Reporter, progress: Step) -> None:
        report(self, progress)
        if progress.step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(_Reporter, "__call__", interrupted)


# ---------------------------------------------------------------- end to end


def test_trains_installs_and_apply_finds_it(malmen: Malmen, tiny_gpt2: Path, tmp_path: Path) -> None:
    result = malmen(tiny_gpt2, "--json")
    found = document(result)
    out = tmp_path / "editor"
    assert [path.name for path in sorted(out.iterdir())] == LISTING
    assert contents(installed(tiny_gpt2)) == contents(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["editor", "spec.yaml", "train.jsonl"]
    assert found["output"] == str(out)
    assert [at["step"] for at in found["editor"]["scores"]["at"]] == [2, 4]
    assert found["editor"]["facts"]["count"] == 16
    assert found["editor"]["validation_facts"]["count"] == 4
    for part in ("facts", "validation_facts"):  # held out of the same file, whose folder is nobody's business
        assert found["editor"][part]["sources"] == ["train.jsonl"]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "- facts: 16 of train.jsonl, sha256 " in card
    assert str(tmp_path) not in card
    assert "step 2/4" in result.stderr
    assert "ES " in result.stderr
    assert "facts/s" in result.stderr
    assert re.search(r"  \d+ s left", result.stderr)
    assert "\x1b" not in result.stderr
    from malmen_cli.cli.apply import apply

    facts = write(tmp_path / "facts.jsonl", records(2, start=50))
    applied = invoke(apply, tiny_gpt2, facts, "-o", tmp_path / "out", "--json", "--score", 0)
    record = document_of("apply", applied)["manifest"]
    assert record["editor"]["sha256"] == contents(out)["editor.safetensors"]
    assert record["method"]["name"] == "malmen"


def test_stdout_is_empty_without_json_and_quiet_is_silent(malmen: Malmen, tiny_gpt2: Path) -> None:
    loud = malmen(tiny_gpt2)
    assert (code(loud), loud.stdout) == (0, "")
    quiet = malmen(tiny_gpt2, "-q", "--force")
    assert (code(quiet), quiet.stdout, quiet.stderr) == (0, "", "")


def test_no_install(malmen: Malmen, tiny_gpt2: Path, tmp_path: Path) -> None:
    result = malmen(tiny_gpt2, "--no-install")
    assert code(result) == 0
    assert [path.name for path in sorted((tmp_path / "editor").iterdir())] == LISTING
    assert not installed(tiny_gpt2).exists()
    assert "installed" not in result.stderr


def test_without_an_output_only_the_installed_copy_is_kept(malmen: Malmen, tiny_gpt2: Path) -> None:
    found = document(malmen(tiny_gpt2, "--json", out=False))
    assert found["output"] == str(installed(tiny_gpt2))
    assert [path.name for path in sorted(installed(tiny_gpt2).iterdir())] == LISTING
    assert list((home() / "trained").iterdir()) == []
    assert document(malmen(tiny_gpt2, "--json", out=False)) == found


def test_nowhere_to_put_it_is_usage(malmen: Malmen, tiny_gpt2: Path) -> None:
    assert code(malmen(tiny_gpt2, "--no-install", out=False)) == 2


@pytest.mark.parametrize("method", ["mend", "identity"])
def test_other_methods(malmen: Malmen, tiny_gpt2: Path, method: str) -> None:
    found = document(malmen(tiny_gpt2, "--method", method, "--json", "--steps", 2))
    assert found["editor"]["method"] == method
    assert found["editor"]["training"]["steps"] == 2


def test_validation_facts_of_one_s_own(malmen: Malmen, tiny_gpt2: Path, tmp_path: Path) -> None:
    from malmen_cli.facts.files import read_facts

    valid = write(tmp_path / "valid.jsonl", records(3, start=40))
    found = document(malmen(tiny_gpt2, "--valid", valid, "--json"))["editor"]
    assert (found["facts"]["count"], found["validation_facts"]["count"]) == (20, 3)
    assert found["validation_facts"]["sha256"] == read_facts(str(valid)).sha256
    assert (found["facts"]["sources"], found["validation_facts"]["sources"]) == (["train.jsonl"], ["valid.jsonl"])


def test_what_several_files_say_differently_is_left_out_with_a_warning(
    malmen: Malmen, tiny_gpt2: Path, tmp_path: Path, train_file: Path
) -> None:
    other = write(tmp_path / "b.jsonl", [records(1)[0] | {"target": "Madrid", "id": "x"}, *records(4, start=30)])
    result = malmen(tiny_gpt2, "--json", facts=(train_file, other))
    found = document(result)["editor"]
    assert found["facts"]["count"] == 24 - 5  # held out, of which four are asked
    (line,) = [line for line in result.stderr.splitlines() if "warning" in line]
    assert "1 facts left out" in line
    assert str(other) in line


def test_the_same_input_gives_the_same_bytes(malmen: Malmen, tiny_gpt2: Path, tmp_path: Path) -> None:
    assert code(malmen(tiny_gpt2)) == 0
    before = contents(tmp_path / "editor")
    assert code(malmen(tiny_gpt2, "--force")) == 0
    assert contents(tmp_path / "editor") == before


# ---------------------------------------------------------------- --dry-run


def test_dry_run(malmen: Malmen, tiny_gpt2: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in tmp_path.rglob("*"))
    result = malmen(tiny_gpt2, "--dry-run", "--json", "--facts-per-step", "3,9")
    found = document(result)
    assert found["modules"] == ["transformer.h.1.mlp.c_proj"]
    assert (found["facts"], found["training"]["facts_per_step"], found["training"]["steps"]) == (16, [3, 9], 4)
    width, roles = 64 + 32, 3
    block = width * 4 * 2 + width + 2 * roles * width  # down and up, bias, scale and shift
    assert found["parameters"] == 2 * block + roles + 2  # and log step, log lambda and log mu
    assert "would train" in result.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert not installed(tiny_gpt2).exists()


# ---------------------------------------------------------------- interrupted and resumed


def test_ctrl_c_is_exit_130_and_resume_ends_in_the_same_bytes(
    malmen: Malmen, tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, kept = tmp_path / "editor", tmp_path / "editor.training"
    assert code(malmen(tiny_gpt2)) == 0
    whole = contents(out)
    for path in out.iterdir():
        path.unlink()
    out.rmdir()
    with monkeypatch.context() as patched:
        interrupt(patched, 3)
        result = malmen(tiny_gpt2)
    assert code(result) == 130
    assert "go on with --resume" in result.stderr
    assert kept.is_dir()
    assert not out.exists()
    unasked = malmen(tiny_gpt2)
    assert code(unasked) == 6
    assert "--resume" in str(unasked.exception)
    resumed = malmen(tiny_gpt2, "--resume")
    assert code(resumed) == 0
    assert "going on after step 3" in resumed.stderr
    assert contents(out) == whole == contents(installed(tiny_gpt2))
    assert not kept.exists()


def test_an_unfinished_training_without_an_output_is_not_lost_either(
    malmen: Malmen, tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        interrupt(patched, 2)
        assert code(malmen(tiny_gpt2, out=False)) == 130
    assert code(malmen(tiny_gpt2, out=False)) == 6
    assert code(malmen(tiny_gpt2, "--resume", out=False)) == 0
    assert [path.name for path in sorted(installed(tiny_gpt2).iterdir())] == LISTING


@pytest.mark.parametrize("change", [["--steps", 5], ["--seed", 1], ["--facts-per-step", "4"], ["--batch-size", 4]])
def test_resuming_with_other_settings_is_exit_4(
    malmen: Malmen, tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: list[object]
) -> None:
    with monkeypatch.context() as patched:
        interrupt(patched, 1)
        assert code(malmen(tiny_gpt2)) == 130
    before = contents(tmp_path / "editor.training")
    result = malmen(tiny_gpt2, "--resume", *change)
    assert code(result) == 4
    assert "other facts, settings, seed or base" in str(result.exception)
    assert contents(tmp_path / "editor.training") == before
    assert code(malmen(tiny_gpt2, "--force", *change)) == 0


def test_resume_after_the_end_has_nothing_left_to_do(malmen: Malmen, tiny_gpt2: Path, tmp_path: Path) -> None:
    """A process may be killed when all is done but its exit: who repeats `--resume` until it succeeds gets there."""
    first = malmen(tiny_gpt2, "--json")
    assert code(first) == 0
    before = contents(tmp_path / "editor")
    again = malmen(tiny_gpt2, "--resume", "--json")
    assert code(again) == 0
    assert json.loads(again.stdout) == json.loads(first.stdout)
    assert "nothing left to do" in again.stderr
    asked = malmen(tiny_gpt2, "--resume", "--dry-run", "--json")
    assert code(asked) == 0
    assert json.loads(asked.stdout) == json.loads(first.stdout)
    assert "would train" not in asked.stderr
    assert contents(tmp_path / "editor") == before
    assert code(malmen(tiny_gpt2)) == 6  # unless it is asked for
    assert code(malmen(tiny_gpt2, "--resume", "--seed", "7")) == 6  # another training
    (tmp_path / "editor" / "editor.safetensors").write_bytes(b"cut")
    assert code(malmen(tiny_gpt2, "--resume")) == 6
    assert (tmp_path / "editor" / "editor.safetensors").read_bytes() == b"cut"


def test_resume_finds_the_installed_editor_of_a_training_that_is_finished(malmen: Malmen, tiny_gpt2: Path) -> None:
    assert code(malmen(tiny_gpt2, out=False)) == 0
    again = malmen(tiny_gpt2, "--resume", out=False)
    assert code(again) == 0
    assert "nothing left to do" in again.stderr
    other = malmen(tiny_gpt2, "--resume", "--seed", "7", out=False)
    assert code(other) == 0
    assert "nothing to resume" in other.stderr


def start(base: Path, folder: Path, name: str, *options: str) -> subprocess.Popen[bytes]:
    """`malmen train-editor` in a process of its own: 60 steps, to `folder/name`."""
    write(folder / "train.jsonl", records(20))
    (folder / "spec.yaml").write_text(SPEC, encoding="utf-8")
    settings = ["--spec", str(folder / "spec.yaml"), "--batch-size", "8", "--steps", "60", "--no-install"]
    command = [sys.executable, "-m", "malmen_cli", "train-editor", str(base), str(folder / "train.jsonl"), *settings]
    return subprocess.Popen(
        [*command, "-o", str(folder / name), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said


@pytest.fixture(scope="module")
def whole(tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The contents of an editor whose training nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    finish(start(tiny_gpt2, folder, "editor"))
    return contents(folder / "editor")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_after_the_first_save_and_resumed_is_unbroken(
    tiny_gpt2: Path, whole: dict[str, str], tmp_path: Path, how: signal.Signals
) -> None:
    """T11 from outside: SIGKILL leaves the last whole state, Ctrl-C one more."""
    process = start(tiny_gpt2, tmp_path, "editor")
    state = tmp_path / "editor.training" / "editor.json"
    deadline = time.monotonic() + 60
    while not state.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130), said
    assert not (tmp_path / "editor").exists()
    assert 2 <= json.loads(state.read_text())["step"] < 60
    finish(start(tiny_gpt2, tmp_path, "editor", "--resume"))
    assert contents(tmp_path / "editor") == whole
    assert not state.parent.exists()


# ---------------------------------------------------------------- what it refuses


@pytest.mark.parametrize("sizes", ["many", "4,x", "", "0", "4,0", "1,2,3", "-4", "4.5"])
def test_facts_per_step_that_makes_no_sense_is_usage(malmen: Malmen, tiny_gpt2: Path, sizes: str) -> None:
    assert code(malmen(tiny_gpt2, f"--facts-per-step={sizes}")) == 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--steps", 0], 2),
        (["--batch-size", 0], 2),
        (["--method", "mallmen"], 3),
        (["--valid", "nowhere.jsonl"], 3),
        (["--device", "warp"], 4),
    ],
)
def test_options_that_make_no_sense(
    malmen: Malmen, tiny_gpt2: Path, tmp_path: Path, options: list[object], expected: int
) -> None:
    result = malmen(tiny_gpt2, *options)
    assert (code(result), result.stdout) == (expected, "")
    assert not (tmp_path / "editor").exists()


def test_bad_training_settings_are_exit_3(malmen: Malmen, tiny_gpt2: Path, spec: Path) -> None:
    spec.write_text("training: {stesp: 4}\n", encoding="utf-8")
    result = malmen(tiny_gpt2)
    assert code(result) == 3
    assert "did you mean 'steps'" in str(result.exception)


def test_bad_facts_are_exit_3_before_any_model(malmen: Malmen, tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.jsonl", [*records(2), {"prompt": "x"}])
    assert code(malmen("/nowhere/at/all", facts=(bad,))) == 3
    assert code(malmen("/nowhere/at/all")) == 4


@pytest.mark.parametrize("subjects", [1, 4])
def test_one_subject_leaves_nothing_to_validate_on(
    malmen: Malmen, tiny_gpt2: Path, tmp_path: Path, subjects: int
) -> None:
    """Said before training, not at its first validation."""
    one = write(tmp_path / "one.jsonl", [item | {"subject": "Peru"} for item in records(subjects)])
    result = malmen(tiny_gpt2, facts=(one,))
    assert code(result) == 3
    assert "--valid" in str(result.exception)
    assert not (tmp_path / "editor.training").exists()


def test_outputs_that_may_not_be_are_exit_6(malmen: Malmen, tiny_gpt2: Path, tmp_path: Path) -> None:
    (tmp_path / "editor").mkdir()
    (tmp_path / "editor" / "mine").write_text("mine")
    assert code(malmen(tiny_gpt2)) == 6
    assert code(malmen(tiny_gpt2, "--force")) == 6
    assert contents(tmp_path / "editor") == {"mine": hashlib.sha256(b"mine").hexdigest()}


def test_weights_that_are_not_finite_are_exit_5(malmen: Malmen, tiny_gpt2: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(tiny_gpt2).save_pretrained(tmp_path / "broken")
    assert code(malmen(tmp_path / "broken")) == 5
    assert not (tmp_path / "editor").exists()


# ---------------------------------------------------------------- the report


class Bar(Progress):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.counts: list[tuple[int, int]] = []

    def update(self, text: str) -> None:
        self.said.append(text)

    def report(self, done: int, total: int) -> None:
        self.counts.append((done, total))


def test_the_time_left_is_that_of_steps(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Calibration takes minutes and is not repeated at every step; a resumed run starts at its own step."""
    now = [1000.0]
    monkeypatch.setattr(train_module.time, "monotonic", lambda: now[0])
    bar = Bar()
    reporter = _Reporter(Console(), bar, 110)
    now[0] = 1600.0  # what came before the first step
    for step in (50, 51):
        now[0] += 6.0
        validation = Validation(1, 1, 0.5, 0.5, 1, 1) if step == 51 else None
        reporter(Step(step, 0.5, 0.25, 30, 6.0, validation))
    assert bar.counts == [(50, 110), (51, 110)]
    assert bar.said == [
        "loss 0.500 moved 0.250  5 facts/s  6 min left",
        "loss 0.500 moved 0.250  5 facts/s  6 min left",
    ]
    assert capsys.readouterr().err == (
        "step 51/110  loss 0.500 moved 0.250  5 facts/s  6 min left  "
        "ES 1.00/1.00  GS 0.50/0.50  LS 1.00/1.00  score 0.750\n"
    )


@pytest.mark.parametrize(("seconds", "said"), [(0.4, "0 s"), (119.0, "119 s"), (120.0, "2 min"), (3600.0, "60 min")])
def test_a_short_time_is_told_in_seconds(seconds: float, said: str) -> None:
    assert train_module._duration(seconds) == said


def test_a_clock_that_stands_still_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module.time, "monotonic", lambda: 5.0)
    bar = Bar()
    _Reporter(Console(quiet=True), bar, 2)(Step(1, 0.5, 0.25, 30, 0.0))
    assert bar.counts == [(1, 2)]


def test_replacing_an_editor_of_another_method_is_said(malmen: Malmen, tiny_gpt2: Path) -> None:
    first = malmen(tiny_gpt2, out=False)
    assert code(first) == 0
    assert "warning" not in first.stderr
    again = malmen(tiny_gpt2, "--method", "mend", out=False)
    assert code(again) == 0
    assert "warning: this replaces the malmen editor" in again.stderr
