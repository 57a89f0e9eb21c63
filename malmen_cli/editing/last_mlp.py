"""The last block's MLP, run only at the tokens whose logits are wanted: nothing reads what it gives for the others.

Whether that is so of a model is asked of its gradients, which are exactly 0 where nothing is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from malmen_cli.base.families import Stack, second_matrix
from malmen_cli.base.memory import out_of_memory
from malmen_cli.exceptions import SpecError


def last_mlp(model: Any, stack: Stack) -> nn.Module | None:
    """The part of a stack's last block that has its second MLP matrix, if that is not the block itself."""
    try:
        matrix = second_matrix(model, stack, len(stack.blocks) - 1)
    except SpecError:
        return None
    part: nn.Module = model.get_submodule(matrix.rpartition(".")[0])
    return None if part is stack.blocks[-1] else part


def alone_at(part: nn.Module, shape: torch.Size, rows: Tensor, columns: Tensor, run: Callable[[], Tensor]) -> bool:
    """Whether the logits that `run()` gives depend on what `part` is given at (rows, columns) of (B, T) = `shape`
    alone, and `part` is run once, over all of (B, T, width) and nothing else. Where it mixes tokens, is one expert of
    several, or is read elsewhere too, it has to see every token."""
    given: list[Tensor] = []

    def leaf(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if len(args) != 1 or kwargs:
            raise ValueError("more than hidden states, or a name to them")
        states: Tensor = args[0]
        given.append(states.detach().requires_grad_(True))
        return (given[-1],), {}

    handle = part.register_forward_pre_hook(leaf, with_kwargs=True)
    try:
        with torch.enable_grad():
            logits = run()
            if len(given) != 1 or given[0].dim() != 3 or given[0].shape[:2] != shape:
                return False
            (gradient,) = torch.autograd.grad(logits.float().square().sum(), given)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        if out_of_memory(error):
            raise
        return False
    finally:
        handle.remove()
    places = rows.to(gradient.device), columns.to(gradient.device)
    read = bool(gradient[places].any())
    return read and not bool(gradient.index_put(places, torch.zeros_like(gradient[places])).any())


@contextmanager
def only_at(part: nn.Module, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """Have a part of a block that treats every token by itself see those at (rows, columns) alone, and give 0 for the
    others of (B, T, width)."""
    shape: list[int] = []

    def narrow(module: nn.Module, args: Any) -> Any:
        states, *others = args
        shape[:] = states.shape[:-1]
        return states[rows.to(states.device), columns.to(states.device)][None], *others

    def widen(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        places = rows.to(output.device), columns.to(output.device)
        return output.new_zeros(*shape, output.shape[-1]).index_put(places, output[0])

    handles = [part.register_forward_pre_hook(narrow), part.register_forward_hook(widen)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
