"""Where a model can be edited: its stacks of transformer blocks and the matrices in them.

They are found by type and shape, never by model name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


CAUSAL, SEQ2SEQ, CLASSIFIER = "causal_lm", "seq2seq_lm", "classifier"
IDS, SOURCE = "ids", "source"  # what a stack reads: see prompts.Encoded


def kind_of(model: Any) -> str:
    """CAUSAL, SEQ2SEQ or CLASSIFIER: what the model answers with."""
    if type(model).__name__.endswith("ForSequenceClassification"):
        return CLASSIFIER
    return SEQ2SEQ if getattr(model.config, "is_encoder_decoder", False) else CAUSAL


@dataclass(frozen=True)
class Stack:
    """Transformer blocks that run one after the other over one sequence of tokens."""

    prefix: str
    blocks: nn.ModuleList
    reads: str  # IDS or SOURCE

    def holds(self, module: str) -> bool:
        """Whether a module of that dotted name lies in one of the blocks."""
        return module.startswith(self.prefix + ".")


def stacks(model: Any) -> tuple[Stack, ...]:
    """The model's stacks in the order in which they run: one, or an encoder-decoder's two. Raises SpecError."""
    kind, config = kind_of(model), model.config
    if kind != SEQ2SEQ:
        depth = getattr(config.get_text_config(), "num_hidden_layers", None)
        _refuse_shared(model, depth)
        return (Stack(*_block_list(model, "", depth, type(model).__name__), SOURCE if kind == CLASSIFIER else IDS),)
    names = {id(module): name for name, module in model.named_modules()}
    found = []
    for part, reads in ((model.get_encoder(), SOURCE), (model.get_decoder(), IDS)):
        depths = (
            ("encoder_layers", "num_hidden_layers") if reads == SOURCE else ("decoder_layers", "num_decoder_layers")
        )
        depth = next((getattr(config, name) for name in depths if hasattr(config, name)), None)
        found.append(Stack(*_block_list(part, names[id(part)] + ".", depth, type(model).__name__), reads))
    return tuple(found)


def _refuse_shared(model: Any, depth: int | None) -> None:
    """ALBERT's layers run the same few blocks over and over."""
    own = getattr(model.config, "num_hidden_groups", depth)
    if own != depth:
        raise SpecError(
            f"the {depth} layers of {type(model).__name__} share the weights of {own}: "
            "a shift for one would be made in all; it cannot be edited"
        )


def _block_list(part: Any, prefix: str, depth: int | None, model: str) -> tuple[str, nn.ModuleList]:
    for name, module in part.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == depth
            and any(is_leaf(leaf) for leaf in module[0].modules())
        ):
            return prefix + name, module
    raise SpecError(f"no list of {depth} transformer blocks in a {model}; it cannot be edited")


def block_list(model: Any) -> tuple[str, nn.ModuleList]:
    """The dotted name and the list of the blocks that give the answer: a decoder's, where there is one.

    It is the ModuleList as long as the config says the model is deep. Raises SpecError where there is none.
    """
    last = stacks(model)[-1]
    return last.prefix, last.blocks


def edited_blocks(depth: int, last_blocks: int | None = None) -> range:
    """The blocks edited by default: the last `last_blocks`, or those of FIRST_EDITED and LAST_SPARED."""
    if last_blocks is not None:
        return range(max(0, depth - last_blocks), depth)
    return range(min(round(FIRST_EDITED * depth), depth - 1), depth - int(LAST_SPARED * depth))


def default_modules(model: Any, last_blocks: int | None = None) -> list[str]:
    """The second MLP matrix of each block that is edited by default, first stack and block first."""
    return [
        second_matrix(model, stack, index)
        for stack in stacks(model)
        for index in edited_blocks(len(stack.blocks), last_blocks)
    ]


def second_matrix(model: Any, stack: Stack, index: int) -> str:
    """The second MLP matrix of a block: the leaf that writes to the residual stream (its output is as wide as the
    model) from the widest input; the later one of equals, since blocks define attention before the MLP.
    """
    width = model.get_input_embeddings().embedding_dim
    width = getattr(model.config.get_text_config(), "hidden_size", width)
    leaves = [(name, matrix_shape(leaf)) for name, leaf in stack.blocks[index].named_modules() if is_leaf(leaf)]
    writers = [(dk, order, name) for order, (name, (dk, dv)) in enumerate(leaves) if dv == width]
    if not writers:
        raise SpecError(
            f"block {stack.prefix}.{index} has no matrix that writes to the residual stream; name `modules` in a spec"
        )
    return f"{stack.prefix}.{index}.{max(writers)[2]}"


def chosen_modules(model: Any, patterns: Sequence[str] | None, last_blocks: int | None = None) -> list[str]:
    """The modules that a spec's `modules` patterns name (shell wildcards on dotted names), in the order they run.

    Raises SpecError for a pattern that matches nothing or nothing that can be edited.
    """
    if not patterns:
        return default_modules(model, last_blocks)
    found = stacks(model)
    leaves = [
        name for stack in found for name, module in model.named_modules() if is_leaf(module) and stack.holds(name)
    ]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in leaves):
            where = " or ".join(stack.prefix for stack in found)
            raise SpecError(f"modules: {pattern!r} matches no Linear or Conv1D in {where}; for example {leaves[-1]}")
    return [name for name in leaves if any(fnmatchcase(name, pattern) for pattern in patterns)]


def stack_of(model: Any, module: str) -> Stack:
    """The stack that a module lies in. Raises SpecError for one outside."""
    found = stacks(model)
    for stack in found:
        index = module.removeprefix(stack.prefix + ".").split(".")[0]
        if stack.holds(module) and index.isdecimal():
            return stack
    raise SpecError(f"{module} is in no block of {' or '.join(stack.prefix for stack in found)}")


def block_index(model: Any, module: str) -> int:
    """Which block a module lies in, counted in the order they run: an encoder's first. Raises SpecError for one
    outside."""
    mine = stack_of(model, module)
    before = 0
    for stack in stacks(model):
        if stack.prefix == mine.prefix:
            break
        before += len(stack.blocks)
    return before + int(module.removeprefix(mine.prefix + ".").split(".")[0])
