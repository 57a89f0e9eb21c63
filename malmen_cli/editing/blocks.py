"""Getting between the blocks of a loaded model: leaving one out, looking at what it reads or gives, changing it; and
how they attend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

SHORT = 64  # tokens up to which written-out attention is the faster one with gradients on a CPU (benchmarks/RESULTS.md)


@contextmanager
def written_out(model: Any) -> Iterator[None]:
    """Let a model attend by plain products and a softmax where it would by PyTorch's fused attention.

    On a CPU the fused one's backward of 16 tokens takes ten times as long in bfloat16, half as long again in float32.
    It is the faster one, and the smaller, for long texts. A model that cannot be told how to attend is left alone.
    """
    told = getattr(type(model), "_can_set_attn_implementation", bool)()  # else transformers warns at every forward
    if not told or getattr(model.config, "_attn_implementation", None) != "sdpa":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


def swap_input(states: Tensor, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if args:
        return (states, *args[1:]), kwargs
    return args, kwargs | {"hidden_states": states}


def change_output(change: Callable[[Tensor], Tensor], module: nn.Module, args: Any, output: Any) -> Any:
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


@contextmanager
def passing(block: nn.Module, extras: int, given: list[Any]) -> Iterator[None]:
    """Let a block return its input unchanged, in the form its own forward uses: alone (-1), or with `extras` more,
    those of the last output in `given` if there is one.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        if extras < 0:
            return states
        return (states, *(given[-1][1:] if given else [None] * extras))

    own = vars(block).get("forward")  # set by whoever wrapped this block before us
    block.forward = forward
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own


@contextmanager
def watch_input(block: nn.Module, seen: list[Tensor]) -> Iterator[None]:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).detach())

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def watch_output(module: nn.Module, seen: list[Any]) -> Iterator[list[Any]]:
    handle = module.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()
        seen.clear()
