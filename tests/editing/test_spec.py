"""Specs: what a YAML file and the command line say, checked whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from malmen_cli.editing.settings import FinetuneSettings, MalmenSettings, MemitSettings
from malmen_cli.editing.spec import FinetuneSpec, MemitSpec, Spec, read_editor_spec, read_spec
from malmen_cli.exceptions import SpecError


def written(folder: Path, text: str) -> Path:
    path = folder / "spec.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults() -> None:
    assert read_spec(None) == Spec("malmen", MalmenSettings(), {}, "settings", method_given=False)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("malmen", MalmenSettings()),
        ("mend", MalmenSettings(aggregation="sum")),
        ("identity", MalmenSettings(network="identity")),
    ],
)
def test_methods_are_presets(method: str, expected: MalmenSettings) -> None:
    found = read_spec(None, method=method)
    assert (found.method, found.settings, found.method_given) == (method, expected, True)


def test_a_file(tmp_path: Path) -> None:
    text = """
        method: mend
        settings: {last_blocks: 3, modules: ["*.mlp.*"], ridge_lambda: 2}
        training: {steps: 10}
        facts: [{prompt: a, target: b}]
    """
    path = written(tmp_path, text)
    found = read_spec(path)
    assert found.method == "mend"
    assert found.method_given
    expected = MalmenSettings(last_blocks=3, modules=("*.mlp.*",), ridge_lambda=2.0, aggregation="sum")
    assert found.settings == expected
    assert found.training == {"steps": 10}
    assert found.source == str(path)


def test_finetune_has_settings_of_its_own(tmp_path: Path) -> None:
    assert read_spec(None, method="finetune") == FinetuneSpec(source="settings")
    path = written(
        tmp_path, "method: finetune\nsettings: {block: 3, lr: 1}\ntraining:\nfacts: [{prompt: a, target: b}]"
    )
    assert read_spec(path) == FinetuneSpec("finetune", FinetuneSettings(block=3, lr=1.0), str(path))


@pytest.mark.parametrize(
    ("method", "constraint"), [("memit", "least_squares"), ("rome", "equality"), ("alphaedit", "null_space")]
)
def test_memit_s_kin_are_one_class_of_settings(tmp_path: Path, method: str, constraint: str) -> None:
    assert read_spec(None, method=method) == MemitSpec(method, MemitSettings(constraint=constraint), "settings")
    path = written(tmp_path, f"method: {method}\nsettings: {{blocks: [3], lr: 1}}\n")
    wanted = MemitSettings(blocks=(3,), lr=1.0, constraint=constraint)
    assert read_spec(path) == MemitSpec(method, wanted, str(path))


@pytest.mark.parametrize("text", ["method: finetune", "method: finetune\nsettings: {rank: 4}", "settings: {rank: 4}"])
def test_an_editor_cannot_be_trained_for_a_method_without_one(tmp_path: Path, text: str) -> None:
    """Said first, whatever else is wrong: of the settings none would be right."""
    said = "^finetune needs no training; use it with: malmen apply BASE FACTS -o DIR --method finetune$"
    with pytest.raises(SpecError, match=said):
        read_editor_spec(written(tmp_path, text), method="finetune")
    with pytest.raises(SpecError, match=said):
        read_editor_spec(None, method="finetune")


def test_the_spec_of_an_editor_is_the_same(tmp_path: Path) -> None:
    path = written(tmp_path, "method: mend\nsettings: {rank: 4}\ntraining: {steps: 3}\n")
    assert read_editor_spec(path) == read_spec(path)
    assert read_editor_spec(None, method="identity") == read_spec(None, method="identity")


def test_the_command_line_s_method_counts_more(tmp_path: Path) -> None:
    found = read_spec(written(tmp_path, "method: mend\n"), method="identity")
    assert (found.method, found.settings.aggregation) == ("identity", "ridge")


@pytest.mark.parametrize("text", ["settings:\ntraining:\n", "{}", "method: malmen", "settings: {}"])
def test_empty_parts_are_defaults(tmp_path: Path, text: str) -> None:
    assert read_spec(written(tmp_path, text)).settings == MalmenSettings()


def test_only_what_names_a_method_gives_one(tmp_path: Path) -> None:
    assert not read_spec(written(tmp_path, "settings: {rank: 4}\n")).method_given


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("metod: mend", "unknown key 'metod'; a spec has method, settings, training, facts"),
        ("method: 3", "method must be a name, not 3"),
        ("method:", "method must be a name, not None"),
        ("method: mendd", "did you mean 'mend'"),
        ("method: rank-one", "known: malmen"),
        ("settings: 3", "settings must be a mapping of settings, not 3"),
        ("settings: false", "settings must be a mapping of settings, not False"),
        ("settings: []", "settings must be a mapping of settings, not []"),
        ("training: ''", "training must be a mapping of settings, not ''"),
        ("settings: {rnak: 4}", "did you mean 'rank'"),
        ("settings: {rank: four}", "settings.rank: expected int, not 'four'"),
        ("settings: {rank: 0}", "settings.rank: must be at least 1"),
        ("settings: {ridge_lambda: 0}", "ridge_lambda: must be above 0"),
        ("settings: {network: cnn}", "'cnn' is not one of mlp, identity"),
        ("settings: {modules: all}", "expected a list of str, not 'all'"),
        ("{method: mend, settings: {aggregation: ridge}}", "mend is malmen with aggregation: sum"),
        ("{method: identity, settings: {network: mlp}}", "identity is malmen with network: identity"),
        ("{method: finetune, settings: {rank: 4}}", "settings: unknown setting 'rank'"),
        ("{method: finetune, settings: {epoch: 4}}", "did you mean 'epochs'"),
        ("{method: finetune, training: {steps: 4}}", "training: finetune needs no training"),
        ("settings: {epochs: 4}", "unknown setting 'epochs'"),
        ("{method: memit, settings: {epochs: 4}}", "unknown setting 'epochs'"),
        ("{method: rome, training: {steps: 4}}", "training: rome needs no training"),
        ("{method: rome, settings: {constraint: null_space}}", "rome is memit with constraint: equality"),
        ("settings: {rank: 4, rank: 5}", "rank"),
        ("- method: mend", "a spec is a mapping with method, settings, training, facts"),
        ("", "holds no YAML document"),
        ("method: [", "spec.yaml"),
        ("method: !!python/object/apply:os.system [true]", "spec.yaml"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(SpecError) as caught:
        read_spec(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value) or "method '" in str(caught.value)


def test_a_preset_may_be_repeated(tmp_path: Path) -> None:
    assert read_spec(written(tmp_path, "{method: mend, settings: {aggregation: sum}}")).settings.aggregation == "sum"


@pytest.mark.parametrize("what", ["missing", "folder", "bytes"])
def test_files_that_cannot_be_read(tmp_path: Path, what: str) -> None:
    path = tmp_path if what == "folder" else tmp_path / "spec.yaml"
    if what == "bytes":
        path.write_bytes(b"method: \xff\xfe")
    with pytest.raises(SpecError, match="cannot be read"):
        read_spec(path)
