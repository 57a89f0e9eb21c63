"""`malmen eval` as a user types it: streams, exit codes, which base is taken, and that only one model is held."""

from __future__ import annotations

import gc
import json
import shutil
import sys
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from running import code, document_of, invoke
from typer.testing import Result

import malmen_cli.cli.eval as eval_module
from malmen_cli.cli.eval import evaluate

document = partial(document_of, "eval", codes=(0, 1))
MODULE = "transformer.h.1.mlp.c_proj"
Malmen = Callable[..., Result]


@pytest.fixture
def malmen(facts_file: Path) -> Malmen:
    """`malmen(MODEL, ...)` runs `malmen eval MODEL facts.jsonl ...`."""

    def run(model: Path | str, *options: object, facts: Path | str = facts_file, stdin: str | None = None) -> Result:
        return invoke(evaluate, model, facts, *options, stdin=stdin)

    return run


def manifest(folder: Path, **content: object) -> None:
    from malmen_cli.artifact.manifest import sealed

    (folder / "malmen.json").write_bytes(sealed(content))


@pytest.fixture
def edited(tiny_model_factory: Callable[..., Path], tmp_path: Path) -> Path:
    """Another model with the same tokenizer, standing for an edited one; free to be written into."""
    return Path(shutil.copytree(tiny_model_factory("gpt2", seed=1), tmp_path / "edited"))


@pytest.fixture
def delta(tiny_gpt2: Path, tmp_path: Path) -> Path:
    """A large random shift of one module, with `base.name` = the folder of tiny_gpt2."""
    from malmen_cli.artifact.delta import write_delta
    from malmen_cli.base.weights import fingerprint
    from malmen_cli.editing.shift import IN_OUT, ModuleShift, Shift

    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(64, 2, generator=generator), torch.randn(2, 32, generator=generator)
    shift = Shift({MODULE: ModuleShift(IN_OUT, left=left, right=right)}, row_facts=("au-capital", "hamlet"))
    base = {"name": str(tiny_gpt2), "revision": None, "fingerprint": fingerprint(tiny_gpt2)}
    write_delta(tmp_path / "delta", shift, {"base": base}, card="", force=False)
    return tmp_path / "delta"


# ---------------------------------------------------------------- figures and streams


def test_eval_base_base(malmen: Malmen, tiny_gpt2: Path) -> None:
    """T33: LS is exactly 1.0; the gold LS of a random model is not."""
    found = document(malmen(tiny_gpt2, "--base", tiny_gpt2, "--json"))
    for row in ("before", "after"):
        assert found[row]["ls"]["teacher_forced"] == found[row]["ls"]["greedy"] == 1.0
        assert found[row]["ls"]["gold"]["teacher_forced"] < 1.0
    assert found["before"] == found["after"]
    assert found["notes"] == []


def test_a_copy_of_the_base_is_asked_anew_and_agrees(malmen: Malmen, tiny_gpt2: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_gpt2, tmp_path / "copy")
    found = document(malmen(copy, "--base", tiny_gpt2, "--json"))
    assert found["after"]["ls"]["teacher_forced"] == found["after"]["ls"]["greedy"] == 1.0
    assert found["before"] == found["after"]


def test_an_edited_model_beside_its_base(malmen: Malmen, tiny_gpt2: Path, edited: Path) -> None:
    found = document(malmen(edited, "--base", tiny_gpt2, "--json"))
    assert (found["model"], found["base"], found["facts"]) == (str(edited), str(tiny_gpt2), 4)
    assert found["after"]["ls"]["greedy"] < 1.0
    assert found["before"]["ls"]["greedy"] == 1.0
    assert set(found["after"]) == {"es", "gs", "ls", "ps", "counterfact", "score"}


def test_stdout_is_empty_without_json(malmen: Malmen, tiny_gpt2: Path) -> None:
    result = malmen(tiny_gpt2, "--base", tiny_gpt2)
    assert code(result) == 0
    assert result.stdout == ""
    assert "teacher_forced" in result.stderr
    assert "asking the base" in result.stderr
    assert "\x1b" not in result.stderr


def test_quiet_is_silent(malmen: Malmen, tiny_gpt2: Path) -> None:
    result = malmen(tiny_gpt2, "-q")
    assert (code(result), result.stdout, result.stderr) == (0, "", "")


def test_facts_from_standard_input(malmen: Malmen, tiny_gpt2: Path) -> None:
    line = '{"prompt": "Snow is", "target": "white"}\n'
    found = document(malmen(tiny_gpt2, "--json", "-q", facts="-", stdin=line))
    assert (found["facts"], found["after"]["gs"]["greedy"]) == (1, None)
    assert "no fact has rephrases: the score leaves GS out" in found["notes"]


def test_limit_takes_the_first_facts(malmen: Malmen, tiny_gpt2: Path, tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    assert document(malmen(tiny_gpt2, "--limit", 2, "--json", "--per-fact", file))["facts"] == 2
    assert {json.loads(line)["id"] for line in file.read_text().splitlines()} == {"au-capital", "apple-ceo"}


def test_batch_size_and_repetition_change_nothing(malmen: Malmen, tiny_gpt2: Path, edited: Path) -> None:
    one, eight = (document(malmen(edited, "--base", tiny_gpt2, "--json", "--batch-size", size)) for size in (1, 8))
    for row in ("before", "after"):
        for part in ("es", "gs", "ls", "ps", "score"):
            assert one[row][part] == eight[row][part]


def test_no_greedy_leaves_nulls(malmen: Malmen, tiny_gpt2: Path) -> None:
    found = document(malmen(tiny_gpt2, "--no-greedy", "--json"))
    assert found["after"]["es"]["greedy"] is None
    assert found["after"]["ls"] == {
        "teacher_forced": 1.0,
        "greedy": None,
        "gold": {"teacher_forced": 0.0, "greedy": None},
    }
    assert any("greedy was not run" in note for note in found["notes"])


def test_dry_run_says_and_stops(malmen: Malmen, tiny_gpt2: Path, edited: Path, tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    result = malmen(edited, "--base", tiny_gpt2, "--dry-run", "--per-fact", file)
    assert (code(result), result.stdout, file.exists()) == (0, "", False)
    assert result.stderr == f"would score {edited} against {tiny_gpt2} on 4 facts\n"


def test_dry_run_has_a_document(malmen: Malmen, tiny_gpt2: Path, edited: Path, delta: Path, tmp_path: Path) -> None:
    """`questions` is what --per-fact would have lines for."""
    file = tmp_path / "answers.jsonl"
    document(malmen(edited, "--base", tiny_gpt2, "--json", "--no-greedy", "--per-fact", file))
    for model in (edited, delta):
        assert document(malmen(model, "--base", tiny_gpt2, "--dry-run", "--json")) == {
            "schema": 1,
            "dry_run": True,
            "model": str(model),
            "base": str(tiny_gpt2),
            "facts": 4,
            "questions": len(file.read_text().splitlines()),
        }


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model may be loaded."""
    import malmen_cli.base.model as model_module

    monkeypatch.setattr(model_module, "load_base", None)


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize("options", [[], ["--dry-run"]])
@pytest.mark.parametrize("what", ["model", "base", "adapter", "delta"])
def test_what_cannot_be_scored_is_refused_before_anything_is_asked(
    malmen: Malmen, tiny_gpt2: Path, edited: Path, delta: Path, tmp_path: Path, options: list[str], what: str
) -> None:
    """A missing MODEL or --base, an adapter folder, a delta of another base."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    model, base, said = {
        "model": (tmp_path / "nowhere", tiny_gpt2, "no such file"),
        "base": (edited, tmp_path / "nowhere", "no such file"),
        "adapter": (tmp_path / "adapter", tiny_gpt2, "this is an adapter"),
        "delta": (delta, edited, "another base"),
    }[what]
    result = malmen(model, "--base", base, *options)
    assert (code(result), result.stdout) == (4, "")
    assert said in str(result.exception)


# ---------------------------------------------------------------- which base


def test_without_a_base_the_model_stands_beside_itself(malmen: Malmen, tiny_gpt2: Path) -> None:
    result = malmen(tiny_gpt2, "--json")
    assert document(result)["base"] == str(tiny_gpt2)
    assert "no --base: the model is compared with itself" in document(result)["notes"][0]
    assert "compared with itself" in result.stderr


def test_a_merged_folder_finds_its_base(malmen: Malmen, tiny_gpt2: Path, edited: Path) -> None:
    from malmen_cli.base.weights import fingerprint

    manifest(
        edited, format="merged", base={"name": str(tiny_gpt2), "revision": None, "fingerprint": fingerprint(tiny_gpt2)}
    )
    found = document(malmen(edited, "--json"))
    assert found["base"] == str(tiny_gpt2)
    assert found["after"]["ls"]["greedy"] < 1.0
    assert found["notes"] == []


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ({"name": "/nowhere/at/all", "fingerprint": "0" * 64}, "its base /nowhere/at/all cannot be found"),
        ({"name": "BASE", "fingerprint": "0" * 64}, "is not the base it was made from"),
        ({"fingerprint": "0" * 64}, "names no base"),
    ],
)
def test_a_merged_folder_whose_base_is_gone_says_so(
    malmen: Malmen, tiny_gpt2: Path, edited: Path, base: dict[str, str], said: str
) -> None:
    named = {key: str(tiny_gpt2) if value == "BASE" else value for key, value in base.items()}
    manifest(edited, format="merged", base=named)
    found = document(malmen(edited, "--json"))
    assert found["base"] == str(edited)
    assert said in found["notes"][-1]
    assert found["after"]["ls"]["greedy"] == 1.0


@pytest.mark.parametrize("named", [True, False])
def test_a_delta_is_put_on_its_base(malmen: Malmen, tiny_gpt2: Path, delta: Path, named: bool) -> None:
    found = document(malmen(delta, *(["--base", tiny_gpt2] if named else []), "--json"))
    assert (found["model"], found["base"]) == (str(delta), str(tiny_gpt2))
    assert found["before"]["ls"]["greedy"] == 1.0
    assert found["after"]["ls"]["greedy"] < 1.0


def test_a_delta_scores_as_the_merged_model(malmen: Malmen, tiny_gpt2: Path, delta: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from malmen_cli.artifact.delta import read_delta

    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    shift, _ = read_delta(delta, fingerprint=None)
    with torch.no_grad():
        model.get_submodule(MODULE).weight += shift.modules[MODULE].for_weight()
    model.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(tiny_gpt2).save_pretrained(tmp_path / "merged")
    one = document(malmen(delta, "--base", tiny_gpt2, "--json"))
    other = document(malmen(tmp_path / "merged", "--base", tiny_gpt2, "--json"))
    assert (one["before"], one["after"], one["ci95"]) == (other["before"], other["after"], other["ci95"])


def test_a_delta_of_another_base_is_refused(malmen: Malmen, edited: Path, delta: Path) -> None:
    result = malmen(delta, "--base", edited)
    assert code(result) == 4
    assert "another base" in str(result.exception)


def test_a_delta_that_names_no_base_needs_one(malmen: Malmen, delta: Path) -> None:
    content = json.loads((delta / "malmen.json").read_text())
    del content["base"], content["seal"]
    manifest(delta, **content)
    result = malmen(delta)
    assert code(result) == 4
    assert "--base" in str(result.exception)


@pytest.mark.parametrize(
    ("model", "base", "expected"),
    [
        ("owner/model", None, ("main", "main")),
        ("owner/model", "owner/base", ("main", None)),
        ("FOLDER", "owner/base", (None, "main")),
        ("DELTA", "owner/base", (None, "main")),
        ("DELTA", None, (None, "main")),
    ],
)
def test_a_revision_goes_to_the_hub_id(
    tiny_gpt2: Path, delta: Path, model: str, base: str | None, expected: tuple[str | None, str | None]
) -> None:
    from malmen_cli.evaluation import pair_of

    pair = pair_of({"FOLDER": str(tiny_gpt2), "DELTA": str(delta)}.get(model, model), base, "main")
    assert (pair.model_revision, pair.base_revision) == expected


def test_never_two_models_in_memory(
    malmen: Malmen, tiny_gpt2: Path, edited: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the edited model is loaded, the base's is gone."""
    import malmen_cli.base.model as model_module

    held: list[weakref.ref[Any]] = []
    alive: list[int] = []
    load = model_module.load_base

    def watched(*arguments: Any, **options: Any) -> Any:
        gc.collect()
        alive.append(sum(one() is not None for one in held))
        base = load(*arguments, **options)
        held.append(weakref.ref(base.model))
        return base

    monkeypatch.setattr(model_module, "load_base", watched)
    assert code(malmen(edited, "--base", tiny_gpt2)) == 0
    assert alive == [0, 0]


# ---------------------------------------------------------------- gates


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--min-ls", 1.0], 0),
        (["--min-es", 0.0], 0),
        (["--min-es", 0.99], 1),
        (["--min-gs", 0.99], 1),
        (["--min-ps", 0.99], 1),
        (["--min-score", 0.99], 1),
        (["--min-ls", 1.0, "--gate-protocol", "greedy"], 0),
        (["--min-ls", 1.0, "--gate-protocol", "teacher_forced", "--no-greedy"], 0),
    ],
)
def test_gates(malmen: Malmen, tiny_gpt2: Path, options: list[object], expected: int) -> None:
    assert code(malmen(tiny_gpt2, *options)) == expected


def test_failed_gates_are_named_on_stderr_even_when_quiet(malmen: Malmen, tiny_gpt2: Path) -> None:
    result = malmen(tiny_gpt2, "-q", "--json", "--min-es", 0.9, "--min-ls", 0.5, "--min-score", 0.8)
    assert code(result) == 1
    lines = result.stderr.splitlines()
    assert [line.split(":")[:2] for line in lines] == [["malmen", " gate not met"]] * 2
    assert "es (both)" in lines[0]
    assert "score" in lines[1]
    assert [(gate["name"], gate["passed"]) for gate in document(result)["gates"]] == [
        ("es", False),
        ("ls", True),
        ("score", False),
    ]


def test_a_failed_gate_still_leaves_the_answers(malmen: Malmen, tiny_gpt2: Path, tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    assert code(malmen(tiny_gpt2, "--min-es", 0.9, "--per-fact", file)) == 1
    assert len(file.read_text().splitlines()) == 13


# ---------------------------------------------------------------- per fact


def test_per_fact_is_one_json_line_a_question(malmen: Malmen, tiny_gpt2: Path, edited: Path, tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    found = document(malmen(edited, "--base", tiny_gpt2, "--per-fact", file, "--json"))
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    edits = [row for row in rows if row["kind"] == "edit"]
    assert [row["id"] for row in edits] == ["au-capital", "apple-ceo", "hamlet", "brazil"]
    assert sum(row["teacher_forced"] for row in edits) / 4 == pytest.approx(found["after"]["es"]["teacher_forced"])
    assert sum(row["base_teacher_forced"] for row in edits) / 4 == pytest.approx(
        found["before"]["es"]["teacher_forced"]
    )
    assert [path.name for path in tmp_path.glob(".malmen-*")] == []


def test_an_old_file_needs_force(malmen: Malmen, tiny_gpt2: Path, tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text("mine")
    assert code(malmen(tiny_gpt2, "--per-fact", file)) == 6
    assert file.read_text() == "mine"
    assert code(malmen(tiny_gpt2, "--per-fact", file, "--force")) == 0
    assert json.loads(file.read_text().splitlines()[0])["kind"] == "edit"


def test_a_file_that_appears_while_the_model_is_asked_is_not_replaced(
    malmen: Malmen, tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, score = tmp_path / "answers.jsonl", eval_module._score
    monkeypatch.setattr(eval_module, "_score", lambda *given: (score(*given), file.write_text("mine"))[0])
    assert code(malmen(tiny_gpt2, "--per-fact", file)) == 6
    assert file.read_text() == "mine"
    assert code(malmen(tiny_gpt2, "--per-fact", file, "--force")) == 0
    assert json.loads(file.read_text().splitlines()[0])["kind"] == "edit"


@pytest.mark.parametrize("where", [".", "missing/answers.jsonl"])
def test_a_file_that_cannot_be_is_refused_before_the_work(malmen: Malmen, tmp_path: Path, where: str) -> None:
    result = malmen("/nowhere/at/all", "--per-fact", tmp_path / where)
    assert code(result) == 6


# ---------------------------------------------------------------- plot


@pytest.mark.parametrize(("name", "magic"), [("scores.png", b"\x89PNG\r\n\x1a\n"), ("scores.svg", b"<?xml")])
def test_a_plot_is_a_picture(
    malmen: Malmen, tiny_gpt2: Path, edited: Path, tmp_path: Path, name: str, magic: bytes
) -> None:
    file = tmp_path / name
    found = document(malmen(edited, "--base", tiny_gpt2, "--plot", file, "--json"))
    assert found["facts"] == 4
    assert file.read_bytes().startswith(magic)
    assert file.stat().st_size > 10_000  # bars and text
    assert list(tmp_path.glob(".malmen-*")) == []


def test_a_failed_gate_still_leaves_the_plot(malmen: Malmen, tiny_gpt2: Path, tmp_path: Path) -> None:
    options = ["--min-es", 0.9, "--no-greedy", "--gate-protocol", "teacher_forced", "--plot", tmp_path / "s.pdf"]
    assert code(malmen(tiny_gpt2, *options)) == 1
    assert (tmp_path / "s.pdf").read_bytes().startswith(b"%PDF-")


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize(
    ("name", "said"), [("scores.jpg", ".png, .svg or .pdf"), ("missing/scores.png", "--plot"), ("old.png", "--force")]
)
@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_a_plot_that_cannot_be_is_refused_before_the_work(
    malmen: Malmen, tiny_gpt2: Path, tmp_path: Path, name: str, said: str, options: list[str]
) -> None:
    (tmp_path / "old.png").write_bytes(b"mine")
    answers = tmp_path / "answers.jsonl"
    result = malmen(tiny_gpt2, "--plot", tmp_path / name, "--per-fact", answers, *options)
    assert (code(result), result.stdout) == (6, "")
    assert said in str(result.exception)
    assert (tmp_path / "old.png").read_bytes() == b"mine"
    assert not answers.exists()
    assert name == "old.png" or not (tmp_path / name).exists()


@pytest.mark.usefixtures("unasked")
def test_a_plot_without_matplotlib_says_what_to_install(
    malmen: Malmen, tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    result = malmen(tiny_gpt2, "--plot", tmp_path / "scores.png")
    assert (code(result), result.stdout) == (6, "")
    assert "pip install 'malmen-cli[plot]'" in str(result.exception)
    assert not (tmp_path / "scores.png").exists()


def test_no_plot_needs_no_matplotlib(malmen: Malmen, tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert code(malmen(tiny_gpt2)) == 0


def test_an_old_plot_is_replaced_by_force(malmen: Malmen, tiny_gpt2: Path, tmp_path: Path) -> None:
    (tmp_path / "old.png").write_bytes(b"mine")
    assert code(malmen(tiny_gpt2, "--plot", tmp_path / "old.png", "--force")) == 0
    assert (tmp_path / "old.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--min-es", 1.5], 2),
        (["--min-es", "high"], 2),
        (["--gate-protocol", "accuracy"], 2),
        (["--limit", 0], 2),
        (["--batch-size", 0], 2),
        (["--no-greedy", "--min-es", 0.5], 2),
        (["--no-greedy", "--min-score", 0.5], 2),
        (["--no-greedy", "--min-es", 0.5, "--gate-protocol", "greedy"], 2),
        (["--base", "/nowhere/at/all"], 4),
    ],
)
def test_usage_and_missing_checkpoints(malmen: Malmen, tiny_gpt2: Path, options: list[object], expected: int) -> None:
    result = malmen(tiny_gpt2, *options)
    assert code(result) == expected
    assert result.stdout == ""


def test_broken_facts_are_exit_3_before_any_model(malmen: Malmen, tmp_path: Path) -> None:
    file = tmp_path / "broken.jsonl"
    file.write_text('{"prompt": "Snow is", "target": ""}\n')
    assert code(malmen("/nowhere/at/all", facts=file)) == 3


def test_a_damaged_manifest_is_exit_4(malmen: Malmen, edited: Path) -> None:
    (edited / "malmen.json").write_text("{}")
    assert code(malmen(edited)) == 4


def test_weights_that_are_not_finite_are_exit_5(malmen: Malmen, tiny_gpt2: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(tiny_gpt2).save_pretrained(tmp_path / "broken")
    result = malmen(tmp_path / "broken", "--base", tiny_gpt2)
    assert code(result) == 5
    assert "not finite" in str(result.exception)


def test_out_of_memory_at_one_prompt_is_exit_7(
    malmen: Malmen, tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import GPT2LMHeadModel

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(GPT2LMHeadModel, "forward", full)
    assert code(malmen(tiny_gpt2)) == 7
