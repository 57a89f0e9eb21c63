"""Which matrices are edited: found by type and shape in every family, or named by patterns."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from malmen_cli.base.families import (
    block_index,
    block_list,
    chosen_modules,
    default_modules,
    edited_blocks,
    is_leaf,
    matrix_shape,
)
from malmen_cli.exceptions import SpecError

SECOND_MATRIX = {
    "gpt2": ("transformer.h", "mlp.c_proj"),
    "gptj": ("transformer.h", "mlp.fc_out"),
    "gpt_neox": ("gpt_neox.layers", "mlp.dense_4h_to_h"),
    "opt": ("model.decoder.layers", "fc2"),
    "llama": ("model.layers", "mlp.down_proj"),
    "mistral": ("model.layers", "mlp.down_proj"),
    "qwen2": ("model.layers", "mlp.down_proj"),
    "qwen3": ("model.layers", "mlp.down_proj"),
    "gemma": ("model.layers", "mlp.down_proj"),
    "phi": ("model.layers", "mlp.fc2"),
}


@pytest.fixture(scope="session")
def model(tiny_model_factory) -> Callable:
    from transformers import AutoModelForCausalLM

    loaded: dict[str, nn.Module] = {}

    def load(family: str, **options) -> nn.Module:
        folder = str(tiny_model_factory(family, **options))
        if folder not in loaded:
            loaded[folder] = AutoModelForCausalLM.from_pretrained(folder)
        return loaded[folder]

    return load


class Block(nn.Module):
    def __init__(self, **leaves: nn.Module) -> None:
        super().__init__()
        for name, leaf in leaves.items():
            self.add_module(name, leaf)


def toy(blocks: list[nn.Module], depth: int | None = None, hidden_size: int | None = 8) -> nn.Module:
    """A model of our own with the few things that are asked of one."""
    found = nn.Module()
    found.words = nn.Embedding(10, 8)
    found.get_input_embeddings = lambda: found.words
    found.experts = nn.ModuleList([nn.LayerNorm(8) for _ in blocks])  # as long as the model is deep, without a matrix
    found.blocks = nn.ModuleList(blocks)
    text = SimpleNamespace(num_hidden_layers=len(blocks) if depth is None else depth)
    if hidden_size is not None:
        text.hidden_size = hidden_size
    found.config = SimpleNamespace(get_text_config=lambda: text)
    return found


# ---------------------------------------------------------------- leaves


def test_leaves_are_linear_and_conv1d() -> None:
    assert is_leaf(nn.Linear(2, 3))
    assert is_leaf(Conv1D(3, 2))
    assert not is_leaf(nn.Embedding(2, 3))
    assert not is_leaf(nn.Sequential(nn.Linear(2, 3)))


@pytest.mark.parametrize(("dk", "dv"), [(2, 3), (3, 2), (4, 4)])
def test_shapes_are_input_by_output_whatever_the_storage(dk: int, dv: int) -> None:
    for module in (nn.Linear(dk, dv), Conv1D(dv, dk)):
        assert matrix_shape(module) == (dk, dv)
        assert module(torch.zeros(1, dk)).shape == (1, dv)


# ---------------------------------------------------------------- the blocks


@pytest.mark.parametrize("family", sorted(SECOND_MATRIX))
def test_blocks_and_default_modules_of_every_family(model: Callable, family: str) -> None:
    prefix, leaf = SECOND_MATRIX[family]
    name, blocks = block_list(model(family))
    assert (name, len(blocks)) == (prefix, 2)
    assert default_modules(model(family)) == [f"{prefix}.1.{leaf}"]
    assert default_modules(model(family), 1) == [f"{prefix}.1.{leaf}"]
    assert default_modules(model(family), 2) == [f"{prefix}.0.{leaf}", f"{prefix}.1.{leaf}"]
    assert chosen_modules(model(family), None) == default_modules(model(family))
    assert chosen_modules(model(family), None, 2) == default_modules(model(family), 2)
    assert [block_index(model(family), n) for n in default_modules(model(family), 2)] == [0, 1]


@pytest.mark.parametrize("family", sorted(SECOND_MATRIX))
def test_a_square_mlp_is_not_mistaken_for_attention(model: Callable, family: str) -> None:
    prefix, leaf = SECOND_MATRIX[family]
    assert default_modules(model(family, mlp=32), 1) == [f"{prefix}.1.{leaf}"]


@pytest.mark.parametrize(("last", "first"), [(1, 11), (6, 6), (12, 0), (99, 0)])
def test_the_last_blocks_come_in_the_model_s_order(last: int, first: int) -> None:
    found = toy([Block(up=nn.Linear(8, 16), down=nn.Linear(16, 8)) for _ in range(12)])
    assert default_modules(found, last) == [f"blocks.{i}.down" for i in range(first, 12)]


def test_the_widest_input_counts_before_the_order() -> None:
    block = Block(down=nn.Linear(16, 8), out=nn.Linear(8, 8), up=nn.Linear(32, 16))
    assert default_modules(toy([block]), 1) == ["blocks.0.down"]


@pytest.mark.parametrize("patterns", [None, ()])
def test_blocks_at_a_share_of_the_depth_are_the_default(patterns: tuple[str, ...] | None) -> None:
    found = toy([Block(down=nn.Linear(16, 8)) for _ in range(12)])
    assert default_modules(found) == [f"blocks.{i}.down" for i in range(7, 11)]
    assert chosen_modules(found, patterns) == default_modules(found)


@pytest.mark.parametrize(
    ("depth", "first", "last"),
    [(1, 0, 0), (2, 1, 1), (3, 2, 2), (4, 2, 3), (12, 7, 10), (28, 17, 25), (30, 18, 27), (32, 19, 29), (44, 26, 40)],
)
def test_the_blocks_of_a_depth(depth: int, first: int, last: int) -> None:
    assert list(edited_blocks(depth)) == list(range(first, last + 1))


@pytest.mark.parametrize(("last_blocks", "first"), [(1, 29), (6, 24), (30, 0), (99, 0)])
def test_the_last_blocks_go_before_the_share_of_the_depth(last_blocks: int, first: int) -> None:
    assert list(edited_blocks(30, last_blocks)) == list(range(first, 30))


def test_no_depth_leaves_nothing_to_edit() -> None:
    for depth in range(1, 101):
        blocks = edited_blocks(depth)
        assert len(blocks) >= 1
        assert 0 <= blocks[0] <= blocks[-1] < depth


def test_a_list_without_matrices_is_no_block_list() -> None:
    assert block_list(toy([Block(down=nn.Linear(16, 8)) for _ in range(3)]))[0] == "blocks"


def test_the_width_falls_back_to_the_embeddings() -> None:
    blocks = [Block(up=nn.Linear(8, 16), down=nn.Linear(16, 8), out=nn.Linear(32, 4)) for _ in range(2)]
    assert default_modules(toy(blocks, hidden_size=None), 1) == ["blocks.1.down"]


@pytest.mark.parametrize("depth", [4, 0])
def test_no_list_of_the_model_s_depth(depth: int) -> None:
    with pytest.raises(SpecError, match=f"no list of {depth} transformer blocks in a Module; it cannot be edited"):
        block_list(toy([Block(down=nn.Linear(16, 8)) for _ in range(3)], depth=depth))


@pytest.mark.parametrize(("groups", "shared"), [(1, True), (3, False)])
def test_layers_that_share_their_weights_are_refused_with_the_reason(groups: int, shared: bool) -> None:
    sizes = {"vocab_size": 16, "embedding_size": 8, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.AlbertConfig(**sizes, num_hidden_layers=3, num_hidden_groups=groups)
    model = transformers.AlbertForSequenceClassification(config)
    if not shared:
        assert len(block_list(model)[1]) == 3
        return
    said = (
        "the 3 layers of AlbertForSequenceClassification share the weights of 1: a shift for one would be made in all"
    )
    with pytest.raises(SpecError, match=said):
        block_list(model)


def test_a_block_that_writes_nothing_asks_for_names() -> None:
    with pytest.raises(SpecError, match=r"block blocks.1 has no matrix that writes .* name `modules` in a spec"):
        default_modules(toy([Block(a=nn.Linear(8, 8)), Block(a=nn.Linear(8, 9))]), 1)


# ---------------------------------------------------------------- patterns


@pytest.mark.parametrize(
    ("patterns", "wanted"),
    [
        (["transformer.h.1.mlp.c_proj"], ["transformer.h.1.mlp.c_proj"]),
        (["*.mlp.c_proj"], ["transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"]),
        (["*.1.mlp.*", "*.1.attn.c_proj"], [f"transformer.h.1.{n}" for n in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")]),
        (["*.1.mlp.c_proj", "*.0.mlp.c_fc"], ["transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_proj"]),
        (["*.h.[1-9].mlp.c_proj"], ["transformer.h.1.mlp.c_proj"]),
        (["*.1.mlp.c_proj", "*.h.1.*proj"], ["transformer.h.1.attn.c_proj", "transformer.h.1.mlp.c_proj"]),
    ],
)
def test_patterns_choose_in_the_model_s_order_without_doubles(
    model: Callable, patterns: list[str], wanted: list[str]
) -> None:
    assert chosen_modules(model("gpt2"), patterns) == wanted


@pytest.mark.parametrize("pattern", ["lm_head", "*.wte", "*.ln_1", "*.mlp", "transformer.h.7.*", "C_PROJ", ""])
def test_a_pattern_that_matches_nothing_to_edit(model: Callable, pattern: str) -> None:
    with pytest.raises(SpecError, match=r"modules: .* matches no Linear .* for example transformer.h.1.mlp.c_proj"):
        chosen_modules(model("gpt2"), ["*.mlp.c_proj", pattern])


@pytest.mark.parametrize("block", [0, 9, 11])
def test_block_index_reads_the_whole_number(block: int) -> None:
    found = toy([Block(down=nn.Linear(16, 8)) for _ in range(12)])
    assert block_index(found, f"blocks.{block}.down") == block


@pytest.mark.parametrize("name", ["words", "blocks", "blocksmith.1.down"])
def test_a_module_outside_the_blocks_has_no_index(name: str) -> None:
    with pytest.raises(SpecError, match=f"{name} is in no block of blocks"):
        block_index(toy([Block(down=nn.Linear(16, 8))]), name)
