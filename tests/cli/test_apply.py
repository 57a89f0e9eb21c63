"""`malmen apply` as a user types it: what it leaves, what it says where, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from running import code, contents, document_of, invoke, schema
from typer.testing import Result

import malmen_cli.cli.show as show_module
import malmen_cli.scoring.report as report_module
from malmen_cli.cli import errors
from malmen_cli.cli.apply import apply
from malmen_cli.exceptions import FactsError

document = partial(document_of, "apply")
MODULES = [f"transformer.h.{i}.mlp.c_proj" for i in (0, 1)]
MERGED = ["README.md", "config.json", "generation_config.json", "malmen.json", "model.safetensors", "tokenizer.json"]
LISTINGS = {
    "merged": [*MERGED, "tokenizer_config.json"],
    "delta": ["README.md", "delta.safetensors", "malmen.json"],
    "adapter": ["README.md", "adapter_config.json", "adapter_model.safetensors", "malmen.json"],
}
SMALL = "settings: {last_blocks: 2, rank: 4, preserved_rank: 8, rounds: 1}\n"
Malmen = Callable[..., Result]


@pytest.fixture
def malmen(facts_file: Path, tmp_path: Path) -> Malmen:
    """`malmen(BASE, ...)` runs `malmen apply BASE facts.jsonl -o tmp_path/out ...`."""

    def run(
        base: Path | str, *options: object, facts: Path | str = facts_file, out: Path | str | None = None,
        stdin: str | None = None,
    ) -> Result:  # fmt: skip
        given = [str(base), str(facts), "-o", str(out or tmp_path / "out"), *map(str, options)]
        return invoke(apply, *given, stdin=stdin)

    return run


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL, encoding="utf-8")
    return path


@pytest.fixture
def thrice(tmp_path: Path) -> Path:
    """An untrained editor that goes over the facts three times."""
    path = tmp_path / "thrice.yaml"
    path.write_text("settings: {rounds: 3}\n", encoding="utf-8")
    return path


@pytest.fixture
def editor(tiny_gpt2: Path, tmp_path: Path) -> Callable[..., Path]:
    """`editor(method, step)`: an untrained editor for tiny_gpt2, saved as a trained one is."""
    import torch

    from malmen_cli.artifact.editors import save_editor
    from malmen_cli.base.model import load_base
    from malmen_cli.editing.editor import Editor
    from malmen_cli.editing.settings import MalmenSettings

    def build(method: str = "malmen") -> Path:
        base = load_base(str(tiny_gpt2), device="cpu")
        settings = MalmenSettings(last_blocks=2, rank=4, aggregation="sum" if method == "mend" else "ridge")
        made = Editor.fresh(base.model, settings)
        with torch.no_grad():
            made.groups[0].network.log_lr.fill_(-3.0)
        said = {"base": {"name": str(tiny_gpt2), "fingerprint": base.fingerprint}, "method": method}
        save_editor(tmp_path / f"{method}-editor", made.state(), said | {"settings": asdict(settings)}, force=True)
        return tmp_path / f"{method}-editor"

    return build


def install(folder: Path, base: Path) -> Path:
    from malmen_cli.artifact.editors import install_editor
    from malmen_cli.base.weights import fingerprint

    return install_editor(folder, fingerprint(base))


# ---------------------------------------------------------------- what it leaves


@pytest.mark.parametrize("format", list(LISTINGS))
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_formats(
    malmen: Malmen, tiny_model_factory: Callable[..., Path], tmp_path: Path, format: str, family: str, small: Path
) -> None:
    base = tiny_model_factory(family)
    before = contents(base)
    found = document(malmen(base, "--format", format, "--json", "--spec", small))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == LISTINGS[format]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["facts.jsonl", "out", "small.yaml"]
    written = json.loads((tmp_path / "out" / "malmen.json").read_text(encoding="utf-8"))
    written.pop("seal")
    assert found["manifest"] == written
    assert found["manifest"]["format"] == format
    assert found["output"] == str(tmp_path / "out")
    assert len(found["manifest"]["modules"]) == 2
    assert contents(base) == before


@pytest.mark.parametrize("share", ["none", "reflink", "hardlink"])
def test_what_a_merged_output_shares_with_its_base(
    malmen: Malmen, tiny_model_factory: Callable[..., Path], tmp_path: Path, share: str, small: Path
) -> None:
    base = tiny_model_factory("llama", layers=4, max_shard_size="20KB")
    found = document(malmen(base, "--share", share, "--json", "--spec", small, "--score", 0))
    shards = {path.name for path in base.glob("*.safetensors")}
    same = {name for name in shards if (tmp_path / "out" / name).samefile(base / name)}
    assert same == set(found["manifest"].get("linked", []))
    assert (len(same) > 1) == (share == "hardlink")
    assert len(same) < len(shards)  # some are edited


def test_a_dry_run_counts_no_room_for_what_would_be_linked(
    malmen: Malmen, tiny_model_factory: Callable[..., Path], small: Path
) -> None:
    base = tiny_model_factory("llama", layers=4, max_shard_size="20KB")
    given = (base, "--json", "--spec", small, "--score", 0)
    planned = [document(malmen(*given, "--dry-run", "--share", share))["disk_bytes"] for share in ("none", "hardlink")]
    linked = document(malmen(*given, "--share", "hardlink"))["manifest"]["linked"]
    assert planned[0] - planned[1] == sum((base / name).stat().st_size for name in linked) > 0


@pytest.mark.parametrize("format", ["delta", "adapter"])
def test_what_is_no_checkpoint_shares_nothing_with_one(malmen: Malmen, tiny_gpt2: Path, format: str) -> None:
    result = malmen(tiny_gpt2, "--format", format, "--share", "hardlink")
    assert code(result) == 2
    assert f"--share is for merged outputs: a {format}" in result.output


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an old name
def test_the_adapter_gives_the_merged_model_s_logits(
    malmen: Malmen, tiny_gpt2: Path, tmp_path: Path, small: Path
) -> None:
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM

    for format in ("merged", "adapter"):
        assert code(malmen(tiny_gpt2, "--format", format, "--spec", small, "--score", 0, out=tmp_path / format)) == 0
    ids = torch.tensor([[5, 17, 33, 2]])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_gpt2), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(adapted.eval()(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_fresh_process_without_malmen_says_what_apply_reported(
    malmen: Malmen, tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T16."""
    records: list[dict[str, Any]] = []
    show = show_module.answers
    monkeypatch.setattr(
        show_module,
        "answers",
        lambda console, report: (records.extend(report.per_fact()), show(console, report)),
    )
    assert code(malmen(tiny_gpt2)) == 0
    asked = [record for record in records if record["kind"] in ("edit", "rephrase", "locality")]
    assert any(record["edited"] == record["expected"] for record in asked)
    assert any(record["edited"] != record["base"] for record in asked)
    script = """
import json, sys
sys.modules["malmen_cli"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompts, budgets = sys.argv[1], *map(json.loads, sys.argv[2:])
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
for prompt, budget in zip(prompts, budgets):
    ids = tokenizer(prompt, return_tensors="pt")
    said = model.generate(**ids, max_new_tokens=budget, do_sample=False, pad_token_id=0)[0, ids["input_ids"].shape[1]:]
    print(json.dumps(tokenizer.decode(said, skip_special_tokens=True).split("\\n")[0].strip()))
"""
    prompts = [record["prompt"] for record in asked]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COV_")} | {"HF_HUB_OFFLINE": "1"}
    said = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out"), json.dumps(prompts), json.dumps([40] * len(prompts))],
        capture_output=True, text=True, check=True, env=environment,
    ).stdout.splitlines()  # fmt: skip
    for record, text in zip(asked, map(json.loads, said), strict=True):
        # apply stops five tokens behind the answer's length
        assert text == record["edited"] or (record["edited"] and text.startswith(record["edited"].rstrip("\ufffd"))), (
            record
        )


def test_the_same_input_gives_the_same_bytes(malmen: Malmen, tiny_gpt2: Path, tmp_path: Path, small: Path) -> None:
    for name in ("a", "b"):
        assert code(malmen(tiny_gpt2, "--spec", small, "--score", 0, out=tmp_path / name)) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_an_edit_sticks_and_the_scores_say_so(
    malmen: Malmen, tiny_model_factory: Callable[..., Path], tmp_path: Path
) -> None:
    """On a model with room for four facts: among 64 key dimensions of random weights, locality wins over them."""
    base, spec = tiny_model_factory("gpt2", width=64, mlp=512), tmp_path / "wide.yaml"
    spec.write_text("settings: {last_blocks: 2, rounds: 8}\n", encoding="utf-8")
    found = document(malmen(base, "--spec", spec, "--json"))
    jsonschema.Draft202012Validator(schema("eval")).validate(found["scores"])
    assert found["scores"]["before"]["es"]["greedy"] == 0.0
    assert found["scores"]["after"]["es"]["greedy"] == 1.0
    assert (found["scores"]["facts"], found["manifest"]["facts"]["count"]) == (4, 4)
    assert found["scores"]["base"] == str(base)
    assert found["scores"]["model"] == found["output"]
    assert found["seconds"] > 0


@pytest.mark.parametrize(("count", "scored"), [(0, None), (2, 2), (99, 4)])
def test_score_takes_the_first_facts(
    malmen: Malmen, tiny_gpt2: Path, small: Path, count: int, scored: int | None
) -> None:
    found = document(malmen(tiny_gpt2, "--score", count, "--json", "--spec", small))
    assert (found["scores"] and found["scores"]["facts"]) == scored


def test_what_rounding_lost_is_said(
    malmen: Malmen, tiny_model_factory: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, small: Path
) -> None:
    """A bf16 base whose weights a small shift hardly moves."""
    import malmen_cli.edit as edit_module
    from malmen_cli.training.calibration import scaled

    base, make = tiny_model_factory("gpt2", dtype="bfloat16"), edit_module.make_shift
    monkeypatch.setattr(edit_module, "make_shift", lambda *a, **o: scaled(make(*a, **o), 1e-4))
    result = malmen(base, "--json", "--spec", small)
    realised = [module["realised"] for module in document(result)["manifest"]["modules"].values()]
    assert min(realised) < 0.9
    (line,) = [line for line in result.stderr.splitlines() if "warning" in line]
    assert "kept less than 90% of the shift" in line
    assert "--format delta keeps all of it" in line
    assert all((name in line) == (share < 0.9) for name, share in zip(MODULES, realised, strict=True))


def test_a_fp32_base_loses_nothing_and_is_not_warned(malmen: Malmen, tiny_gpt2: Path, small: Path) -> None:
    assert "warning" not in malmen(tiny_gpt2, "--spec", small).stderr


# ---------------------------------------------------------------- what it says where


def test_without_an_editor_one_line_names_the_command_that_trains_one(
    malmen: Malmen, tiny_gpt2: Path, small: Path
) -> None:
    result = malmen(tiny_gpt2, "--spec", small)
    assert (code(result), result.stdout) == (0, "")
    (line,) = [line for line in result.stderr.splitlines() if "no trained editor" in line]
    assert f"malmen train-editor {tiny_gpt2} FACTS" in line
    assert "calibrated: step" in result.stderr
    assert "\x1b" not in result.stderr
    for said in ("The capital of Australia is", "Bill Gates", "teacher_forced", MODULES[1], "shift norm", "realised"):
        assert said in result.stderr


def test_identity_asked_for_needs_no_excuse(malmen: Malmen, tiny_gpt2: Path) -> None:
    result = malmen(tiny_gpt2, "--method", "identity", "--json", "--score", 0)
    assert document(result)["manifest"]["method"]["name"] == "identity"
    assert "no trained editor" not in result.stderr
    assert "calibrated: step" in result.stderr


def test_quiet_is_silent(malmen: Malmen, tiny_gpt2: Path, small: Path) -> None:
    result = malmen(tiny_gpt2, "-q", "--spec", small)
    assert (code(result), result.stdout, result.stderr) == (0, "", "")


def test_verbose_shows_the_search(malmen: Malmen, tiny_gpt2: Path, small: Path) -> None:
    plain, verbose = (malmen(tiny_gpt2, "--force", "--score", 0, "--spec", small, *v).stderr for v in ([], ["-v"]))
    assert verbose.count("learned") > plain.count("learned") + 10


def test_progress_counts_the_facts_of_every_pass(malmen: Malmen, tiny_gpt2: Path, thrice: Path) -> None:
    result = malmen(tiny_gpt2, "--score", 0, "--spec", thrice)
    lines = [line for line in result.stderr.splitlines() if line.startswith("editing")]
    assert lines[-1] == "editing, 3 passes over 4 facts: 12/12"


def test_progress_of_one_pass_needs_no_words(malmen: Malmen, tiny_gpt2: Path, small: Path) -> None:
    result = malmen(tiny_gpt2, "--score", 0, "--spec", small)
    assert [line for line in result.stderr.splitlines() if line.startswith("editing")][-1] == "editing: 4/4"


@pytest.mark.parametrize(("kept", "warned"), [(0.49, True), (0.5, False), (None, False)])
def test_other_answers_that_moved_a_lot_are_said(
    malmen: Malmen,
    tiny_gpt2: Path,
    small: Path,
    editor: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    kept: float | None,
    warned: bool,
) -> None:
    """By teacher-forced LS; None: no fact has locality probes."""
    summarise = report_module.summarise

    def moved(*arguments: Any, **options: Any) -> Any:
        report = summarise(*arguments, **options)
        figures = dict(report.after.figures) | {"ls.teacher_forced": kept}
        return replace(report, after=replace(report.after, figures=figures))

    monkeypatch.setattr(report_module, "summarise", moved)

    def said(*options: object) -> list[str]:
        lines = malmen(tiny_gpt2, "--force", *options).stderr.splitlines()
        return [line for line in lines if "moved a lot" in line]

    untrained, trained = said("--spec", small), said("--editor", editor())
    assert len(untrained) == len(trained) == warned
    for line in untrained + trained:
        assert "LS 0.49, teacher_forced" in line
    for line in untrained:
        assert f"malmen train-editor {tiny_gpt2} FACTS" in line
        assert "locality probes" in line
    for line in trained:  # who has an editor needs no advice to train one
        assert "train-editor" not in line
        assert "edit fewer facts at once" in line


def test_standard_input(malmen: Malmen, tiny_gpt2: Path, facts_file: Path, tmp_path: Path, small: Path) -> None:
    text = facts_file.read_text(encoding="utf-8")
    from_file = document(malmen(tiny_gpt2, "--json", "--spec", small, out=tmp_path / "a"))
    found = document(malmen(tiny_gpt2, "--json", "--spec", small, facts="-", stdin=text, out=tmp_path / "b"))
    assert found["manifest"] == from_file["manifest"]


def test_a_spec_may_hold_the_facts(malmen: Malmen, tiny_gpt2: Path, tmp_path: Path) -> None:
    path = tmp_path / "edit.yaml"
    path.write_text("settings: {last_blocks: 1}\nfacts:\n- {prompt: Snow is, target: Rome}\n", encoding="utf-8")
    found = document(malmen(tiny_gpt2, "--spec", path, "--json", facts=path))
    assert list(found["manifest"]["modules"]) == MODULES[1:]
    assert found["scores"]["after"]["es"]["greedy"] == 1.0


# ---------------------------------------------------------------- --dry-run


@pytest.mark.parametrize("format", list(LISTINGS))
def test_dry_run_writes_nothing_and_says_what(malmen: Malmen, tiny_gpt2: Path, tmp_path: Path, format: str) -> None:
    before = contents(tmp_path)
    result = malmen(tiny_gpt2, "--dry-run", "--json", "--format", format)
    found = document(result)
    assert contents(tmp_path) == before
    assert found["modules"] == {MODULES[1]: [64, 32]}
    assert (found["facts"], found["editor"], found["format"], found["dry_run"]) == (4, None, format, True)
    assert found["disk_bytes"] > 0
    for said in (MODULES[1], "64 x 32", "4 facts", "memory about", "an untrained one", "nothing was written"):
        assert said in result.stderr


@pytest.mark.parametrize(
    ("count", "said"), [(250_000, "0.2 MB"), (93_400_000, "93.4 MB"), (1_000_000_000, "1.00 GB"), (2_345e6, "2.35 GB")]
)
def test_sizes_are_in_the_unit_that_shows_them(count: int, said: str) -> None:
    assert show_module.size(count) == said


def test_dry_run_has_no_size_of_nothing(malmen: Malmen, tiny_gpt2: Path) -> None:
    (line,) = [line for line in malmen(tiny_gpt2, "--dry-run").stderr.splitlines() if "memory about" in line]
    assert line.count(" MB") == 2
    assert "about 0.0 " not in line


@pytest.mark.parametrize("format", list(LISTINGS))
def test_dry_run_s_disk_figure_holds(malmen: Malmen, tiny_gpt2: Path, tmp_path: Path, format: str) -> None:
    planned = document(malmen(tiny_gpt2, "--dry-run", "--json", "--format", format))
    assert code(malmen(tiny_gpt2, "--format", format, "--score", 0)) == 0
    size = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert size <= planned["disk_bytes"] <= size + (2 << 20)


def test_dry_run_knows_the_rank(malmen: Malmen, tiny_gpt2: Path, thrice: Path) -> None:
    """Over the facts three times: three factors for every answer token."""
    result = malmen(tiny_gpt2, "--dry-run", "--json", "--spec", thrice)
    rank = 3 * document(result)["rows"]
    assert f"exact factors of rank {rank}" in result.stderr
    modules = document(malmen(tiny_gpt2, "--json", "--score", 0, "--spec", thrice))["manifest"]["modules"]
    assert {module["rank"] for module in modules.values()} == {rank}


def test_dry_run_names_the_editor_and_refuses_what_the_run_would(
    malmen: Malmen, tiny_gpt2: Path, tmp_path: Path, editor: Callable[..., Path]
) -> None:
    found = document(malmen(tiny_gpt2, "--dry-run", "--json", "--editor", editor()))
    assert found["editor"] == str(tmp_path / "malmen-editor")
    assert code(malmen(tiny_gpt2, "--dry-run", out=tiny_gpt2)) == 6
    assert code(malmen(tiny_gpt2, "--dry-run", "--method", "mend")) == 4


# ---------------------------------------------------------------- fine-tuning


@pytest.fixture
def tuning(tmp_path: Path) -> Path:
    path = tmp_path / "tuning.yaml"
    path.write_text("method: finetune\nsettings: {lr: 0.02, epochs: 60}\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("format", list(LISTINGS))
def test_fine_tuning_in_every_format(
    malmen: Malmen, tiny_gpt2: Path, tmp_path: Path, tuning: Path, format: str
) -> None:
    before = contents(tiny_gpt2)
    result = malmen(tiny_gpt2, "--spec", tuning, "--format", format, "--json")
    assert code(result) == 0
    found = json.loads(result.stdout)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == LISTINGS[format]
    assert contents(tiny_gpt2) == before
    said, scores = found["manifest"], found["scores"]
    assert (said["method"]["name"], said["method"]["lr"], said["method"]["epochs"]) == ("finetune", 0.02, 60)
    assert (said["editor"], said["calibration"], list(said["modules"])) == (None, None, MODULES[1:])
    assert [scores[when]["es"]["greedy"] for when in ("before", "after")] == [0.0, 1.0]
    lines = result.stderr.splitlines()
    assert any(line.startswith("fine-tuning, at most 60 epochs of 4 facts: 24/240") for line in lines)
    (line,) = [line for line in lines if line.startswith("fine-tuned: epoch ")]
    assert line.endswith("nats a token")
    assert "no trained editor" not in result.stderr


def test_fine_tuning_s_document_keeps_to_the_schema(malmen: Malmen, tiny_gpt2: Path, tuning: Path) -> None:
    found = document(malmen(tiny_gpt2, "--spec", tuning, "--json", "--score", 0))
    assert found["manifest"]["method"]["name"] == "finetune"


def test_fine_tuning_gives_the_same_bytes_for_a_seed(malmen: Malmen, tiny_gpt2: Path, tmp_path: Path) -> None:
    options = ["--method", "finetune", "--seed", 1, "--score", 0]
    for name in ("a", "b"):
        assert code(malmen(tiny_gpt2, *options, out=tmp_path / name)) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_dry_run_of_fine_tuning_says_which_module(malmen: Malmen, tiny_gpt2: Path, tmp_path: Path) -> None:
    result = malmen(tiny_gpt2, "--method", "finetune", "--dry-run", "--json")
    found = document(result)
    assert (found["editor"], found["modules"]) == (None, {MODULES[1]: [64, 32]})
    for said in (
        "would edit 1 module of",
        "fine-tuning, at most 25 epochs in batches of 16 facts",
        MODULES[1],
        "dense",
    ):
        assert said in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_fine_tuning_with_an_editor_is_exit_4(
    malmen: Malmen, tiny_gpt2: Path, tmp_path: Path, editor: Callable[..., Path], options: list[str]
) -> None:
    result = malmen(tiny_gpt2, "--method", "finetune", "--editor", editor(), *options)
    assert (code(result), result.stdout) == (4, "")
    assert str(result.exception).endswith("finetune uses no editor; leave it out or choose another method")
    assert "loading" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_fine_tuning_takes_no_installed_editor(malmen: Malmen, tiny_gpt2: Path, editor: Callable[..., Path]) -> None:
    install(editor(), tiny_gpt2)
    result = malmen(tiny_gpt2, "--method", "finetune", "--score", 0, "--json")
    assert json.loads(result.stdout)["manifest"]["editor"] is None
    assert "editor" not in result.stderr


def test_training_an_editor_for_fine_tuning_is_exit_3(
    tiny_gpt2: Path, facts_file: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options in ([], ["--spec", str(small)]):
        given = ["train-editor", str(tiny_gpt2), str(facts_file), "--method", "finetune", *options]
        assert errors.main(given) == 3
        printed = capsys.readouterr()
        said = "finetune needs no training; use it with: malmen apply BASE FACTS -o DIR --method finetune"
        assert (printed.out, printed.err.splitlines()) == ("", [f"malmen: error: {said}"])


# ---------------------------------------------------------------- MEMIT, ROME and AlphaEdit

MEMITS = ("memit", "rome", "alphaedit")


@pytest.fixture
def named(tmp_path: Path, fact_records: list[dict[str, Any]]) -> Path:
    """The facts that have subjects."""
    path = tmp_path / "named.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in fact_records[:3]), encoding="utf-8")
    return path


@pytest.fixture
def far(tmp_path: Path) -> Callable[[str], Path]:
    """`far(method)`: a spec for a random model, in which little reads what a subject holds."""

    def write(method: str) -> Path:
        path = tmp_path / f"{method}.yaml"
        settings = "lr: 0.3, clamp: 4.0, decay: 0.01, prefixes: 1, moment_weight: 1.0, ridge: 0.001, stats_tokens: 300"
        settings += ", null_threshold: 0.5"
        path.write_text(f"method: {method}\nsettings: {{{settings}}}\n", encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize(("method", "format"), list(zip(MEMITS, LISTINGS, strict=True)))
def test_memit_and_its_kin_end_to_end(
    malmen: Malmen, tiny_gpt2: Path, tmp_path: Path, named: Path, far: Callable[[str], Path], method: str, format: str
) -> None:
    before = contents(tiny_gpt2)
    result = malmen(tiny_gpt2, "--spec", far(method), "--format", format, "--json", facts=named)
    found = document(result)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == LISTINGS[format]
    assert contents(tiny_gpt2) == before
    said = found["manifest"]
    assert (said["method"]["name"], said["method"]["lr"]) == (method, 0.3)
    assert (said["editor"], said["calibration"]) == (None, None)
    assert said["statistics"] == {"name": "sampled", "tokens": 300, "dtype": "float32"}
    assert {name: module["rank"] for name, module in said["modules"].items()} == {MODULES[0]: 3}
    assert said["modules"][MODULES[0]]["norm"] > 0
    lines = result.stderr.splitlines()
    assert "key statistics of 1 module over 300 tokens of sampled: kept for next time" in lines
    assert any(line.startswith("finding targets: ") for line in lines)
    assert any(line.startswith(f"{method}: targets at ") for line in lines)
    assert "no trained editor" not in result.stderr


def test_memit_s_statistics_are_built_once(
    malmen: Malmen, tiny_gpt2: Path, tmp_path: Path, named: Path, far: Callable[[str], Path]
) -> None:
    """And the second run, which reads them, leaves the same bytes."""
    options = ["--spec", far("memit"), "--score", 0]
    results = [malmen(tiny_gpt2, *options, facts=named, out=tmp_path / name) for name in ("a", "b")]
    assert ["key statistics" in result.stderr for result in results] == [True, False]
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_memit_over_a_text_of_one_s_own(
    malmen: Malmen, tiny_gpt2: Path, tmp_path: Path, named: Path, far: Callable[[str], Path]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The capital of France is Paris.\n" * 9, encoding="utf-8")
    options = ["--spec", far("memit"), "--stats-from", text, "--json", "--score", 0]
    said = document(malmen(tiny_gpt2, *options, facts=named))["manifest"]["statistics"]
    assert said["name"] == "text.txt"
    assert said["tokens"] < 300
    assert len(said["sha256"]) == 64
    text.write_text("", encoding="utf-8")
    assert code(malmen(tiny_gpt2, *options, "--force", facts=named)) == 3


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_facts_without_subjects_are_named(
    malmen: Malmen, tiny_gpt2: Path, tmp_path: Path, far: Callable[[str], Path], options: list[str]
) -> None:
    path = tmp_path / "bare.jsonl"
    records = [{"id": f"f{i}", "prompt": f"Snow {i} is", "target": "Rome"} for i in range(30)]
    records[4] |= {"subject": "Snow"}
    records[5] |= {"subject": "Rain"}
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    result = malmen(tiny_gpt2, "--spec", far("memit"), *options, facts=path)
    assert code(result) == 3
    error = result.exception
    assert isinstance(error, FactsError)
    assert (error.total, len(error.problems)) == (29, 20)
    lines = str(error).splitlines()
    assert lines[0].startswith('fact f0:subject: missing; the fact is edited at its last token (add "subject":')
    assert lines[4] == "fact f5:subject: 'Rain' is not in the prompt (write it as the prompt does)"
    assert "key statistics" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", MEMITS)
def test_dry_run_of_memit_builds_nothing(
    malmen: Malmen, tiny_gpt2: Path, tmp_path: Path, named: Path, far: Callable[[str], Path], method: str
) -> None:
    options = ["--spec", far(method), "--dry-run", "--json"]
    result = malmen(tiny_gpt2, *options, facts=named)
    found = document(result)
    assert (found["editor"], found["modules"], found["rows"]) == (None, {MODULES[0]: [64, 32]}, 3)
    assert f"with {method}, at most 25 steps a fact, " in result.stderr
    assert "key statistics of 1 module over 300 tokens of sampled built first" in result.stderr
    assert "exact factors of rank 3" in result.stderr
    assert not (tmp_path / "out").exists()
    assert not (Path(os.environ["MALMEN_HOME"]) / "statistics").exists()
    assert code(malmen(tiny_gpt2, "--spec", far(method), "--score", 0, facts=named)) == 0
    assert "over 300 tokens of sampled from the cache" in malmen(tiny_gpt2, *options, "--force", facts=named).stderr


@pytest.mark.parametrize("method", MEMITS)
def test_memit_with_an_editor_is_exit_4(
    malmen: Malmen, tiny_gpt2: Path, editor: Callable[..., Path], method: str
) -> None:
    result = malmen(tiny_gpt2, "--method", method, "--editor", editor())
    assert (code(result), result.stdout) == (4, "")
    assert str(result.exception).endswith(f"{method} uses no editor; leave it out or choose another method")


@pytest.mark.parametrize("method", ["malmen", "identity", "finetune"])
def test_statistics_for_a_method_without_them_are_exit_2(malmen: Malmen, tiny_gpt2: Path, method: str) -> None:
    result = malmen(tiny_gpt2, "--method", method, "--stats-from", "text.txt")
    assert code(result) == 2
    assert "--stats-from is for memit, rome and alphaedit" in result.output


# ---------------------------------------------------------------- which editor


@pytest.mark.parametrize("method", ["malmen", "mend"])
def test_an_installed_editor_is_used(malmen: Malmen, tiny_gpt2: Path, editor: Callable[..., Path], method: str) -> None:
    """Without --method, whatever it was trained for."""
    place = install(editor(method), tiny_gpt2)
    result = malmen(tiny_gpt2, "--json", "--score", 0)
    found = document(result)["manifest"]
    assert f"editor: {place} ({method})" in result.stderr
    assert (found["method"]["name"], found["calibration"]) == (method, None)
    assert found["editor"]["sha256"] == contents(place)["editor.safetensors"]


def test_the_editor_given_is_used(malmen: Malmen, tiny_gpt2: Path, editor: Callable[..., Path]) -> None:
    install(editor("malmen"), tiny_gpt2)
    found = document(malmen(tiny_gpt2, "--json", "--score", 0, "--editor", editor("mend")))["manifest"]
    assert (found["method"]["name"], found["editor"]["path"]) == ("mend", "mend-editor")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--editor", "MEND", "--method", "malmen"], "trained for method mend, not malmen"),
        (["--editor", "nowhere"], "not found"),
        (["--method", "mend"], "train-editor"),
    ],
)
def test_editors_that_cannot_be_used_are_exit_4(
    malmen: Malmen, tiny_gpt2: Path, tmp_path: Path, editor: Callable[..., Path], options: list[str], said: str
) -> None:
    given = [str(editor("mend")) if option == "MEND" else option for option in options]
    result = malmen(tiny_gpt2, *given)
    assert (code(result), result.stdout) == (4, "")
    assert said in str(result.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_a_folder_without_an_editor_is_refused_before_the_base_is_loaded(
    malmen: Malmen, tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    import malmen_cli.base.model as model_module

    monkeypatch.setattr(model_module, "load_base", None)
    result = malmen(tiny_gpt2, "--editor", tmp_path, *options)
    assert code(result) == 4
    assert f"{tmp_path / 'editor.json'}: not found" in str(result.exception)
    assert "loading" not in result.stderr


def test_mend_without_an_editor_names_the_command(malmen: Malmen, tiny_gpt2: Path) -> None:
    result = malmen(tiny_gpt2, "--method", "mend")
    assert f"malmen train-editor {tiny_gpt2} FACTS --method mend" in str(result.exception)


def test_an_editor_of_another_base_is_exit_4(
    malmen: Malmen, tiny_model_factory: Callable[..., Path], editor: Callable[..., Path]
) -> None:
    """T22: same shapes, other weights."""
    result = malmen(tiny_model_factory("gpt2", seed=1), "--editor", editor())
    assert code(result) == 4
    assert "another base" in str(result.exception)


# ---------------------------------------------------------------- what it refuses


def test_twenty_five_mistakes(malmen: Malmen, tiny_gpt2: Path, tmp_path: Path, facts_file: Path) -> None:
    bad = [{"prompt": f"{i} is", "target": ""} if i % 2 else {"prompt": f"{i} is", "targt": "x"} for i in range(25)]
    lines = facts_file.read_text(encoding="utf-8").splitlines() + [json.dumps(record) for record in bad]
    facts_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    result = malmen(tiny_gpt2, out=tmp_path / "out")
    assert (code(result), result.stdout) == (3, "")
    assert isinstance(result.exception, FactsError)
    assert len(result.exception.problems) == 20
    assert result.exception.total >= 25
    assert {p.line for p in result.exception.problems} <= set(range(5, 30))
    assert not (tmp_path / "out").exists()


def test_twenty_five_mistakes_at_the_console(
    tmp_path: Path, tiny_gpt2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i} is", "target": ""}) + "\n" for i in range(25)))
    assert errors.main(["apply", str(tiny_gpt2), str(path), "-o", str(tmp_path / "out")]) == 3
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert [line.split(":")[1] for line in lines[:20]] == [str(i) for i in range(1, 21)]
    assert lines[20] == "... and 5 more"
    assert "25 problems, nothing was written" in lines[21]
    assert (printed.out, sorted(p.name for p in tmp_path.iterdir())) == ("", ["bad.jsonl"])


@pytest.mark.parametrize("where", ["base", "inside", "file", "full", "link"])
def test_outputs_that_may_not_be_are_exit_6(malmen: Malmen, tiny_gpt2: Path, tmp_path: Path, where: str) -> None:
    base = shutil.copytree(tiny_gpt2, tmp_path / "base")
    out = {"base": base, "inside": base / "x"}.get(where, tmp_path / "there")
    if where == "file":
        out.write_text("mine")
    elif where == "full":
        out.mkdir()
        (out / "mine").write_text("mine")
    elif where == "link":
        out.symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path)
    result = malmen(base, out=out)
    assert (code(result), result.stdout) == (6, "")
    assert contents(tmp_path) == before


def test_force_replaces_what_malmen_wrote(malmen: Malmen, tiny_gpt2: Path, tmp_path: Path, small: Path) -> None:
    options = ["--score", 0, "--spec", small]
    assert code(malmen(tiny_gpt2, *options)) == 0
    before = contents(tmp_path / "out")
    assert code(malmen(tiny_gpt2, *options, "--format", "delta")) == 6
    assert contents(tmp_path / "out") == before
    assert code(malmen(tiny_gpt2, *options, "--format", "delta", "--force")) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == LISTINGS["delta"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("settings: {rnak: 4}", 3),
        ("metod: x", 3),
        ("method: mendd", 3),
        ("settings: {modules: [nothing.here]}", 3),
        ("{method: finetune, settings: {block: 2}}", 3),
        ("{method: finetune, settings: {rank: 4}}", 3),
        ("{method: memit, settings: {blocks: [1]}}", 3),
        ("{method: rome, settings: {blocks: [0, 1]}}", 3),
    ],
)
def test_bad_specs_are_exit_3(malmen: Malmen, tiny_gpt2: Path, tmp_path: Path, text: str, expected: int) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(text, encoding="utf-8")
    result = malmen(tiny_gpt2, "--spec", path)
    assert (code(result), result.stdout) == (expected, "")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--format", "gguf"], 2),
        (["--score", -1], 2),
        (["--batch-size", 0], 2),
        (["--seed", "x"], 2),
        (["--method", "mallmen"], 3),
        (["--spec", "nowhere.yaml"], 3),
        (["--device", "warp"], 4),
    ],
)
def test_options_that_make_no_sense(malmen: Malmen, tiny_gpt2: Path, options: list[object], expected: int) -> None:
    assert code(malmen(tiny_gpt2, *options)) == expected


def test_no_base_and_no_facts(malmen: Malmen, tiny_gpt2: Path, tmp_path: Path) -> None:
    assert code(malmen("/nowhere/at/all")) == 4
    assert code(malmen(tiny_gpt2, facts=tmp_path / "nowhere.jsonl")) == 3
    assert code(malmen("/nowhere/at/all", facts=tmp_path / "nowhere.jsonl")) == 3


def test_weights_that_are_not_finite_are_exit_5(malmen: Malmen, tiny_gpt2: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(tiny_gpt2).save_pretrained(tmp_path / "broken")
    result = malmen(tmp_path / "broken")
    assert code(result) == 5
    assert "not finite" in str(result.exception)
    assert not (tmp_path / "out").exists()
