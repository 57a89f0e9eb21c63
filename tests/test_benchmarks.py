"""benchmarks/: rows that go on where a killed run stopped, figures as a report would give them, and their pictures."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from malmen_cli.artifact.editors import install_editor, save_editor
from malmen_cli.base.model import load_base
from malmen_cli.editing.editor import Editor
from malmen_cli.editing.settings import MalmenSettings
from malmen_cli.exceptions import NumericsError

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
PNG = b"\x89PNG\r\n\x1a\n"
SETTINGS = MalmenSettings(last_blocks=2, rank=4, preserved_rank=8)
MEASURED = {"figures", "ci95", "seconds", "relative_norm", "perplexity"}
KEYS = MEASURED | {"base", "facts", "method", "seed", "training_seconds", "batch_size"}
KEYS |= {"device", "threads", "versions", "date", "command"}
FIGURES = [f"{part}.{protocol}" for part in ("es", "gs", "ls", "ps") for protocol in ("teacher_forced", "greedy")]

Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """`modules("quality")` imports a script of benchmarks/ as it imports its neighbours: by name, from that folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def quality(modules: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = modules("quality")
    monkeypatch.setattr(module, "TEXTS", 4)
    monkeypatch.setattr(module, "TOKENS", 8)
    return module


@pytest.fixture
def run(quality: ModuleType, tiny_gpt2: Path, facts_file: Path, tmp_path: Path) -> Run:
    """`run(*options) -> rows` of a run on the four facts, sizes 1 (two facts, one by one) and 4."""

    def go(*options: object, sizes: str = "1,4", output: Path = tmp_path / "quality.jsonl") -> list[dict[str, Any]]:
        command = [tiny_gpt2, "--facts", facts_file, "--sizes", sizes, "--singles", 2, "-o", output, *options]
        quality.main(list(map(str, command)))
        return [json.loads(line) for line in output.read_text().splitlines()]

    return go


def an_editor(tiny_gpt2: Path, folder: Path, method: str = "malmen", **description: object) -> Path:
    """An untrained editor, saved as a trained one is."""
    base = load_base(str(tiny_gpt2), device="cpu")
    editor = Editor.fresh(base.model, SETTINGS)
    settings = {name: getattr(SETTINGS, name) for name in ("last_blocks", "rank", "preserved_rank")}
    said = {"base": {"fingerprint": base.fingerprint}, "method": method, "settings": settings}
    save_editor(folder, editor.state(), said | description, force=False)
    return folder


def by(rows: list[dict[str, Any]], name: str, edited: int) -> dict[str, Any]:
    (found,) = (row for row in rows if (row["method"]["name"], row["facts"]["edited"]) == (name, edited))
    return found


# ---------------------------------------------------------------- rows


def test_a_row_for_every_size_and_method(run: Run, tiny_gpt2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run("--editor", "identity", "--editor", "finetune")
    found = [(row["facts"]["edited"], row["method"]["name"]) for row in rows]
    names = ["base (no edit)", "identity", "finetune"]
    assert found == [(size, name) for size in (1, 4) for name in names]
    for row in rows:
        assert set(row) == KEYS
        assert set(FIGURES) < set(row["figures"])
        assert set(row["figures"]) == set(row["ci95"])
        assert row["perplexity"]["before"] == rows[0]["perplexity"]["after"]
        assert row["base"]["name"] == str(tiny_gpt2)
    for row in rows[1:3] + rows[4:]:
        assert row["seconds"] > 0
        assert row["relative_norm"] > 0
        assert row["perplexity"]["after"] != row["perplexity"]["before"]
    assert [row["facts"]["scored"] for row in rows] == [2, 2, 2, 4, 4, 4]
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 6
    assert all(line.count("|") == table[0].count("|") for line in table)
    assert table[2].startswith("| 1 (2 one by one) | base (no edit) |")


def test_the_base_s_own_row_has_kept_everything(run: Run) -> None:
    for row in run():
        assert row["method"]["name"] == "base (no edit)"
        assert row["figures"]["ls.teacher_forced"] == row["figures"]["ls.greedy"] == 1.0
        assert row["perplexity"]["before"] == row["perplexity"]["after"]
        assert (row["seconds"], row["relative_norm"], row["training_seconds"]) == (None, None, None)


def test_the_base_is_whole_again_after_every_edit(run: Run, tmp_path: Path) -> None:
    """What stands behind an edit in the order is measured as if it stood alone."""
    alone = run("--editor", "finetune", output=tmp_path / "alone.jsonl")
    behind = run("--editor", "identity", "--editor", "finetune", output=tmp_path / "behind.jsonl")
    for name in ("base (no edit)", "finetune"):
        for size in (1, 4):
            for part in ("figures", "ci95", "perplexity", "relative_norm"):
                assert by(alone, name, size)[part] == by(behind, name, size)[part]


def test_a_rerun_does_only_what_is_missing(
    run: Run, quality: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run("--editor", "finetune")
    made: list[str] = []
    shift_of = quality.shift_of

    def counted(base: Any, method: Any, facts: Any, **options: Any) -> Any:
        made.append(method.name)
        return shift_of(base, method, facts, **options)

    monkeypatch.setattr(quality, "shift_of", counted)
    capsys.readouterr()
    assert run("--editor", "finetune") == first
    assert made == []
    printed = capsys.readouterr().out
    assert printed.count("finetune") == 2
    more = run("--editor", "finetune", "--editor", "identity")
    assert more[: len(first)] == first
    assert made == ["identity"] * 3
    with (tmp_path / "quality.jsonl").open("a") as stream:
        stream.write('{"base": {"na')  # killed while writing
    with pytest.raises(json.JSONDecodeError):  # by this test, of the torn line: quality.py passes over it
        run("--editor", "finetune", "--scored", 2)
    assert made == ["identity"] * 3 + ["finetune"]
    *_, torn, base, last = (tmp_path / "quality.jsonl").read_text().splitlines()
    assert torn == '{"base": {"na'
    assert [json.loads(line)["facts"]["scored"] for line in (base, last)] == [2, 2]


def test_the_same_seed_gives_the_same_figures(run: Run, tmp_path: Path) -> None:
    options = ("--editor", "identity", "--editor", "finetune", "--scored", 3)
    one, two = (run(*options, output=tmp_path / f"{name}.jsonl") for name in "ab")
    for left, right in zip(one, two, strict=True):
        for part in ("figures", "ci95", "perplexity", "relative_norm", "facts"):
            assert left[part] == right[part]


def test_an_edit_that_breaks_the_model_is_told_and_tried_again(
    run: Run, quality: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise NumericsError("the shift of h.1 is not finite")

    with monkeypatch.context() as patch:
        patch.setattr(quality, "shift_of", broken)
        failed = by(run("--editor", "finetune"), "finetune", 4)
    assert "h.1" in failed["error"]
    assert "failed: the shift of h.1 is not finite" in capsys.readouterr().out
    again = run("--editor", "finetune")
    assert len(again) == 4 + 2
    assert "error" not in again[-1]


def test_figures_are_those_of_a_report(quality: ModuleType, tiny_gpt2: Path, facts_file: Path) -> None:
    """`summary` is for facts that do not share an edited model; of those that do it says what `summarise` says."""
    from malmen_cli.facts.files import read_facts
    from malmen_cli.scoring.judge import judge
    from malmen_cli.scoring.protocols import collect
    from malmen_cli.scoring.report import summarise

    facts = read_facts(str(facts_file)).facts
    answers = collect(load_base(str(tiny_gpt2), device="cpu"), facts, batch_size=4)
    expected = summarise(facts, answers, answers).after
    found = quality.summary([judge(fact, answers, answers) for fact in facts], 0)
    assert found["figures"] == pytest.approx(dict(expected.figures))
    for name, interval in expected.ci95.items():
        assert found["ci95"][name] == pytest.approx(interval)


def test_the_loss_is_that_of_the_sampled_tokens(quality: ModuleType, tiny_gpt2: Path) -> None:
    """By transformers' own loss, with what the texts started from left out."""
    import torch

    from malmen_cli.cli.console import Console

    base = load_base(str(tiny_gpt2), device="cpu")
    bench = quality.Bench(base, 0, 3, Console(quiet=True))
    total, count = 0.0, 0
    for text in bench.texts:
        assert len(text.ids) - text.n_prompt == 8
        ids = torch.tensor([text.ids])
        labels = torch.where(torch.arange(len(text.ids)) < text.n_prompt, -100, ids)
        total += 8 * float(base.model(input_ids=ids, labels=labels).loss)
        count += 8
    assert bench.loss() == pytest.approx(total / count, rel=1e-5)  # fp32 sums in another order


def test_a_spread_is_by_content_and_in_order(quality: ModuleType, facts_file: Path) -> None:
    from malmen_cli.facts.files import read_facts

    facts = read_facts(str(facts_file)).facts
    chosen = quality.spread(facts, 2, 0)
    assert chosen == [fact for fact in facts if fact in chosen]
    assert {fact.id for fact in quality.spread(facts[::-1], 2, 0)} == {fact.id for fact in chosen}
    assert quality.spread(facts, 9, 0) == list(facts)
    assert len({tuple(fact.id for fact in quality.spread(facts, 2, seed)) for seed in range(20)}) > 1


# ---------------------------------------------------------------- methods


def test_editors_by_folder_and_the_installed_one(run: Run, tiny_gpt2: Path, tmp_path: Path) -> None:
    one = an_editor(tiny_gpt2, tmp_path / "one")
    two = an_editor(tiny_gpt2, tmp_path / "two", "mend")
    install_editor(one, load_base(str(tiny_gpt2), device="cpu").fingerprint)
    rows = run("--editor", "malmen", "--editor", f"mend={two}", "--trained-in", "malmen=12.5", sizes="4")
    installed, mend = by(rows, "malmen", 4), by(rows, "mend", 4)
    assert (installed["training_seconds"], mend["training_seconds"]) == (12.5, None)
    assert (installed["method"]["source"], mend["method"]["source"]) == ("installed", "two")
    assert installed["method"]["editor"]["sha256"] == mend["method"]["editor"]["sha256"]
    before = len(rows)
    assert len(run("--editor", f"malmen={one}", sizes="4")) == before  # the same editor, by another name


def test_a_spec_gives_an_untrained_method_its_settings(run: Run, tmp_path: Path) -> None:
    spec = tmp_path / "short.yaml"
    spec.write_text("method: finetune\nsettings: {epochs: 1}\n")
    rows = run("--editor", "finetune", "--editor", f"finetune={spec}", sizes="4")
    assert [row["method"]["settings"]["epochs"] for row in rows[-2:]] == [25, 1]


def test_memit_and_its_kin(run: Run, quality: ModuleType, tiny_gpt2: Path, facts_file: Path, tmp_path: Path) -> None:
    """Of facts with subjects; a file in which one has none is refused."""
    spec, named = tmp_path / "spec.yaml", tmp_path / "named.jsonl"
    spec.write_text("settings: {steps: 3, prefixes: 0, stats_tokens: 100, null_threshold: 0.5}\n")
    named.write_text("".join(facts_file.read_text().splitlines(keepends=True)[:3]))
    methods = [f"{name}={spec}" for name in ("memit", "rome", "alphaedit")]
    options = [item for method in methods for item in ("--editor", method)]
    command = [tiny_gpt2, "--facts", named, "--sizes", "3", "-o", tmp_path / "rows.jsonl", *options]
    quality.main(list(map(str, command)))
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["method"]["name"] for row in rows] == ["base (no edit)", "memit", "rome", "alphaedit"]
    assert [row["method"]["settings"]["constraint"] for row in rows[1:]] == ["least_squares", "equality", "null_space"]
    assert all(row["relative_norm"] > 0 for row in rows[1:])
    assert [row["seconds"] is None for row in rows[1:]] == [False, True, True]  # the targets are those of memit
    with pytest.raises(SystemExit, match="fact brazil:subject: missing"):
        run("--editor", methods[0], sizes="4")


@pytest.mark.parametrize(
    ("option", "said"),
    [("malmen", "no malmen editor"), ("mend=nowhere", "not found"), ("finetun", "did you mean 'finetune'")],
)
def test_an_editor_that_is_not_there_is_refused(run: Run, tmp_path: Path, option: str, said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        run("--editor", option)
    assert not (tmp_path / "quality.jsonl").exists()


@pytest.mark.parametrize(
    "options",
    [["--sizes", "0"], ["--sizes", "some"], ["model"], ["model", "--facts", "f", "-o", "o", *["--sizes", "1"] * 2]],
)
def test_usage(quality: ModuleType, options: list[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        quality.main(options)
    assert leaving.value.code == 2


# ---------------------------------------------------------------- tables and pictures


def a_row(name: str, edited: int, **changes: Any) -> dict[str, Any]:
    figures = dict.fromkeys(FIGURES, 0.5) | {"score": 0.5}
    method = {"name": name, "settings": None, "editor": None, "source": None} | changes.pop("method", {})
    return {
        "base": {"name": "tiny", "revision": None, "fingerprint": "0" * 64, "dtype": "float32"},
        "facts": {"name": "facts.jsonl", "sha256": "1" * 64, "edited": edited, "scored": edited, "one_by_one": False},
        "method": method,
        "seed": 0,
        "figures": figures,
        "ci95": {"score": [0.4, 0.6]},
        "seconds": 1.25,
        "training_seconds": None,
        "relative_norm": 0.125,
        "perplexity": {"before": 8.0, "after": 12345.0},
        "device": "cpu",
    } | changes


@pytest.fixture
def tables(modules: Callable[[str], ModuleType]) -> ModuleType:
    return modules("quality_table")


def test_the_table_of_a_row(tables: ModuleType) -> None:
    big = a_row("malmen", 7499, training_seconds=60.0)
    big["facts"]["scored"] = 1024
    assert tables.line(big, "malmen") == (
        "| 7,499 (1,024 scored) | malmen | 0.500 / 0.500 | 0.500 / 0.500 | 0.500 / 0.500 | 0.500 / 0.500 "
        "| 0.500 (0.400-0.600) | 1.2 | 60.0 | 0.125 | 8.00 -> 1.2e+04 |"
    )
    none = a_row("malmen", 4)
    none["figures"] |= {"ps.teacher_forced": None, "ps.greedy": None, "gs.greedy": None}
    assert "| 0.500 / - | 0.500 / 0.500 | - |" in tables.line(none, "malmen")


def test_a_table_is_by_size_with_the_base_in_front(tables: ModuleType) -> None:
    rows = [a_row("malmen", 64), a_row("malmen", 1), a_row(tables.BASE, 64), a_row(tables.BASE, 1)]
    other = a_row("malmen", 1, base=rows[0]["base"] | {"name": "other", "fingerprint": "2" * 64})
    lines = [line.split(" | ")[:2] for line in tables.table([*rows, other]).splitlines() if line.startswith("| ")]
    assert lines == [
        ["| facts", "method"],
        ["| 1", tables.BASE],
        ["| 1", "malmen"],
        ["| 64", tables.BASE],
        ["| 64", "malmen"],
        ["| facts", "method"],
        ["| 1", "malmen"],
    ]


def test_methods_of_one_name_are_told_apart(tables: ModuleType) -> None:
    edited = [{"editor": {"sha256": digit * 64}, "source": source} for digit, source in (("a", "x"), ("b", "x"))]
    rows = [a_row("malmen", 1, method=method) for method in (*edited, {"settings": {"rank": 1}, "source": "y"})]
    rows.append(a_row("mend", 1, method={"source": "z"}))
    named = [tables.label_of(row, rows) for row in rows]
    assert named == ["malmen (x) aaaaaaaa", "malmen (x) bbbbbbbb", "malmen (y)", "mend"]


def test_table_and_plot_need_no_model(
    quality: ModuleType, tables: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, picture = tmp_path / "rows.jsonl", tmp_path / "rows.png"
    for row in (a_row(tables.BASE, 1), a_row("malmen", 1), a_row("malmen", 64), a_row("mend", 64, error="not finite")):
        tables.append_row(file, row)
    quality.main(["--table", str(file), "--plot", str(picture)])
    assert capsys.readouterr().out.count("| malmen |") == 2
    assert picture.read_bytes().startswith(PNG)
    with pytest.raises(SystemExit, match=r"\.png, \.svg or \.pdf"):
        quality.main(["--table", str(file), "--plot", str(tmp_path / "rows.jpg")])


def test_the_curve_of_an_editor(modules: Callable[[str], ModuleType], tiny_gpt2: Path, tmp_path: Path) -> None:
    shares = {f"{part}_{protocol}": 0.5 for part in ("es", "gs", "ls") for protocol in ("teacher_forced", "greedy")}
    at = [{"step": step, "validation": shares} for step in (50, 100)]
    said = {"scores": {"score": 0.5, "at": at}, "best_step": 100, "validation_facts": {"count": 4}}
    editor = an_editor(tiny_gpt2, tmp_path / "editor", **said)
    plots = modules("plots")
    plots.main(["curve", str(editor), "-o", str(tmp_path / "curve.png")])
    assert (tmp_path / "curve.png").read_bytes().startswith(PNG)
    with pytest.raises(SystemExit, match="not found"):
        plots.main(["curve", str(tmp_path), "-o", str(tmp_path / "other.png")])
    assert not (tmp_path / "other.png").exists()


def test_a_wrecked_model_s_perplexity_is_still_a_number(quality: ModuleType) -> None:
    assert math.isfinite(quality._exp(1e6))


# ---------------------------------------------------------------- the other architectures


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_encoder_decoders_and_classifiers_are_measured_too(
    quality: ModuleType, tiny_model_factory: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    facts = tmp_path / "facts.jsonl"
    records = [
        {
            "prompt": f"Is the capital of Peru number {i}?",
            "target": ("SUPPORTS", "REFUTES")[i % 2],
            "rephrases": [f"Peru's capital is {i}"],
            "locality": [{"prompt": f"Snow {i} is white", "target": "REFUTES"}],
        }
        for i in range(5)
    ]
    facts.write_text("".join(json.dumps(record) + "\n" for record in records))
    output = tmp_path / "quality.jsonl"
    spec = tmp_path / "fast.yaml"
    spec.write_text("method: finetune\nsettings: {lr: 0.03}\n")
    command = [
        tiny_model_factory(family),
        "--facts",
        facts,
        "--sizes",
        "4",
        "--editor",
        f"finetune={spec}",
        "-o",
        output,
    ]
    quality.main([*map(str, command), "--device", "cpu"])
    base, tuned = (json.loads(line) for line in output.read_text().splitlines())
    assert base["figures"]["ls.teacher_forced"] == base["figures"]["ls.greedy"] == 1.0
    assert tuned["figures"]["es.teacher_forced"] > base["figures"]["es.teacher_forced"]
    assert tuned["perplexity"]["before"] == base["perplexity"]["after"] > 1.0


def test_a_fitted_classifier_knows_its_claims_and_can_be_edited(
    modules: Callable[[str], ModuleType], tiny_model_factory: Callable[..., Path], tmp_path: Path
) -> None:
    """Labels that one word decides are learned; blocks that are not fitted keep every bit."""
    places = ("Peru", "France", "Japan", "Italy", "Spain", "Brazil")
    claims = [
        {"text": f"{place} number {i} is {word}", "label": label}
        for i in range(6)
        for place in places
        for word, label in (("white", "SUPPORTS"), ("tennis", "REFUTES"))
    ]
    file = tmp_path / "claims.jsonl"
    file.write_text("".join(json.dumps(claim) + "\n" for claim in claims))
    encoder, out = tiny_model_factory("bert"), tmp_path / "fitted"
    fit = modules("fit_classifier")
    fit.main(
        [
            str(encoder),
            str(file),
            "-o",
            str(out),
            "--lr",
            "0.01",
            "--epochs",
            "20",
            "--batch-size",
            "8",
            "--blocks",
            "1",
        ]
    )
    base, before = load_base(str(out), device="cpu"), load_base(str(encoder), device="cpu")
    assert base.task.labels == ("REFUTES", "SUPPORTS")
    tokenizer = base.tokenizer
    read = fit.read_claims(file, None)
    assert fit.right(base.model, read, 16, tokenizer) > 0.8  # half of them have either label
    changed = {
        name
        for (name, one), other in zip(base.model.named_parameters(), before.model.parameters(), strict=True)
        if not one.equal(other)
    }
    assert changed
    assert not any("layer.0." in name or "embeddings" in name for name in changed)
