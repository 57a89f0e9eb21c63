"""What a model is computed in on a CPU: what the CPU is faster in, and never another model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from several import on_ranks

from malmen_cli.artifact.merged import write_merged
from malmen_cli.base import precision
from malmen_cli.base.cache import cache_home
from malmen_cli.base.model import load_base
from malmen_cli.base.precision import faster_on_cpu, speedup_of_fp32
from malmen_cli.base.weights import stored_dtype
from malmen_cli.editing.shift import ModuleShift, Shift, applied, weight_layout

MODULE = "transformer.h.1.mlp.c_proj"


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are of what the others do without: see tests/conftest.py."""
    monkeypatch.setattr(precision, "speedup_of_fp32", speedup_of_fp32)


def slow_in_halves(monkeypatch: pytest.MonkeyPatch, speedup: float = 3.0) -> None:
    monkeypatch.setattr(precision, "_measure", lambda half: speedup)


@pytest.mark.parametrize(
    ("stored", "speedup", "wanted"),
    [
        (torch.bfloat16, 3.0, torch.float32),
        (torch.float16, 3.0, torch.float32),
        (torch.bfloat16, 1.1, torch.bfloat16),  # not worth twice the memory
        (torch.bfloat16, 0.4, torch.bfloat16),
        (torch.float32, 0.4, torch.float32),  # rounded to halves it would be another model
        (torch.float64, 3.0, torch.float64),
    ],
)
def test_the_faster_type_unless_it_rounds(
    monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, speedup: float, wanted: torch.dtype
) -> None:
    slow_in_halves(monkeypatch, speedup)
    assert faster_on_cpu(stored, 1000) == wanted


def test_a_model_without_room_for_float32_stays_half(monkeypatch: pytest.MonkeyPatch) -> None:
    slow_in_halves(monkeypatch)
    monkeypatch.setattr(precision, "_host_bytes", lambda: 16e9)
    assert faster_on_cpu(torch.bfloat16, 1_500_000_000) == torch.float32
    assert faster_on_cpu(torch.bfloat16, 1_700_000_000) == torch.bfloat16


def test_room_is_the_container_s_and_shared_by_the_processes_of_a_host(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(precision, "_CONTAINER", tmp_path / "memory.max")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    physical = precision._host_bytes()
    assert physical > 1e8
    (tmp_path / "memory.max").write_text("max\n")
    assert precision._host_bytes() == physical
    (tmp_path / "memory.max").write_text("80000000\n")
    assert precision._host_bytes() == 8e7
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert precision._host_bytes() == 2e7


@pytest.mark.parametrize(("speedups", "rooms"), [((0.5, 3.0), (1e9, 1e9)), ((3.0, 3.0), (1e9, 1e3))])
def test_all_ranks_compute_in_one_type(speedups: tuple[float, ...], rooms: tuple[float, ...]) -> None:
    """Of two machines one is fast in halves, or has no room for more: so neither takes float32, nor waits for ever."""

    def work() -> bool:
        mine = torch.distributed.get_rank()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(precision, "speedup_of_fp32", lambda half: speedups[mine])
            patch.setattr(precision, "_host_bytes", lambda: rooms[mine])
            return faster_on_cpu(torch.bfloat16, 1000) == torch.bfloat16

    assert on_ranks(work) == [True, True]


def test_it_is_measured_once_for_a_type_and_a_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.dtype] = []

    def measure(half: torch.dtype) -> float:
        asked.append(half)
        return 2.5

    monkeypatch.setattr(precision, "_measure", measure)
    assert [speedup_of_fp32(half) for half in (torch.bfloat16, torch.bfloat16, torch.float16)] == [2.5] * 3
    assert asked == [torch.bfloat16, torch.float16]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 61)
    speedup_of_fp32(torch.bfloat16)
    assert asked == [torch.bfloat16, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("nonsense", ["", "fast", "nan", "-1.0", "inf", "[2.0]"])
def test_nonsense_in_the_cache_is_measured_anew(monkeypatch: pytest.MonkeyPatch, nonsense: str) -> None:
    slow_in_halves(monkeypatch, 2.5)
    speedup_of_fp32(torch.bfloat16)
    [kept] = (cache_home() / "processors").iterdir()
    kept.write_text(nonsense)
    assert speedup_of_fp32(torch.bfloat16) == 2.5
    assert float(kept.read_text()) == 2.5


def test_what_is_measured_is_a_ratio_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes five seconds a product in float16 and one in every other type."""
    linear = torch.nn.functional.linear
    now = 0.0

    def slowly(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        nonlocal now
        now += 5.0 if left.dtype == torch.float16 else 1.0
        return linear(left, right)

    monkeypatch.setattr(torch.nn.functional, "linear", slowly)
    monkeypatch.setattr("malmen_cli.base.precision.time.perf_counter", lambda: now)
    assert speedup_of_fp32(torch.float16) == 5.0
    assert speedup_of_fp32(torch.bfloat16) == 1.0


def test_a_base_computed_in_float32_has_the_checkpoint_s_weights(
    tiny_model_factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_in_halves(monkeypatch)
    folder = tiny_model_factory("gpt2", dtype="bfloat16")
    base = load_base(str(folder), device="cpu")
    assert (base.dtype, base.stored, stored_dtype(folder)) == (torch.float32, torch.bfloat16, torch.bfloat16)
    weights = base.model.state_dict()
    assert all(
        torch.equal(weights[name], tensor.float()) for name, tensor in load_file(folder / "model.safetensors").items()
    )
    assert load_base(str(folder), device="cpu", dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize(("family", "half"), [("llama", "bfloat16"), ("gpt2", "float16"), ("t5", "float16")])
def test_a_cpu_that_is_fast_in_halves_changes_nothing(
    tiny_model_factory, monkeypatch: pytest.MonkeyPatch, family: str, half: str
) -> None:
    """Rotary tables, and T5's second products, stay in float32 as transformers has them."""
    slow_in_halves(monkeypatch, 0.3)
    folder = str(tiny_model_factory(family, dtype=half))
    auto, asked = (load_base(folder, device="cpu", dtype=dtype).model for dtype in ("auto", half))
    found, wanted = ([*model.named_parameters(), *model.named_buffers()] for model in (auto, asked))
    for (name, tensor), (_, same) in zip(found, wanted, strict=True):
        assert tensor.dtype == same.dtype, name
        assert torch.equal(tensor, same), name
    if family != "gpt2":
        kept = [t.dtype for t in (*auto.parameters(), *auto.buffers()) if t.is_floating_point()]
        assert torch.float32 in kept


def test_weights_are_rounded_to_what_they_are_loaded_in(
    tiny_model_factory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A config may say bfloat16 of a float32 file: so it is loaded, and so is what is written of it."""
    slow_in_halves(monkeypatch)
    folder = Path(shutil.copytree(tiny_model_factory("gpt2"), tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    assert stored_dtype(folder) == torch.float32
    base = load_base(str(folder), device="cpu")
    assert (base.dtype, base.stored) == (torch.float32, torch.bfloat16)
    asked = load_base(str(folder), device="cpu", dtype="float32")
    assert (asked.dtype, asked.stored) == (torch.float32, torch.float32)


def test_what_is_scored_is_what_a_merged_output_has(
    tiny_model_factory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Though computed in float32: the weights of a bfloat16 checkpoint are rounded before they are asked."""
    slow_in_halves(monkeypatch)
    base = load_base(str(tiny_model_factory("gpt2", dtype="bfloat16")), device="cpu")
    layer = base.model.get_submodule(MODULE)
    dense = 1e-3 * torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0))
    shift = Shift({MODULE: ModuleShift(weight_layout(layer), dense=dense)})
    said = {"base": {"name": base.name, "fingerprint": base.fingerprint}}
    write_merged(tmp_path / "merged", base.folder, shift, said, card="---\nbase_model: x\n---\n", force=False)
    merged = load_base(str(tmp_path / "merged"), device="cpu").model
    ids = torch.arange(12)[None]
    with torch.no_grad():
        wanted, unedited = merged(ids).logits, base.model(ids).logits
        with applied(base.model, shift, stored=base.stored):
            found = base.model(ids).logits
        with applied(base.model, shift):
            unrounded = base.model(ids).logits
    assert torch.equal(found, wanted)
    assert not torch.equal(unrounded, wanted)
    assert not torch.equal(unedited, wanted)
