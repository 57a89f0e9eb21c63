"""A base checkpoint loaded and ready to run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from malmen_cli.base.locate import locate
from malmen_cli.base.weights import fingerprint
from malmen_cli.exceptions import CheckpointError

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
# Causal masks and rotary tables that older releases saved beside the weights (the hub's GPT-2, GPT-J and Pythia).
_OLD_BUFFER = re.compile(r"\b(attn|attention)\.(bias|masked_bias)$|\brotary_emb\.inv_freq$")


@dataclass(frozen=True)
class Base:
    """A loaded language model with its tokenizer and identity.

    `name` is what the user typed, `folder` where its safetensors lie. The model is in eval mode and its
    parameters do not require gradients.
    """

    name: str
    folder: Path
    revision: str | None
    fingerprint: str
    model: Any
    tokenizer: Any

    @property
    def device(self) -> torch.device:
        parameter: nn.Parameter = next(self.model.parameters())
        return parameter.device

    @property
    def room(self) -> int | None:
        """The most tokens the model reads at once, where its config says so."""
        room = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return int(room) if room is not None else None

    @property
    def dtype(self) -> torch.dtype:
        parameter: nn.Parameter = next(self.model.parameters())
        return parameter.dtype


def pick_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU."""
    if device == "auto":
        # Of several ranks, each has a device of its own (see ranks.joined).
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        picked = torch.device(device)
        torch.ones(1, device=picked).item()  # a device that cannot give a value back (meta) is no use
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(f"--device {device}: not available here ({str(error).splitlines()[0]})") from None
    return picked


def exact_sums() -> None:
    """fp32 products in fp32, not TF32, and those of half precision summed in fp32: the CPU and CUDA then agree."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def load_base(
    name: str,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Base:
    """Load a hub id, folder, `.gguf` file or built-in alias as a causal language model.

    dtype: `auto` keeps the checkpoint's, else a torch dtype's name. Raises CheckpointError.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if dtype not in DTYPES:
        raise CheckpointError(f"--dtype {dtype}: not one of {', '.join(DTYPES)}")
    place = pick_device(device)
    exact_sums()
    found = locate(name, revision=revision)
    identity = fingerprint(found.folder)
    options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(found.folder, **options)
        model, report = AutoModelForCausalLM.from_pretrained(
            found.folder,
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
        tokenizer = AutoTokenizer.from_pretrained(found.folder, **options)
    except MemoryError:
        raise
    except Exception as error:  # tokenizers raises a bare Exception, and a config may divide transformers by zero
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(f"{name}: transformers cannot load it: {reason}") from error
    _refuse_incomplete(name, report)
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise CheckpointError(f"{name}: its tokenizer has no tokens; copy the tokenizer's files into the folder")
    model = model.to(place).eval().requires_grad_(False)
    return Base(name, found.folder, found.revision, identity, model, tokenizer)


@contextmanager
def logits_at(
    model: Any, rows: Tensor, columns: Tensor, *, states: Tensor | None = None
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Have the output embeddings see only the hidden states at (rows, columns), or only the given `states` (n, width).

    They are narrowed in front of the head, so whatever the model's forward does to logits (soft caps, scales)
    still applies. Yields a function from the forward's logits to (n, vocabulary); where the head was
    not called as a module, it picks from the full logits.
    """
    narrowed = False

    def narrow(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal narrowed
        hidden, *others = inputs
        narrowed = True
        picked = hidden[rows.to(hidden.device), columns.to(hidden.device)] if states is None else states.to(hidden)
        return picked[None], *others  # (B, T, width) -> (1, n, width)

    def gather(logits: Tensor) -> Tensor:
        return logits[0] if narrowed else logits[rows.to(logits.device), columns.to(logits.device)]

    head = model.get_output_embeddings()
    # In front of every other hook, so that those see the narrowed states too.
    handle = head.register_forward_pre_hook(narrow, prepend=True) if isinstance(head, nn.Module) else None
    try:
        yield gather
    finally:
        if handle is not None:
            handle.remove()


def _refuse_incomplete(name: str, report: dict[str, Any]) -> None:
    """transformers fills missing tensors with noise and ignores extra ones: neither may pass for the base."""
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        keys = sorted(str(key) for key in report.get(kind) or () if not _OLD_BUFFER.search(str(key)))
        if keys:
            words = kind.removesuffix("_keys")
            raise CheckpointError(
                f"{name}: {len(keys)} {words} tensors, the first {keys[0]}; the checkpoint is not whole"
            )
