"""A base checkpoint loaded and ready to run."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from malmen_cli.base import ranks
from malmen_cli.base.families import CLASSIFIER, kind_of
from malmen_cli.base.locate import locate
from malmen_cli.base.precision import faster_on_cpu
from malmen_cli.base.tasks import Task, task_of
from malmen_cli.base.weights import fingerprint, stored_dtype
from malmen_cli.exceptions import CheckpointError

ALL = "all"  # --device: one model over all CUDA devices, whole blocks on each, placed by accelerate
LEFT_TO_WEIGHTS = 0.8  # of each device's free memory; the rest is for what runs and for the editor
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
# Causal masks and rotary tables that older releases saved beside the weights (the hub's GPT-2, GPT-J and Pythia).
# So are BERT's position numbers.
_OLD_BUFFER = re.compile(r"\b(attn|attention)\.(bias|masked_bias)$|\brotary_emb\.inv_freq$|embeddings\.position_ids$")


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
    stored: torch.dtype | None = None  # in which its weights are loaded, or lie there, whatever they are computed in

    @property
    def device(self) -> torch.device:
        """Where prompts go in and everything but the model's own blocks is computed: that of the embeddings, where the
        model is spread over several."""
        parameter: nn.Parameter = next(self.model.parameters())
        return parameter.device

    @cached_property
    def task(self) -> Task:
        """How the model is asked and how it answers."""
        return task_of(self.model, self.tokenizer)

    @property
    def room(self) -> int | None:
        """The most tokens the model reads at once, where its config says so; 0 and -1 are some families' word for no
        limit."""
        room = int(getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 0)
        return room - _skipped_positions(self.model) if room > 0 else None

    def record(self) -> dict[str, Any]:
        """What a manifest says of it."""
        who = {"name": self.name, "revision": self.revision, "fingerprint": self.fingerprint}
        return who | {"dtype": str(self.dtype).removeprefix("torch.")} | self.task.record()

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


def _placing(device: str) -> dict[str, Any]:
    """What `from_pretrained` is told of the device. Raises CheckpointError."""
    if device != ALL:
        return {}
    count = torch.cuda.device_count()
    if count < 1:
        raise CheckpointError(f"--device {ALL}: there is no CUDA device here")
    if ranks.count() > 1:
        raise CheckpointError(f"--device {ALL}: each of several processes has a device of its own; run one process")
    if importlib.util.find_spec("accelerate") is None:
        raise CheckpointError(f"--device {ALL}: accelerate places a model on several devices; pip install accelerate")
    room = {number: int(LEFT_TO_WEIGHTS * torch.cuda.mem_get_info(number)[0]) for number in range(count)}
    return {"device_map": "auto", "max_memory": room}


def _refuse_offloaded(name: str, model: Any) -> None:
    """What accelerate keeps in host memory or on the disk cannot be edited in place."""
    outside = [part for part, place in getattr(model, "hf_device_map", {}).items() if place in ("cpu", "disk")]
    if outside:
        raise CheckpointError(
            f"{name}: its weights do not fit on the CUDA devices here: {len(outside)} parts of it are left over, the "
            f"first {outside[0]}; try a smaller --dtype, more devices, or --device cpu"
        )


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
    note: Callable[[str], None] | None = None,
) -> Base:
    """Load a hub id, folder, `.gguf` file or built-in alias as what its config says it is: a causal language model, an
    encoder-decoder, or a sequence classifier.

    device: `auto`, a torch device, or `all` for one model over all CUDA devices. dtype: a torch dtype's name, or
    `auto`, which keeps the checkpoint's unless that is a half in which this CPU is slow (see precision.py); `note` is
    then told. Raises CheckpointError.
    """
    from transformers import AutoConfig, AutoTokenizer

    if dtype not in DTYPES:
        raise CheckpointError(f"--dtype {dtype}: not one of {', '.join(DTYPES)}")
    spread = _placing(device)
    place = None if spread else pick_device(device)
    exact_sums()
    found = locate(name, revision=revision)
    identity = fingerprint(found.folder)
    options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(found.folder, **options)
        model, report = _auto_class(name, config).from_pretrained(
            found.folder,
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
            **spread,
            **options,
        )
        tokenizer = AutoTokenizer.from_pretrained(found.folder, **options)
    except (MemoryError, CheckpointError):
        raise
    except Exception as error:  # tokenizers raises a bare Exception, and a config may divide transformers by zero
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(f"{name}: transformers cannot load it: {reason}") from error
    _refuse_incomplete(name, model, report)
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise CheckpointError(f"{name}: its tokenizer has no tokens; copy the tokenizer's files into the folder")
    _refuse_offloaded(name, model)
    stored = model.dtype if dtype == "auto" else stored_dtype(found.folder)
    if dtype == "auto" and place is not None and place.type == "cpu":
        model = _in_faster_type(model, note)
    model = (model if place is None else model.to(place)).eval().requires_grad_(False)
    return Base(name, found.folder, found.revision, identity, model, tokenizer, stored)


def _in_faster_type(model: Any, note: Callable[[str], None] | None) -> Any:
    """In the type that this CPU is faster in, which `note` is told of; left alone where that is its own, since parts
    that transformers keeps in float32 would become halves."""
    own = model.dtype
    faster = faster_on_cpu(own, model.num_parameters())
    if faster == own:
        return model
    if note is not None:
        half = str(own).removeprefix("torch.")
        note(f"computed in float32, as this CPU is slow in the checkpoint's type; --dtype {half} keeps that")
    return model.to(faster)


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
        picked = logits[0] if narrowed else logits[rows.to(logits.device), columns.to(logits.device)]
        return picked.to(rows.device)

    head = model.get_output_embeddings()
    # In front of every other hook, so that those see the narrowed states too.
    handle = head.register_forward_pre_hook(narrow, prepend=True) if isinstance(head, nn.Module) else None
    try:
        yield gather
    finally:
        if handle is not None:
            handle.remove()


def _skipped_positions(model: Any) -> int:
    """Positions that no token has: RoBERTa counts from behind its padding index."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings"):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def _auto_class(name: str, config: Any) -> Any:
    """The transformers class that loads the checkpoint. Raises CheckpointError for one without a head that answers."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    classes = tuple(str(each) for each in getattr(config, "architectures", None) or ())
    paired = bool(getattr(config, "is_encoder_decoder", False))
    if any(each.endswith("ForSequenceClassification") for each in classes):
        if paired:
            raise CheckpointError(
                f"{name}: {classes[0]} classifies with a decoder; only encoders that do can be edited"
            )
        return AutoModelForSequenceClassification
    if paired:
        return AutoModelForSeq2SeqLM
    decodes = any(each.endswith(("ForCausalLM", "LMHeadModel")) for each in classes)
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decodes:
        what = classes[0] if classes else f"model of type {config.model_type}"
        raise CheckpointError(
            f"{name}: a {what} has no classification head, so it can say nothing of a fact; "
            "fit one with AutoModelForSequenceClassification and pass that checkpoint"
        )
    return AutoModelForCausalLM


def _refuse_incomplete(name: str, model: Any, report: dict[str, Any]) -> None:
    """transformers fills missing tensors with noise and ignores extra ones: neither may pass for the base."""
    body = f"{model.base_model_prefix}."
    heads = sorted(str(key) for key in report.get("missing_keys") or () if not str(key).startswith(body))
    if heads and kind_of(model) == CLASSIFIER:
        raise CheckpointError(f"{name}: its classification head is missing ({heads[0]}); fit one and save it with it")
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        keys = sorted(str(key) for key in report.get(kind) or () if not _OLD_BUFFER.search(str(key)))
        if keys:
            words = kind.removesuffix("_keys")
            raise CheckpointError(
                f"{name}: {len(keys)} {words} tensors, the first {keys[0]}; the checkpoint is not whole"
            )
