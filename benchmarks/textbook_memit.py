"""MEMIT's search for a target as its paper writes it, one fact after the other: the yardstick of speed.py.

Every step of every fact is a forward of its prompts over all blocks, with logits of every token, and a backward to the
hidden state at the subject. Shares no code with malmen_cli.editing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, pad


class Prompt(Protocol):
    """A prompt and its answer: `ids[:n_prompt]` is the prompt, `subject` its subject's last token."""

    ids: tuple[int, ...]
    n_prompt: int
    subject: int | None


class Settings(Protocol):
    """Those of the search, by MEMIT's names."""

    steps: int
    lr: float
    clamp: float
    kl_factor: float
    decay: float
    stop_loss: float


def target(
    model: Any, block: nn.Module, contexts: Sequence[Prompt], essence: Prompt, settings: Settings
) -> tuple[Tensor, int]:
    """What to add behind `block` at the subject, (width,) fp32, and the steps of Adam taken.

    essence: a prompt whose next token's distribution should stay; its last token stands for nothing.
    """
    prompts = [*contexts, essence]
    device = next(model.parameters()).device
    width = max(len(prompt.ids) for prompt in prompts)
    ids = torch.stack([pad(torch.tensor(p.ids), (0, width - len(p.ids))) for p in prompts]).to(device)
    mask = torch.tensor([[1] * len(p.ids) + [0] * (width - len(p.ids)) for p in prompts], device=device)
    places = torch.arange(len(prompts), device=device), torch.tensor([p.subject for p in prompts], device=device)

    def run(delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits of every token in fp32, and the hidden states behind the block as they were."""
        with _added(block, places, delta) as seen:
            logits = model(ids, attention_mask=mask, use_cache=False).logits.float()
        return logits, seen[0]

    with torch.no_grad():
        logits, states = run(None)
        said = log_softmax(logits[-1, essence.n_prompt - 1], -1)
        hidden = states[0, contexts[0].subject].float()
    delta = torch.zeros_like(hidden, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=settings.lr)
    for step in range(settings.steps + 1):
        logits, _ = run(delta)
        losses = [
            cross_entropy(logits[row, p.n_prompt - 1 : len(p.ids) - 1], ids[row, p.n_prompt : len(p.ids)])
            for row, p in enumerate(contexts)
        ]
        learned = torch.stack(losses).mean()
        if float(learned.detach()) < settings.stop_loss or step == settings.steps:
            break
        changed = kl_div(log_softmax(logits[-1, essence.n_prompt - 1], -1), said, reduction="sum", log_target=True)
        far = delta.square().sum() / hidden.square().sum()
        adam.zero_grad()
        (learned + settings.kl_factor * changed + settings.decay * far).backward()
        adam.step()
        with torch.no_grad():
            delta *= (settings.clamp * hidden.norm() / delta.norm()).clamp(max=1)
    return delta.detach(), step


@contextmanager
def _added(block: nn.Module, places: tuple[Tensor, Tensor], delta: Tensor | None) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        seen.append(states.detach())
        if delta is None:
            return output
        rows = delta.to(states.dtype).expand(len(states), -1)
        moved = states.index_put(places, rows, accumulate=True)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    handle = block.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()
