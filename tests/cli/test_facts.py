"""`malmen facts check` and `malmen facts convert`, whole output (T23, T29, T30)."""

from __future__ import annotations

import io
import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
from running import valid

from malmen_cli.cli.errors import main
from malmen_cli.facts.files import read_facts

MISTAKES = [
    '{"prompt": "P%d is", "target": ""}',
    '{"prompt": "", "target": "T%d"}',
    '{"prompt": "P%d is"}',
    '{"prompt": "P%d is", "target": 12}',
    '{"prompt": "P%d is", "target": "T", "rephrase": ["unknown key"]}',
]


def set_stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_check_says_what_is_in_the_file(facts_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["facts", "check", str(facts_file)]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    first, fields, tags = err.splitlines()
    assert first.startswith(f"{facts_file}: 4 facts (")
    assert first.endswith("), no mistakes")
    assert (
        fields
        == "  3 with subject, 2 with old target, 3 with rephrases, 3 with locality, 1 with portability, 2 with tags"
    )
    assert tags == "  tags: geo 1, people 1"


def test_check_json_is_the_committed_schema_and_nothing_else(
    facts_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["facts", "check", "--json", "-q", str(facts_file)]) == 0
    out, err = capsys.readouterr()
    document = valid("facts_check", out)
    assert err == ""
    assert document["count"] == 4
    assert document["with"]["rephrases"] == 3
    assert document["sha256"] == read_facts(str(facts_file)).sha256


def test_check_counts_no_more_tags_than_a_person_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([{"prompt": "A is", "target": "b", "tags": [f"tag{n}" for n in range(10)]}]))
    assert main(["facts", "check", str(path)]) == 0
    assert capsys.readouterr().err.endswith("tag7 1 and 2 more\n")


def test_check_of_bare_facts_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text('{"prompt": "A is", "target": "b"}\n')
    assert main(["facts", "check", str(path)]) == 0
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("command", ["check", "convert"])
def test_a_dash_reads_standard_input(
    command: str, facts_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["facts", command, "-q", str(facts_file)]) == 0
    from_file = capsys.readouterr()
    set_stdin(monkeypatch, facts_file.read_bytes())
    assert main(["facts", command, "-q", "-"]) == 0
    assert capsys.readouterr() == from_file


@pytest.mark.parametrize("argv", [["check", "--json"], ["convert"], ["convert", "-o", "out.jsonl"]], ids=" ".join)
def test_of_25_mistakes_20_are_shown_and_nothing_is_written(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [MISTAKES[n % 5].replace("%d", str(n)) for n in range(25)]
    Path("facts.jsonl").write_text("\n".join(lines) + "\n")
    assert main(["facts", argv[0], "facts.jsonl", *argv[1:]]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    shown = err.splitlines()
    assert [line.split(":")[:2] for line in shown[:20]] == [["facts.jsonl", str(n)] for n in range(1, 21)]
    assert shown[20:] == ["... and 5 more", "malmen: error: 25 problems, nothing was written"]
    assert os.listdir() == ["facts.jsonl"]


def test_convert_prints_canonical_lines(
    facts_file: Path, fact_records: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["facts", "convert", str(facts_file)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.endswith("}\n")
    assert [json.loads(line) for line in out.splitlines()] == fact_records


def test_convert_keeps_letters_and_control_characters_of_the_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"id": "x", "prompt": "日本の首都は\x9b\u2028", "target": "東京"}
    path = tmp_path / "facts.jsonl"
    path.write_text(json.dumps(record), encoding="utf-8")
    assert main(["facts", "convert", str(path)]) == 0
    assert json.loads(capsys.readouterr().out) == record


def test_converting_twice_changes_nothing(facts_file: Path, tmp_path: Path) -> None:
    once, twice = tmp_path / "once.jsonl", tmp_path / "twice.jsonl"
    assert main(["facts", "convert", str(facts_file), "-o", str(once), "-q"]) == 0
    assert main(["facts", "convert", str(once), "-o", str(twice), "-q"]) == 0
    assert once.read_bytes() == twice.read_bytes()


def test_convert_says_where_it_wrote(facts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    assert main(["facts", "convert", str(facts_file), "-o", str(out)]) == 0
    assert capsys.readouterr() == ("", f"{out}: 4 facts from {facts_file}\n")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(out.stat().st_mode) == 0o666 & ~umask
    assert sorted(os.listdir(tmp_path)) == ["facts.jsonl", "out.jsonl"]


def test_convert_json_says_what_was_written(
    facts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    assert main(["facts", "convert", str(facts_file), "-o", str(out), "--json", "-q"]) == 0
    read = read_facts(str(facts_file))
    assert valid("facts_convert", capsys.readouterr().out) == {
        "schema": 1,
        "source": str(facts_file),
        "sha256": read.sha256,
        "dialect": read.dialect,
        "count": 4,
        "output": str(out),
    }
    assert read_facts(str(out)).sha256 == read.sha256


@pytest.mark.parametrize("named", [True, False])
def test_convert_dry_run_writes_nothing(
    facts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], named: bool
) -> None:
    out = tmp_path / "out.jsonl"
    given = ["-o", str(out)] if named else []
    assert main(["facts", "convert", str(facts_file), *given, "--dry-run", "--json"]) == 0
    printed = capsys.readouterr()
    document = valid("facts_convert", printed.out)
    assert (document["dry_run"], document["count"]) == (True, 4)
    assert document["output"] == (str(out) if named else None)
    assert printed.err == f"would write 4 facts from {facts_file} to {out if named else 'stdout'}\n"
    assert os.listdir(tmp_path) == ["facts.jsonl"]
    assert main(["facts", "convert", str(facts_file), *given, "--dry-run"]) == 0
    assert capsys.readouterr().out == ""


def test_convert_dry_run_refuses_what_the_run_would(facts_file: Path) -> None:
    assert main(["facts", "convert", str(facts_file), "-o", str(facts_file), "--dry-run"]) == 6


def test_convert_json_and_the_facts_do_not_share_stdout(facts_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["facts", "convert", str(facts_file), "--json"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "-o FILE" in printed.err


def test_convert_replaces_a_file_only_with_force(
    facts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    assert main(["facts", "convert", str(facts_file), "-o", str(out)]) == 6
    assert "--force" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert main(["facts", "convert", str(facts_file), "-o", str(out), "--force"]) == 0
    assert out.read_text().count("\n") == 4


@pytest.mark.parametrize("out", [".", "absent/out.jsonl"])
def test_convert_refuses_a_folder_and_an_absent_one(
    out: str, facts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["facts", "convert", str(facts_file), "-o", out, "--force"]) == 6
    assert os.listdir() == ["facts.jsonl"]


def test_convert_reads_other_projects_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {"src": "Who wrote Hamlet?", "rephrase": "Hamlet's author?", "answers": ["Shakespeare"], "alt": "Marlowe"}
    record |= {"loc": "nq question: what is snow", "loc_ans": "white", "subject": "Hamlet", "pred": "Bacon"}
    path = tmp_path / "zsre.json"
    path.write_text(json.dumps([record]))
    assert main(["facts", "convert", str(path), "--dialect", "mend-zsre"]) == 0
    fact = json.loads(capsys.readouterr().out)
    assert fact["prompt"] == "Who wrote Hamlet?"
    assert fact["rephrases"] == ["Hamlet's author?"]


def test_an_unknown_dialect_is_exit_3_and_names_the_known(facts_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["facts", "check", str(facts_file), "--dialect", "klingon"]) == 3
    assert "klingon" in capsys.readouterr().err


def test_the_example_facts_are_well_formed() -> None:
    """edit_specs/corrections.yaml: twelve corrections, each with rephrases and two locality probes with answers."""
    examples = read_facts(str(Path(__file__).resolve().parents[2] / "edit_specs" / "corrections.yaml")).facts
    assert len(examples) == 12
    for fact in examples:
        assert fact.subject is not None
        assert any(fact.subject in text for text in (fact.prompt, *fact.rephrases))
        assert len(fact.rephrases) >= 2
        assert len(fact.locality) == 2
        assert all(probe.target for probe in fact.locality)
