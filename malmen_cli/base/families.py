"""Where a language model can be edited: its block list and the matrices in it.

They are found by type and shape, never by model name.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from malmen_cli.exceptions import SpecError

# Where facts are edited by default, as shares of the depth (docs/editor-recipe.md): below the first, little reaches the
# answer in one step; the last twelfth turns what is known into words and breaks other answers first.
FIRST_EDITED, LAST_SPARED = 0.6, 1 / 12


def is_leaf(module: nn.Module) -> bool:
    """A module whose input and output are plain tensors in every transformers release."""
    return isinstance(module, (nn.Linear, Conv1D))


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """(dk, dv): input and output width, by type, so that square weights are not guessed at."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    assert isinstance(module, Conv1D)
    return int(module.weight.shape[0]), int(module.nf)


def block_list(model: Any) -> tuple[str, nn.ModuleList]:
    """The dotted name and the list of the model's transformer blocks.

    It is the ModuleList as long as the config says the model is deep. Raises SpecError where there is none.
    """
    config = model.config.get_text_config()
    depth = getattr(config, "num_hidden_layers", None)
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == depth
            and any(is_leaf(leaf) for leaf in module[0].modules())
        ):
            return name, module
    raise SpecError(
        f"no list of {depth} transformer blocks in a {type(model).__name__}; only decoder-only models can be edited"
    )


def edited_blocks(depth: int, last_blocks: int | None = None) -> range:
    """The blocks edited by default: the last `last_blocks`, or those of FIRST_EDITED and LAST_SPARED."""
    if last_blocks is not None:
        return range(max(0, depth - last_blocks), depth)
    return range(min(round(FIRST_EDITED * depth), depth - 1), depth - int(LAST_SPARED * depth))


def default_modules(model: Any, last_blocks: int | None = None) -> list[str]:
    """The second MLP matrix of each block that is edited by default, first block first.

    In a block it is the leaf that writes to the residual stream (its output is as wide as the model) from the
    widest input; the later one of equals, since blocks define attention before the MLP.
    """
    prefix, blocks = block_list(model)
    width = model.get_input_embeddings().embedding_dim
    width = getattr(model.config.get_text_config(), "hidden_size", width)
    found = []
    for index in edited_blocks(len(blocks), last_blocks):
        leaves = [(name, matrix_shape(leaf)) for name, leaf in blocks[index].named_modules() if is_leaf(leaf)]
        writers = [(dk, order, name) for order, (name, (dk, dv)) in enumerate(leaves) if dv == width]
        if not writers:
            raise SpecError(
                f"block {prefix}.{index} has no matrix that writes to the residual stream; name `modules` in a spec"
            )
        found.append(f"{prefix}.{index}.{max(writers)[2]}")
    return found


def chosen_modules(model: Any, patterns: Sequence[str] | None, last_blocks: int | None = None) -> list[str]:
    """The modules that a spec's `modules` patterns name (shell wildcards on dotted names), in the model's order.

    Raises SpecError for a pattern that matches nothing or nothing that can be edited.
    """
    if not patterns:
        return default_modules(model, last_blocks)
    prefix, _ = block_list(model)
    leaves = [name for name, module in model.named_modules() if is_leaf(module) and name.startswith(prefix + ".")]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in leaves):
            raise SpecError(f"modules: {pattern!r} matches no Linear or Conv1D in {prefix}; for example {leaves[-1]}")
    return [name for name in leaves if any(fnmatchcase(name, pattern) for pattern in patterns)]


def block_index(model: Any, module: str) -> int:
    """Which block of the block list a module lies in. Raises SpecError for one outside."""
    prefix, _ = block_list(model)
    index = module.removeprefix(prefix + ".").split(".")[0]
    if not module.startswith(prefix + ".") or not index.isdecimal():
        raise SpecError(f"{module} is in no block of {prefix}")
    return int(index)
