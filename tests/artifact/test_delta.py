"""A delta comes back exactly, or is refused."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from malmen_cli.artifact.delta import TENSORS, is_delta, norm_of, read_delta, write_delta
from malmen_cli.artifact.manifest import canonical, read_sealed, sealed
from malmen_cli.base import sealed as sealed_module
from malmen_cli.base.model import load_base
from malmen_cli.base.weights import fingerprint
from malmen_cli.editing.shift import IN_OUT, OUT_IN, ModuleShift, Shift, applied
from malmen_cli.exceptions import EditorError, MalmenError, NumericsError, OutputError


@pytest.fixture
def delta(tmp_path: Path, tiny_gpt2: Path, make_shift: Callable[..., Shift], make_manifest: Callable[..., Any]) -> Path:
    write_delta(tmp_path / "delta", make_shift(tiny_gpt2, 3), make_manifest(tiny_gpt2), card="card", force=False)
    return tmp_path / "delta"


@pytest.mark.parametrize("rank", [None, 1, 3, 40])
def test_comes_back_bitwise(
    tmp_path: Path, base: Path, rank: int | None, make_shift: Callable[..., Shift], make_manifest: Callable[..., Any]
) -> None:
    shift = make_shift(base, rank)
    write_delta(tmp_path / "d", shift, make_manifest(base), card="card", force=False)
    assert sorted(os.listdir(tmp_path / "d")) == ["README.md", "delta.safetensors", "malmen.json"]
    back, manifest = read_delta(tmp_path / "d", fingerprint=fingerprint(base))
    assert list(back.modules) == sorted(shift.modules)
    for name, module in shift.modules.items():
        assert torch.equal(back.modules[name].matrix(), module.matrix())
        assert back.modules[name].layout == module.layout
        assert back.modules[name].rank == rank
    assert (back.row_facts, back.residual) == (shift.row_facts, shift.residual)
    assert manifest["facts"] == {"sha256": "0" * 64, "count": 3}


def test_manifest_says_what_the_shift_is(delta: Path, tiny_gpt2: Path, make_shift: Callable[..., Shift]) -> None:
    manifest = read_sealed(delta / "malmen.json")
    assert manifest["schema"] == 1
    assert manifest["format"] == "delta"
    assert set(manifest["files"]) == {"README.md", "delta.safetensors"}
    for name, module in make_shift(tiny_gpt2, 3).modules.items():
        said = manifest["modules"][name]
        assert (said["layout"], said["shape"], said["rank"]) == (IN_OUT, [64, 32], 3)
        assert said["norm"] == pytest.approx(float(module.matrix().norm()), rel=1e-6)  # fp32 product against fp64 Gram


def test_one_metadata_key_as_its_bytes_would_not_be_stable(delta: Path) -> None:
    with safe_open(delta / TENSORS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_norm_of_factors_is_the_norm_of_their_product() -> None:
    left, right = torch.randn(50, 7), torch.randn(7, 20)
    factors, dense = ModuleShift(IN_OUT, left=left, right=right), ModuleShift(IN_OUT, dense=left @ right)
    assert norm_of(factors) == pytest.approx(norm_of(dense), rel=1e-5)


def test_is_delta(delta: Path, tiny_gpt2: Path, tmp_path: Path) -> None:
    assert is_delta(delta)
    assert not is_delta(tiny_gpt2)
    assert not is_delta(tmp_path / "nowhere")
    (delta / TENSORS).unlink()
    assert is_delta(delta)
    (delta / "malmen.json").write_text("{")
    assert not is_delta(delta)


def test_another_base_is_refused_by_fingerprint(delta: Path, tiny_model_factory: Callable[..., Path]) -> None:
    """T22: the same shapes, other weights."""
    other = fingerprint(tiny_model_factory("gpt2", seed=1))
    with pytest.raises(EditorError, match="made for another base \\(example/base"):
        read_delta(delta, fingerprint=other)


def test_cut_at_every_byte(delta: Path) -> None:
    """T20: no prefix of either file is taken for the whole, at every byte of the start and spread over the rest."""
    for name in (TENSORS, "malmen.json"):
        whole = (delta / name).read_bytes()
        for size in sorted({*range(300), *range(0, len(whole), len(whole) // 200 + 1)}):
            (delta / name).write_bytes(whole[:size])
            with pytest.raises(EditorError):
                read_delta(delta, fingerprint=None)
        (delta / name).write_bytes(whole)
    read_delta(delta, fingerprint=None)


@pytest.mark.parametrize("name", [TENSORS, "malmen.json"])
def test_every_random_bit_flip_is_noticed(delta: Path, name: str) -> None:
    """T20: 250 flips in each file."""
    whole = (delta / name).read_bytes()
    chance = random.Random(0)
    for _ in range(250):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        (delta / name).write_bytes(bytes(damaged))
        with pytest.raises(EditorError):
            read_delta(delta, fingerprint=None)


def reseal(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """What somebody does who writes a manifest with a valid seal."""
    content = read_sealed(folder / "malmen.json")
    change(content)
    (folder / "malmen.json").write_bytes(sealed(content))


MODULE = "transformer.h.0.mlp.c_proj"


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["modules"][MODULE].update(shape=[32, 64]),
        lambda manifest: manifest["modules"][MODULE].update(shape=[64]),
        lambda manifest: manifest["modules"][MODULE].update(shape="64"),
        lambda manifest: manifest["modules"][MODULE].update(rank=4),
        lambda manifest: manifest["modules"][MODULE].update(rank=None),
        lambda manifest: manifest["modules"][MODULE].update(layout="sideways"),
        lambda manifest: manifest["modules"].update({MODULE: None}),
        lambda manifest: manifest["modules"].update(extra=manifest["modules"][MODULE]),
        lambda manifest: manifest["modules"].pop(MODULE),
        lambda manifest: manifest.update(modules=[]),
        lambda manifest: manifest.update(files=None),
        lambda manifest: manifest.update(row_facts=["one"]),
        lambda manifest: manifest.update(row_facts="abc"),
        lambda manifest: manifest.update(format="merged"),
        lambda manifest: manifest.pop("format"),
    ],
)
def test_tensors_other_than_the_manifest_says(delta: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """T21: missing, extra and mis-shaped tensors."""
    reseal(delta, change)
    with pytest.raises(EditorError):
        read_delta(delta, fingerprint=None)


def test_a_newer_schema_is_refused(delta: Path) -> None:
    content = read_sealed(delta / "malmen.json") | {"schema": 2}

    text = canonical(content | {"seal": sealed_module._digest(content)})
    (delta / "malmen.json").write_text(text)
    with pytest.raises(EditorError, match="schema 2 is not 1"):
        read_delta(delta, fingerprint=None)


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, '{"seal": 1}', '{"a": NaN}', "\ufeff{}"])
def test_a_manifest_that_is_none(delta: Path, text: str) -> None:
    (delta / "malmen.json").write_text(text)
    with pytest.raises(EditorError, match="damaged or edited by hand"):
        read_delta(delta, fingerprint=None)


def test_a_manifest_edited_by_hand_is_refused(delta: Path) -> None:
    text = (delta / "malmen.json").read_text()
    (delta / "malmen.json").write_text(text.replace("fact-0", "fact-9"))
    with pytest.raises(EditorError, match="checksum does not match"):
        read_delta(delta, fingerprint=None)


def test_missing_files(delta: Path) -> None:
    (delta / TENSORS).unlink()
    with pytest.raises(EditorError, match="cannot be read"):
        read_delta(delta, fingerprint=None)
    (delta / "malmen.json").unlink()
    with pytest.raises(EditorError, match="not a folder written by malmen"):
        read_delta(delta, fingerprint=None)


def test_a_huge_manifest_is_not_read(delta: Path) -> None:
    with (delta / "malmen.json").open("wb") as file:
        file.truncate(2 << 30)
    with pytest.raises(EditorError, match="too large"):
        read_delta(delta, fingerprint=None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rank", [None, 2])
def test_a_shift_that_is_not_finite_is_not_written(
    tmp_path: Path, tiny_gpt2: Path, value: float, rank: int | None, make_shift: Callable[..., Shift]
) -> None:
    """T21: the module is named and nothing is left."""
    shift = make_shift(tiny_gpt2, rank)
    module = shift.modules[MODULE]
    (module.right if module.dense is None else module.dense)[0, 0] = value
    with pytest.raises(NumericsError, match=MODULE):
        write_delta(tmp_path / "d", shift, {}, card="", force=False)
    assert os.listdir(tmp_path) == []


def test_a_figure_that_is_not_finite_is_not_written(
    tmp_path: Path, tiny_gpt2: Path, make_shift: Callable[..., Shift]
) -> None:
    shift = replace(make_shift(tiny_gpt2, 2), residual=float("nan"))
    with pytest.raises(NumericsError, match="NaN or Inf"):
        write_delta(tmp_path / "d", shift, {}, card="", force=False)
    assert os.listdir(tmp_path) == []


def test_an_existing_delta_needs_force(delta: Path, tiny_gpt2: Path, make_shift: Callable[..., Shift]) -> None:
    before = (delta / TENSORS).read_bytes()
    with pytest.raises(OutputError, match="--force"):
        write_delta(delta, make_shift(tiny_gpt2, 2), {}, card="", force=False)
    assert (delta / TENSORS).read_bytes() == before
    write_delta(delta, make_shift(tiny_gpt2, 2), {}, card="", force=True)
    assert read_delta(delta, fingerprint=None)[0].modules[MODULE].rank == 2


def test_a_delta_without_a_base_fits_no_base(tmp_path: Path, tiny_gpt2: Path, make_shift: Callable[..., Shift]) -> None:
    write_delta(tmp_path / "d", make_shift(tiny_gpt2, 2), {}, card="", force=False)
    with pytest.raises(MalmenError, match="another base"):
        read_delta(tmp_path / "d", fingerprint=fingerprint(tiny_gpt2))


def test_the_delta_of_schema_1_still_loads() -> None:
    """T17: written once and kept."""
    shift, manifest = read_delta(Path(__file__).parent / "data" / "delta-schema-1", fingerprint="ab" * 32)
    expected = torch.tensor([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]])
    assert torch.equal(shift.modules["low"].matrix(), expected)
    assert torch.equal(shift.modules["dense"].for_weight(), expected.T)
    assert shift.row_facts == ("only",)
    assert json.dumps(manifest["facts"]) == '{"count": 1, "sha256": "cd"}'


def test_factors_of_any_shape_take_no_more_room_than_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million columns beside one row: the Gram matrices would take eight terabytes."""
    row, column = torch.ones(1, 1_000_000), torch.ones(1_000_000, 1)
    assert norm_of(ModuleShift(IN_OUT, left=row, right=column)) == pytest.approx(1e6)
    assert norm_of(ModuleShift(IN_OUT, left=column, right=row)) == pytest.approx(1e6)


@pytest.mark.parametrize(
    ("name", "layout", "shape"),
    [
        ("transformer.h.0.mlp.c_proj", IN_OUT, (64, 31)),
        ("transformer.h.0.mlp.c_proj", IN_OUT, (1, 32)),  # would be added to every row
        ("transformer.h.0.mlp.c_proj", IN_OUT, (10**6, 10**6)),  # would take four terabytes
        ("transformer.h.0.mlp.c_proj", OUT_IN, (64, 32)),
        ("transformer.h.9.mlp.c_proj", IN_OUT, (64, 32)),
        ("transformer.h.0.ln_1", IN_OUT, (32, 32)),
        ("transformer.h.0", IN_OUT, (32, 32)),
    ],
)
def test_a_delta_that_does_not_fit_the_model_is_not_applied(
    tiny_gpt2: Path, name: str, layout: str, shape: tuple[int, int]
) -> None:
    """A stranger's delta may have the right fingerprint and anything else wrong."""
    model = load_base(str(tiny_gpt2), device="cpu").model
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    factors = {"left": torch.ones(shape[0], 1), "right": torch.ones(1, shape[1])}
    shift = Shift({name: ModuleShift(layout, **factors)})
    with pytest.raises(EditorError, match="made for another base"), applied(model, shift):
        pytest.fail("it was applied")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("solver", [{"residual": []}, {"residual": "0"}, {"residual": None}, [{"residual": 0.0}], "x"])
def test_a_sealed_manifest_whose_solver_is_none_is_refused(delta: Path, solver: Any) -> None:
    """Found by make fuzz: a stranger can seal anything."""
    (delta / "malmen.json").write_bytes(sealed(read_sealed(delta / "malmen.json") | {"solver": solver}))
    with pytest.raises(EditorError, match="solver residual is no number"):
        read_delta(delta, fingerprint=None)
