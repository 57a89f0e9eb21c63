"""Cards: front matter the hub accepts, and nothing of the machine they were written on."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from malmen_cli.artifact.card import editor_card, model_card

MANIFEST: dict[str, Any] = {
    "base": {"name": "org/model", "revision": "abc", "fingerprint": "f" * 64},
    "method": {"name": "malmen", "lambda": 0.1},
    "editor": {"sha256": "e" * 64},
    "facts": {"sha256": "d" * 64, "count": 12},
    "modules": {"model.layers.0.mlp.down_proj": {}},
    "seed": 3,
}


def front(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    return dict(yaml.safe_load(card.split("---\n")[1]))


@pytest.mark.parametrize(("format", "library"), [("merged", "transformers"), ("adapter", "peft"), ("delta", "malmen")])
def test_says_what_was_changed_and_how_to_load_it(format: str, library: str) -> None:
    card = model_card(format, MANIFEST)
    assert front(card)["base_model"] == "org/model"
    assert front(card)["library_name"] == library
    assert "malmen" in front(card)["tags"]
    for told in (
        "facts: 12",
        "d" * 64,
        "`model.layers.0.mlp.down_proj`",
        'lambda=0.1, name="malmen"',
        "seed: 3",
        "e" * 64,
    ):
        assert told in card
    assert ("not needed to use it" in card) == (format != "delta")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/users/somebody/models/mine", "mine"),
        ("./mine", "mine"),
        ("~/mine", "mine"),
        ("a/b/mine", "mine"),
        ("x/model.gguf", "model.gguf"),
        ("gpt2", "gpt2"),
        ("org/model", "org/model"),
        ('odd": [name', 'odd": [name'),
        ("/", "unnamed"),
        (None, "unnamed"),
    ],
)
def test_folders_of_this_machine_are_not_told(name: str | None, shown: str) -> None:
    card = model_card("merged", {"base": {"name": name}})
    assert front(card)["base_model"] == shown
    assert "somebody" not in card


def test_an_editors_card() -> None:
    card = editor_card({"base": MANIFEST["base"], "steps": 100, "method": "malmen", "settings": {"x": 1}})
    assert front(card)["base_model"] == "org/model"
    assert "- method: malmen\n- steps: 100" in card
    assert 'malmen apply "org/model" facts.jsonl' in card


def test_an_editors_card_lists_what_it_was_made_from_and_how_it_scored() -> None:
    card = editor_card(
        {
            "base": MANIFEST["base"],
            "facts": {"sha256": "a" * 64, "count": 12, "sources": ["train.jsonl", "more.jsonl"]},
            "validation_facts": {"sha256": "b" * 64, "count": 3, "sources": []},
            "settings": {"rank": 4, "tokens": "subject", "modules": None},
            "training": {"steps": 5, "facts_per_step": [4, 8]},
            "scores": {"score": 0.5, "saved": {"es_greedy": 0.5, "ls_greedy": None}, "at": [{"step": 5}]},
            "files": {"editor.safetensors": "c" * 64},
        }
    )
    lines = [line for line in card.splitlines() if line.startswith("- ")]
    assert lines[-7:] == [
        f"- fingerprint: {'f' * 64}",
        f"- facts: 12 of train.jsonl, more.jsonl, sha256 {'a' * 64}",
        f"- validation facts: 3 of unnamed files, sha256 {'b' * 64}",
        '- settings: modules=null, rank=4, tokens="subject"',
        "- training: facts_per_step=[4, 8], steps=5",
        "- validation scores: es_greedy=0.5, ls_greedy=null",
        f"- sha256 of editor.safetensors: {'c' * 64}",
    ]


def test_an_empty_manifest_makes_a_card() -> None:
    assert front(model_card("delta", {}))["base_model"] == "unnamed"
    assert front(editor_card({}))["library_name"] == "malmen"
