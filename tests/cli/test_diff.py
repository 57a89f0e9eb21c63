"""`malmen diff` end to end: exit codes, stdout, the table, and which answers changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import running
import torch

from malmen_cli.artifact.delta import write_delta
from malmen_cli.artifact.merged import write_merged
from malmen_cli.base.weights import fingerprint
from malmen_cli.cli.errors import main
from malmen_cli.editing.shift import IN_OUT, ModuleShift, Shift

valid = partial(running.valid, "diff")
MODULE = "transformer.h.1.mlp.c_proj"


@pytest.fixture
def edited(tmp_path: Path, tiny_gpt2: Path) -> dict[str, str]:
    """A base, a merged checkpoint and the delta of one large shift, and a delta that is half of it."""
    dense = 3 * torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    shift, half = (Shift({MODULE: ModuleShift(IN_OUT, dense=scale * dense)}) for scale in (1.0, 0.5))
    manifest = {"base": {"name": "b", "fingerprint": fingerprint(tiny_gpt2)}}
    write_merged(tmp_path / "merged", tiny_gpt2, shift, manifest, card="", force=False)
    write_delta(tmp_path / "delta", shift, manifest, card="", force=False)
    write_delta(tmp_path / "half", half, manifest, card="", force=False)
    shutil.copytree(tiny_gpt2, tmp_path / "copy")
    return {"base": str(tiny_gpt2)} | {name: str(tmp_path / name) for name in ("merged", "delta", "half", "copy")}


@pytest.mark.parametrize(
    ("a", "b", "options", "code"),
    [
        ("base", "copy", [], 0),
        ("base", "copy", ["--exit-code"], 0),
        ("base", "merged", [], 0),
        ("base", "merged", ["--exit-code"], 1),
        ("base", "delta", ["--exit-code"], 1),
        ("delta", "delta", ["--exit-code"], 0),
        ("delta", "half", ["--exit-code"], 1),
        ("delta", "base", [], 4),
        ("merged", "delta", [], 4),
        ("base", "nowhere", [], 4),
        ("delta", "half", ["--facts", "{facts}"], 2),
        ("base", "merged", ["--facts", "nowhere.jsonl"], 3),
        ("base", "merged", ["--batch-size", "0"], 2),
    ],
)
def test_exit_codes(
    edited: dict[str, str], facts_file: Path, a: str, b: str, options: list[str], code: int, tmp_path: Path
) -> None:
    """T28."""
    edited["nowhere"] = str(tmp_path / "nowhere")
    options = [option.format(facts=facts_file) for option in options]
    assert main(["diff", edited[a], edited[b], *options]) == code


@pytest.mark.parametrize(
    ("a", "b", "kind", "changes"),
    [
        ("base", "copy", "checkpoints", []),
        ("base", "merged", "checkpoints", ["changed"]),
        ("base", "delta", "base_and_delta", ["changed"]),
        ("half", "delta", "deltas", ["changed"]),
        ("base", "altered", "checkpoints", ["missing", "retyped", "added", "reshaped"]),
    ],
)
def test_documents_of_every_kind_are_the_schema_s(
    edited: dict[str, str], a: str, b: str, kind: str, changes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if b == "altered":
        alter(Path(edited["copy"]))
        edited[b] = edited["copy"]
    assert main(["diff", edited[a], edited[b], "--json", "-q"]) == 0
    document = valid(capsys.readouterr().out)
    assert (document["kind"], document["different"]) == (kind, bool(changes))
    assert sorted(change["kind"] for change in document["changes"]) == sorted(changes)


@pytest.mark.parametrize("change", [{"more": 1}, {"kind": "models"}, {"same": -1}, {"answers": {"asked": 3}}])
def test_the_schema_refuses_other_documents(
    edited: dict[str, str], change: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["diff", edited["half"], edited["delta"], "--json", "-q"])
    document = valid(capsys.readouterr().out) | change
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(running.schema("diff")).validate(document)


@pytest.mark.parametrize(
    ("a", "b", "kind"),
    [("base", "merged", "checkpoints"), ("base", "delta", "base_and_delta"), ("half",) * 2 + ("deltas",)],
)
def test_dry_run_finds_both_sides_and_stops(
    edited: dict[str, str],
    a: str,
    b: str,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import malmen_cli.compare

    monkeypatch.setattr(malmen_cli.compare, "compare", None)
    assert main(["diff", edited[a], edited[b], "--dry-run", "--json", "--exit-code"]) == 0
    printed = capsys.readouterr()
    document = valid(printed.out)
    assert document == {
        "schema": 1, "dry_run": True, "a": edited[a], "b": edited[b], "kind": kind, "facts": 0
    }  # fmt: skip
    assert printed.err == f"would compare {edited[a]} with {edited[b]} ({kind.replace('_', ' ')})\n"


def test_dry_run_reads_the_facts(edited: dict[str, str], facts_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", edited["base"], edited["copy"], "--dry-run", "--json", "--facts", str(facts_file)]) == 0
    printed = capsys.readouterr()
    assert valid(printed.out)["facts"] == 4
    assert "and their answers to 4 facts" in printed.err


@pytest.mark.parametrize(("a", "b"), [("base", "nowhere"), ("delta", "base")])
def test_dry_run_refuses_what_the_run_would(edited: dict[str, str], a: str, b: str) -> None:
    assert main(["diff", edited[a], edited.get(b, "./nowhere"), "--dry-run"]) == 4


def test_the_document_and_nothing_else_on_stdout(edited: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """T29."""
    assert main(["diff", edited["base"], edited["delta"], "--json", "-q"]) == 0
    captured = capsys.readouterr()
    document = valid(captured.out)
    assert document["kind"] == "base_and_delta"
    assert [change["name"] for change in document["changes"]] == [f"{MODULE}.weight"]
    assert captured.err == ""


def test_the_table(edited: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """T30: on stderr, no escape codes off a terminal."""
    assert main(["diff", edited["base"], edited["merged"]]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "\x1b" not in captured.err
    assert "1 tensor differs, " in captured.err
    assert f"{MODULE}.weight" in captured.err


def test_the_table_of_two_deltas(edited: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Half a shift and the whole: relative norm 1, cosine 1."""
    main(["diff", edited["half"], edited["delta"]])
    header, row, count = capsys.readouterr().err.strip().splitlines()
    assert header.split() == ["module", "change", "relative", "largest", "rank99", "stable", "rank", "cosine"]
    cells = row.split()
    assert (cells[0], cells[1], cells[2], cells[-1]) == (MODULE, "changed", "1", "1")
    assert count == "1 module differs, 0 are the same"


def test_no_difference_is_said(edited: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["diff", edited["base"], edited["copy"]])
    assert "no difference: " in capsys.readouterr().err


def alter(folder: Path) -> None:
    """One tensor more, one less, one in bf16, one a row shorter."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    tensors["new[bold]"] = torch.zeros(())
    del tensors[names[0]]
    tensors[names[1]] = tensors[names[1]].bfloat16()
    tensors[f"{MODULE}.weight"] = tensors[f"{MODULE}.weight"][:-1].clone()
    save_file(tensors, folder / "model.safetensors")


def test_added_missing_reshaped_and_retyped_in_the_table(
    edited: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    alter(Path(edited["copy"]))
    main(["diff", edited["base"], edited["copy"]])
    told = capsys.readouterr().err
    for text in ("new[bold]", "added", "missing", "F32 to BF16", "reshaped 64x32 to 63x32", "4 tensors differ"):
        assert text in told


def answers(a: str, b: str, facts: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["diff", a, b, "--facts", str(facts), "--json", "--exit-code"]) in (0, 1)
    return dict(valid(capsys.readouterr().out)["answers"])


def test_answers_of_merged_and_of_delta_are_the_same(
    edited: dict[str, str], facts_file: Path, fact_records: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    merged = answers(edited["base"], edited["merged"], facts_file, capsys)
    assert merged == answers(edited["base"], edited["delta"], facts_file, capsys)
    extras = ("rephrases", "locality", "portability")
    assert merged["asked"] == sum(1 + sum(len(record.get(key, ())) for key in extras) for record in fact_records)
    assert 0 < len(merged["changed"]) <= merged["asked"]
    assert all(answer["a"] != answer["b"] for answer in merged["changed"])
    assert {answer["kind"] for answer in merged["changed"]} <= {"prompt", "rephrase", "locality", "portability"}


def test_equal_models_answer_alike(
    edited: dict[str, str], facts_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answers(edited["base"], edited["copy"], facts_file, capsys)["changed"] == []


def test_the_table_of_answers(edited: dict[str, str], facts_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["diff", edited["base"], edited["merged"], "--facts", str(facts_file)])
    told = capsys.readouterr().err
    assert "answers differ" in told
    assert "au-capital" in told


def test_the_first_model_is_gone_before_the_second_is_loaded(
    edited: dict[str, str], facts_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never two models in memory."""
    import weakref

    from malmen_cli.base import model

    loaded: list[weakref.ref[Any]] = []
    original: Callable[..., Any] = model.load_base

    def watched(*arguments: Any, **options: Any) -> Any:
        assert [reference() for reference in loaded] == [None] * len(loaded)
        base = original(*arguments, **options)
        loaded.append(weakref.ref(base.model))
        return base

    monkeypatch.setattr(model, "load_base", watched)
    assert main(["diff", edited["base"], edited["merged"], "--facts", str(facts_file)]) == 0
    assert len(loaded) == 2
