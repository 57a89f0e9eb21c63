"""Settings from plain data: every key known, every value of its type and in range."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from malmen_cli.editing.settings import ROUNDS, MalmenSettings, above_zero, at_least, from_mapping
from malmen_cli.exceptions import SpecError


@dataclass(frozen=True)
class Sample:
    must: int
    rate: float = 1.0
    flag: bool = False
    word: str = "a"
    kind: Literal["x", "y"] = "x"
    names: tuple[str, ...] | None = None
    pair: tuple[float, float] = (0.0, 1.0)
    made: tuple[int, ...] = field(default_factory=lambda: (1,))

    def __post_init__(self) -> None:
        at_least(self, 0, "must")
        above_zero(self, "rate")


def test_defaults_are_the_dataclass_s_own() -> None:
    assert from_mapping(MalmenSettings, {}, "settings") == MalmenSettings()
    assert from_mapping(Sample, {"must": 1}, "settings") == Sample(1)


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("rate", 2, 2.0),
        ("rate", 2.5, 2.5),
        ("flag", True, True),
        ("word", "no", "no"),
        ("kind", "y", "y"),
        ("names", None, None),
        ("names", ["a", "b*"], ("a", "b*")),
        ("names", ("a",), ("a",)),
        ("pair", [0, 0.5], (0.0, 0.5)),
        ("made", [], ()),
    ],
)
def test_values_of_the_right_type(key: str, value: Any, wanted: Any) -> None:
    found = getattr(from_mapping(Sample, {"must": 0, key: value}, "settings"), key)
    assert found == wanted
    assert type(found) is type(wanted)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("must", "1", "spec.must: expected int, not '1'"),
        ("must", 1.0, "spec.must: expected int, not 1.0"),
        ("must", True, "spec.must: expected int, not True"),
        ("must", None, "spec.must: expected int, not None"),
        ("must", -1, "spec.must: must be at least 0, not -1"),
        ("rate", "1e-6", "spec.rate: expected float, not '1e-6'"),
        ("rate", False, "spec.rate: expected float, not False"),
        ("rate", 0, "spec.rate: must be above 0, not 0.0"),
        ("flag", 1, "spec.flag: expected bool, not 1"),
        ("flag", "yes", "spec.flag: expected bool, not 'yes'"),
        ("word", 3, "spec.word: expected str, not 3"),
        ("kind", "z", "spec.kind: 'z' is not one of x, y"),
        ("kind", ["x"], r"spec.kind: \['x'\] is not one of x, y"),
        ("names", "h.*", r"spec.names: expected a list of str, not 'h.\*'"),
        ("names", ["a", 1], r"spec.names\[1\]: expected str, not 1"),
        ("pair", [1.0], r"spec.pair: expected a list of float, not \[1.0\]"),
        ("rate", float("nan"), "spec.rate: .*nan"),
        ("rate", float("inf"), "spec.rate: .*inf"),
        ("pair", [0.0, float("inf")], r"spec.pair\[1\]: .*inf"),
    ],
)
def test_values_of_the_wrong_type_or_range(key: str, value: Any, message: str) -> None:
    with pytest.raises(SpecError, match=f"^{message}$"):
        from_mapping(Sample, {"must": 1, key: value}, "spec")


@pytest.mark.parametrize("tokens", ["answer", "subject", "all"])
def test_rows_may_be_taken_at_these_tokens(tokens: str) -> None:
    assert from_mapping(MalmenSettings, {"tokens": tokens}, "s").tokens == tokens
    assert MalmenSettings().tokens == "subject"


def test_a_missing_setting() -> None:
    with pytest.raises(SpecError, match=r"^spec: must is missing$"):
        from_mapping(Sample, {}, "spec")


def test_a_misspelt_setting_gets_the_nearest_one() -> None:
    with pytest.raises(SpecError, match=r"^my.yaml: unknown setting 'last_block'; did you mean 'last_blocks'\?$"):
        from_mapping(MalmenSettings, {"last_block": 3}, "my.yaml")


@pytest.mark.parametrize("key", ["zzzzzz", 7])
def test_an_unknown_setting_gets_the_known_ones(key: Any) -> None:
    with pytest.raises(SpecError, match=r"unknown setting .*; known: modules, last_blocks, "):
        from_mapping(MalmenSettings, {key: 3}, "my.yaml")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("last_blocks", 0),
        ("rank", 0),
        ("blocks", -1),
        ("preserved_rank", -1),
        ("preserved_weight", -0.5),
        ("ridge_lambda", 0.0),
        ("ridge_lambda", -1.0),
        ("aggregation", "mean"),
        ("network", "cnn"),
        ("tokens", "prompt"),
        ("tokens", None),
        ("preserved_weight", float("nan")),
    ],
)
def test_malmen_s_settings_have_ranges(key: str, value: Any) -> None:
    with pytest.raises(SpecError, match=rf"^s\.{key}: "):
        from_mapping(MalmenSettings, {key: value}, "s")


@pytest.mark.parametrize(("rounds", "network", "passes"), [(1, "mlp", 1), (5, "mlp", 5), (2, "identity", 2)])
def test_facts_are_gone_over_as_often_as_asked(rounds: int | None, network: str, passes: int) -> None:
    assert from_mapping(MalmenSettings, {"rounds": rounds, "network": network}, "s").passes == passes


def test_facts_are_gone_over_again_but_with_mend_s_sum() -> None:
    assert MalmenSettings().passes == MalmenSettings(network="identity").passes == ROUNDS > 1
    assert MalmenSettings(aggregation="sum").passes == 1
    assert MalmenSettings(aggregation="sum", rounds=2).passes == 2
    with pytest.raises(SpecError, match="rounds: must be at least 1, not 0"):
        MalmenSettings(rounds=0)


@pytest.mark.parametrize(("key", "value"), [("preserved_rank", 0), ("preserved_weight", 0), ("blocks", 0)])
def test_zero_switches_a_part_off(key: str, value: int) -> None:
    assert getattr(from_mapping(MalmenSettings, {key: value}, "s"), key) == 0
