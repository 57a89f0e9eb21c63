"""Every command in README.md works as it stands, on a model built here (T32)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from malmen_cli.cli.errors import EXIT_CODES

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
ALIAS = "smollm2-135m"
BLOCK = re.compile(r"^(<!-- ci -->\n)?```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [match[2] for match in BLOCK.finditer(README) if match[1] is None]
CI = next(match[2] for match in BLOCK.finditer(README) if match[1] is not None)


@pytest.fixture
def project(tmp_path: Path, fact_records: list[dict[str, Any]]) -> Path:
    """A folder with what the README's commands name, and `malmen` on the way to it."""
    (tmp_path / "edit_specs").mkdir()
    shutil.copy(REPOSITORY / "edit_specs" / "corrections.yaml", tmp_path / "edit_specs")
    lines = [
        {**record, "id": f"{record['id']}-{n}", "prompt": f"In {n}: {record['prompt']}", "subject": f"{n}"}
        for n in range(8)
        for record in fact_records
    ]
    for name, part in (("train.jsonl", lines[8:]), ("valid.jsonl", lines[:8])):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in part))
    folder = tmp_path / "bin"
    folder.mkdir()
    shim = folder / "malmen"
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m malmen_cli "$@"\n')
    shim.chmod(0o755)
    return tmp_path


def run(script: str, project: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PATH": f"{project / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "MALMEN_HOME": str(project / "home"),
    }
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=project,
        env=environment | variables,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_every_command_of_the_readme_in_order(project: Path, tiny_gpt2: Path) -> None:
    """Some twelve processes, each of which imports torch. Training is cut to two steps, nothing else is changed."""
    for block in BLOCKS:
        script = block.replace(ALIAS, str(tiny_gpt2))
        script = re.sub(r"(malmen train-editor .*)", r"\1 --steps 2 --facts-per-step 4", script)
        done = run(script, project)
        assert done.returncode == 0, f"{script}\n{done.stderr}"
    for output in ("edited", "delta", "adapter", "inserted", "better"):
        assert (project / output / "malmen.json").is_file(), output
    assert not (project / "elsewhere").exists()


@pytest.mark.slow
def test_the_ci_script_leaves_its_artifacts_and_passes(project: Path, tiny_gpt2: Path, facts_file: Path) -> None:
    """Four processes, each of which imports torch."""
    done = run(CI, project, BASE=str(tiny_gpt2), FACTS=str(facts_file), MIN_ES="0", MIN_LS="0")
    assert done.returncode == 0, done.stderr
    difference = json.loads((project / "diff.json").read_text())
    assert difference["schema"] == 1
    scores = json.loads((project / "eval.json").read_text())
    assert scores["facts"] == 4
    assert all(gate["passed"] for gate in scores["gates"])
    assert (project / "answers.jsonl").read_text().count("\n") > 4


@pytest.mark.slow
def test_the_ci_script_fails_when_a_gate_does(project: Path, tiny_gpt2: Path, facts_file: Path) -> None:
    """The gate's own code reaches the shell, and the artifacts are there to look at."""
    script = CI.replace("malmen apply", "cp -r $BASE edited #")  # nothing is edited: ES cannot be 1
    done = run(script, project, BASE=str(tiny_gpt2), FACTS=str(facts_file), MIN_ES="1")
    assert done.returncode == 1, done.stderr
    assert (project / "diff.json").is_file()
    assert json.loads((project / "eval.json").read_text())["gates"][0]["passed"] is False


def test_the_exit_codes_of_the_readme_are_the_program_s() -> None:
    table = README.partition("| exit code | |")[2]
    documented = [int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)]
    assert documented == sorted({0, 1, 70, *EXIT_CODES.values()})


def test_the_fact_shown_in_the_readme_is_one(tmp_path: Path) -> None:
    from malmen_cli.facts.files import read_facts

    shown = re.search(r"^```json\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert shown is not None
    path = tmp_path / "facts.jsonl"
    path.write_text(shown[1])
    (fact,) = read_facts(str(path)).facts
    assert fact.target == "Canberra"


def test_links_to_files_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (REPOSITORY / link).exists()] == []
