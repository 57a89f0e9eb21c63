"""Every file in edit_specs/ loads: specs through read_spec, fact files through read_facts."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from malmen_cli.editing.settings import FinetuneSettings, MemitSettings, from_mapping
from malmen_cli.editing.spec import KEYS, FinetuneSpec, MemitSpec, Spec, read_spec
from malmen_cli.facts.files import read_facts
from malmen_cli.training.settings import TrainingSettings

FOLDER = Path(__file__).resolve().parents[1] / "edit_specs"
FILES = sorted(path for path in FOLDER.rglob("*") if path.is_file())


def is_spec(path: Path) -> bool:
    return path.suffix == ".yaml" and isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


SPECS = [path for path in FILES if is_spec(path)]
FACTS = [path for path in FILES if not is_spec(path) or "facts" in yaml.safe_load(path.read_text(encoding="utf-8"))]


def test_there_are_both() -> None:
    assert SPECS
    assert FACTS


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.name)
def test_specs_load_whole(path: Path) -> None:
    spec = read_spec(path)
    if isinstance(spec, Spec):
        from_mapping(TrainingSettings, spec.training, str(path))
    assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) <= set(KEYS)


def test_finetune_s_spec_has_every_setting_at_its_default() -> None:
    text = (FOLDER / "finetune.yaml").read_text(encoding="utf-8")
    assert read_spec(FOLDER / "finetune.yaml") == FinetuneSpec(source=str(FOLDER / "finetune.yaml"))
    assert list(yaml.safe_load(text)["settings"]) == [field.name for field in fields(FinetuneSettings)]
    settings = text.partition("settings:\n")[2]
    assert all(" # " in line or line.strip() == "lr: 0.001" for line in settings.splitlines())


def test_memit_s_spec_has_every_setting_at_its_default() -> None:
    text = (FOLDER / "memit.yaml").read_text(encoding="utf-8")
    assert read_spec(FOLDER / "memit.yaml") == MemitSpec(source=str(FOLDER / "memit.yaml"))
    assert list(yaml.safe_load(text)["settings"]) == [field.name for field in fields(MemitSettings)]


@pytest.mark.parametrize(("name", "constraint"), [("rome", "equality"), ("alphaedit", "null_space")])
def test_memit_s_kin_have_specs(name: str, constraint: str) -> None:
    spec = read_spec(FOLDER / f"{name}.yaml")
    assert isinstance(spec, MemitSpec)
    assert (spec.method, spec.settings.constraint) == (name, constraint)


@pytest.mark.parametrize(
    ("name", "blocks", "depth"),
    [
        ("gpt2-xl", range(13, 18), 48),
        ("gptj", range(3, 9), 28),
        ("llama3-8b", range(4, 9), 32),
        ("qwen2.5-7b", range(4, 9), 28),
        ("smollm2-135m", range(4, 9), 30),
    ],
)
def test_memit_s_family_specs(name: str, blocks: range, depth: int) -> None:
    path = FOLDER / "memit" / f"{name}.yaml"
    spec = read_spec(path)
    assert isinstance(spec, MemitSpec)
    assert spec.method == "memit"
    assert spec.settings.blocks == tuple(blocks)
    assert max(blocks) < depth - 1
    assert spec.settings.prefixes == (0 if depth == 30 else 5)  # as published, where something was
    assert path.read_text(encoding="utf-8").count(f"--spec edit_specs/memit/{name}.yaml") == 2


def test_every_family_spec_of_memit_is_tested() -> None:
    found = sorted(path.stem for path in (FOLDER / "memit").iterdir())
    assert found == ["gpt2-xl", "gptj", "llama3-8b", "qwen2.5-7b", "smollm2-135m"]


@pytest.mark.parametrize("path", FACTS, ids=lambda path: path.name)
def test_fact_files_load_and_bring_what_training_and_scoring_need(path: Path) -> None:
    facts = read_facts(str(path)).facts
    assert len(facts) >= 8
    assert all(fact.subject and fact.rephrases and fact.locality for fact in facts)
    assert len({fact.id for fact in facts}) == len(facts)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_else_lies_there(path: Path) -> None:
    assert path in SPECS or path in FACTS
    assert "\t" not in path.read_text(encoding="utf-8")
