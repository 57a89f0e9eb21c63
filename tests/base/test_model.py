"""Loading a base: what is taken as it is, and what is refused before it can pass for the base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import malmen_cli.base.model as model_module
from malmen_cli.base.model import load_base, pick_device
from malmen_cli.base.weights import fingerprint
from malmen_cli.exceptions import CheckpointError


@pytest.fixture
def copied(tmp_path: Path, tiny_model_factory) -> Callable[..., Path]:
    """`copied(family, change)`: a copy of a tiny checkpoint whose tensors went through `change`."""

    def copy(family: str, change: Callable[[dict[str, Tensor]], object] | None = None) -> Path:
        folder = tmp_path / family
        shutil.copytree(tiny_model_factory(family), folder)
        if change is not None:
            tensors = load_file(folder / "model.safetensors")
            change(tensors)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return copy


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_base_knows_what_it_is(tiny_model_factory, family: str) -> None:
    folder = tiny_model_factory(family)
    base = load_base(str(folder), device="cpu")
    assert (base.name, base.folder, base.revision) == (str(folder), folder, None)
    assert base.fingerprint == fingerprint(folder)
    assert (base.device, base.dtype) == (torch.device("cpu"), torch.float32)
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.tokenizer("Paris")["input_ids"]
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(base.model.state_dict()[name], tensor) for name, tensor in stored.items())


@pytest.mark.parametrize(
    ("stored", "asked", "wanted"),
    [
        ("bfloat16", "auto", torch.bfloat16),
        ("float32", "auto", torch.float32),
        ("bfloat16", "float32", torch.float32),
        ("float32", "float16", torch.float16),
    ],
)
def test_dtype_is_the_checkpoint_s_or_as_asked(
    tiny_model_factory, stored: str, asked: str, wanted: torch.dtype
) -> None:
    assert load_base(str(tiny_model_factory("gpt2", dtype=stored)), device="cpu", dtype=asked).dtype == wanted


@pytest.mark.parametrize("dtype", ["float33", "nn", "load", "int64", "", "Tensor"])
def test_a_dtype_that_is_none_is_refused(tiny_gpt2: Path, dtype: str) -> None:
    with pytest.raises(CheckpointError, match=r"^--dtype .*: not one of auto, float32"):
        load_base(str(tiny_gpt2), device="cpu", dtype=dtype)


def test_auto_picks_a_device_that_is_there() -> None:
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu") == torch.device("cpu")


def test_sums_are_exact_whatever_was_set_before(tiny_gpt2: Path) -> None:
    torch.set_float32_matmul_precision("medium")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    load_base(str(tiny_gpt2), device="cpu")
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction


@pytest.mark.parametrize(
    ("devices", "processes", "fault"),
    [
        (0, 1, "there is no CUDA device here"),
        (2, 2, "each of several processes has a device of its own; run one process"),
        (2, 1, "accelerate places a model on several devices; pip install accelerate"),
    ],
)
def test_all_devices_need_devices_one_process_and_accelerate(
    tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch, devices: int, processes: int, fault: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(model_module.ranks, "count", lambda: processes)
    monkeypatch.setattr(model_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=f"^--device all: {fault}$"):
        load_base(str(tiny_gpt2), device="all")


def test_all_devices_share_the_blocks_and_leave_room_for_what_runs(
    tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What transformers is asked for: there is no second device to see it done on."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: ((number + 1) * 1000, 5000))
    asked: dict[str, Any] = {}
    true = transformers.AutoModelForCausalLM.from_pretrained

    def loaded(folder: Path, **options: Any) -> Any:
        asked.update({name: options.pop(name) for name in ("device_map", "max_memory")})
        return true(folder, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loaded)
    base = load_base(str(tiny_gpt2), device="all")
    assert asked == {"device_map": "auto", "max_memory": {0: 800, 1: 1600}}
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_what_does_not_fit_on_all_devices_is_refused(
    tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """It could not be edited in place."""
    true = transformers.AutoModelForCausalLM.from_pretrained

    def loaded(folder: Path, **options: Any) -> Any:
        model, report = true(folder, **options)
        model.hf_device_map = {"transformer.wte": 0, "transformer.h.0": 1, "transformer.h.1": place, "lm_head": place}
        return model, report

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loaded)
    said = "do not fit on the CUDA devices here: 2 parts of it are left over, the first transformer.h.1"
    with pytest.raises(CheckpointError, match=said):
        load_base(str(tiny_gpt2), device="cpu")


@pytest.mark.parametrize("device", ["warp", "cuda:99", "cpu cpu", "", "meta"])
def test_a_device_that_is_not_there_is_refused(tiny_gpt2: Path, device: str) -> None:
    with pytest.raises(CheckpointError, match=f"--device {device}: not available here"):
        load_base(str(tiny_gpt2), device=device)


# ---------------------------------------------------------------- checkpoints that are not whole


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("gpt2", "transformer.h.1.mlp.c_proj.weight"),
        ("gpt2", "transformer.ln_f.bias"),
        ("llama", "model.layers.0.self_attn.q_proj.weight"),
        ("llama", "lm_head.weight"),
    ],
)
def test_a_missing_tensor_is_refused(copied: Callable[..., Path], family: str, name: str) -> None:
    folder = copied(family, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"1 missing tensors, the first {name}; the checkpoint is not whole"):
        load_base(str(folder), device="cpu")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_extra_tensor_is_refused(copied: Callable[..., Path], family: str) -> None:
    folder = copied(family, lambda tensors: tensors.update({"mystery.weight": torch.zeros(2), "a.b": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match="2 unexpected tensors, the first "):
        load_base(str(folder), device="cpu")


def test_a_tensor_of_another_shape_is_refused(copied: Callable[..., Path]) -> None:
    name = "transformer.h.1.mlp.c_proj.weight"
    folder = copied("gpt2", lambda tensors: tensors.update({name: torch.zeros(65, 32)}))
    with pytest.raises(CheckpointError, match=r"mismatched|size"):
        load_base(str(folder), device="cpu")


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.masked_bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt2", "transformer.h.1.attn.masked_bias"),
        ("gptj", "transformer.h.1.attn.bias"),
        ("gptj", "transformer.h.1.attn.masked_bias"),
    ],
)
def test_buffers_of_old_checkpoints_are_no_extra_tensors(copied: Callable[..., Path], family: str, name: str) -> None:
    """The hub's GPT-2, GPT-J and Pythia still carry causal masks and rotary tables."""
    folder = copied(family, lambda tensors: tensors.update({name: torch.zeros(1)}))
    assert load_base(str(folder), device="cpu").dtype == torch.float32


def test_the_layout_of_the_bare_model_is_accepted(copied: Callable[..., Path]) -> None:
    """GPT-2 on the hub names its tensors h.0..., without `transformer.` in front."""

    def bare(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    folder = copied("gpt2", bare)
    assert load_base(str(folder), device="cpu").model.transformer.h[1].mlp.c_proj.weight.shape == (64, 32)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "no-such-model"},
        {"model_type": "bert", "vocab_size": 10},
        {"n_layer": "two"},
        {"n_embd": 33},
    ],
)
def test_a_config_that_transformers_cannot_use_is_refused(copied: Callable[..., Path], config: dict) -> None:
    folder = copied("gpt2")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | config))
    with pytest.raises(CheckpointError, match="^" + str(folder)):
        load_base(str(folder), device="cpu")


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_broken_config_is_refused(copied: Callable[..., Path], text: str) -> None:
    folder = copied("gpt2")
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError):
        load_base(str(folder), device="cpu")


@pytest.mark.parametrize(
    ("family", "message"),
    [("llama", "cannot load it"), ("gpt2", "its tokenizer has no tokens")],
)
def test_a_checkpoint_without_tokenizer_is_refused(copied: Callable[..., Path], family: str, message: str) -> None:
    """transformers makes GPT-2 an empty tokenizer where there is none."""
    folder = copied(family)
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=message):
        load_base(str(folder), device="cpu")


def test_code_of_the_checkpoint_is_not_run(copied: Callable[..., Path]) -> None:
    folder = copied("gpt2")
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "mine", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(f"open({str(folder / 'touched')!r}, 'w')\n")
    with pytest.raises(CheckpointError):
        load_base(str(folder), device="cpu")
    assert not (folder / "touched").exists()
