"""Configs and side files of strangers: their sizes are judged before anything is built by them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from malmen_cli.base.config import MAX_CONFIG_BYTES, MAX_SIDE_BYTES, check_sizes, read_config
from malmen_cli.exceptions import CheckpointError


def folder_with(folder: Path, config: str = "{}") -> Path:
    (folder / "config.json").write_text(config, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("name", "size"),
    [("config.json", 1 << 30), ("tokenizer.json", 1 << 40), ("tokenizer_config.json", MAX_SIDE_BYTES + 1),
     ("vocab.txt", 1 << 30), ("chat_template.jinja", 1 << 30), ("config.json", MAX_CONFIG_BYTES + 1)],
)  # fmt: skip
def test_a_file_too_large_is_not_opened(tmp_path: Path, name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse, so that the file takes no room here; a read of it would be seen."""
    folder_with(tmp_path)
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, size)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(CheckpointError, match=rf"{name}: {size:,} bytes, more than"):
        read_config(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", "{" * 100_000, '{"a": ' * 100_000, '{"a": NaN}', '{"a":1,"a":2}'])
def test_no_configuration(tmp_path: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match="not a model configuration"):
        read_config(folder_with(tmp_path, text))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_hidden_layers": 10**9},
        {"n_layer": 13},
        {"num_layers": -2},
        {"num_decoder_layers": 13},
        {"text_config": {"num_hidden_layers": 500}},
    ],
)
def test_more_layers_than_tensors(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="which its 12 tensors cannot hold"):
        check_sizes(tmp_path, settings, 12)


@pytest.mark.parametrize(
    "settings",
    [
        {"vocab_size": 2**60},
        {"hidden_size": 2**28},
        {"n_positions": 10**12},
        {"max_position_embeddings": 10**12},
        {"num_attention_heads": 2**40},
        {"num_local_experts": 10**9},
        {"head_dim": -5},
    ],
)
def test_sizes_that_no_checkpoint_has(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="which no checkpoint has"):
        check_sizes(tmp_path, settings, 12)


@pytest.mark.parametrize(
    "settings",
    [
        {"vision_feature_layer": -2},
        {"depthwise_separable_out_channel": 1024},
        {"max_length": 10**9},
        {"label2id": {"size": 10**9, "depth": -7}},
    ],
)
def test_numbers_that_are_no_sizes(tmp_path: Path, settings: dict[str, Any]) -> None:
    check_sizes(tmp_path, settings, 12)


def test_what_transformers_does_not_open_may_be_of_any_size_or_nowhere(tmp_path: Path) -> None:
    folder_with(tmp_path)
    for name in ("corpus.txt", "trainer_state.json", "train.json"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 1 << 40)
    (tmp_path / "merges.txt").symlink_to("nowhere")
    assert read_config(tmp_path) == {}


def test_sizes_of_honest_checkpoints(tmp_path: Path, tiny_model_factory: Callable[..., Path]) -> None:
    """Large published ones, by the numbers in their configs; pad_token_id and window are -1 in some."""
    llama4 = {"max_position_embeddings": 10_485_760, "vocab_size": 202_048, "num_hidden_layers": 48}
    check_sizes(tmp_path, llama4 | {"pad_token_id": -1, "rope_theta": 10**9, "sliding_window": -1}, 1061)
    for family in ("gpt2", "llama"):
        folder = tiny_model_factory(family)
        check_sizes(folder, json.loads((folder / "config.json").read_text()), 20)
