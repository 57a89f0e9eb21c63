"""A merged checkpoint is the base, edited tensors rounded once, in every byte."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from malmen_cli.artifact import disk
from malmen_cli.artifact.adapter import write_adapter
from malmen_cli.artifact.delta import read_delta, write_delta
from malmen_cli.artifact.manifest import read_sealed
from malmen_cli.artifact.merged import (
    Sharing,
    measure,
    merge_plan,
    merged_weight,
    side_files,
    unedited_shards,
    write_merged,
)
from malmen_cli.base import weights
from malmen_cli.base.weights import fingerprint, read_index, read_tensor
from malmen_cli.editing.shift import IN_OUT, OUT_IN, ModuleShift, Shift, applied
from malmen_cli.exceptions import CheckpointError, MalmenError, NumericsError, OutputError

MakeShift = Callable[..., Shift]
IDS = torch.tensor([[5, 17, 33, 2]])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: read_tensor(entry) for name, entry in read_index(folder).items()}


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True).eval()
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("rank", [None, 3])
def test_is_the_rounded_sum_and_nothing_else_changed(
    tmp_path: Path, base: Path, rank: int | None, make_shift: MakeShift, make_manifest: Callable[..., Any]
) -> None:
    """T9, T12: every tensor bitwise, in the base's order."""
    shift = make_shift(base, rank)
    write_merged(tmp_path / "m", base, shift, make_manifest(base), card="card", force=False)
    before, after = tensors(base), tensors(tmp_path / "m")
    edited = {f"{name}.weight": module for name, module in shift.modules.items()}
    assert list(before) == list(after)
    for name, weight in before.items():
        if name in edited:
            module = edited[name]
            matrix = module.matrix() if module.layout == IN_OUT else module.matrix().T
            weight = (weight.float() + matrix).to(weight.dtype)
            assert not torch.equal(weight, before[name])
        assert after[name].dtype == weight.dtype
        assert torch.equal(after[name].view(torch.uint8), weight.contiguous().view(torch.uint8)), name


def test_a_shift_from_elsewhere_is_brought_to_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shift made on an accelerator: the device it is moved to is that of the weight read from disk."""
    weight, moved = torch.ones(2, 3), []

    class Elsewhere:
        def to(self, device: torch.device) -> torch.Tensor:
            moved.append(device)
            return torch.full((2, 3), 0.5)

    monkeypatch.setattr(ModuleShift, "for_weight", lambda _: Elsewhere())
    module = ModuleShift(IN_OUT, dense=torch.full((2, 3), 0.5))
    rounded, _ = merged_weight("m", weight, module)
    assert moved == [weight.device]
    assert torch.equal(rounded, torch.full((2, 3), 1.5))


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [None, 3])
def test_every_writer_takes_a_shift_on_an_accelerator(
    tmp_path: Path, tiny_gpt2: Path, rank: int | None, make_shift: MakeShift, make_manifest: Callable[..., Any]
) -> None:
    shift, manifest = make_shift(tiny_gpt2, rank), make_manifest(tiny_gpt2)
    parts = ("dense", "left", "right")
    away = Shift(
        {
            name: ModuleShift(
                module.layout,
                **{part: tensor.cuda() for part in parts if (tensor := getattr(module, part)) is not None},
            )
            for name, module in shift.modules.items()
        },
        row_facts=shift.row_facts,
    )
    write_merged(tmp_path / "m", tiny_gpt2, away, manifest, card="", force=False)
    write_delta(tmp_path / "d", away, manifest, card="", force=False)
    write_adapter(tmp_path / "a", away, manifest, base_name="b", card="", force=False)
    read, _ = read_delta(tmp_path / "d", fingerprint=fingerprint(tiny_gpt2))
    merged, base = tensors(tmp_path / "m"), tensors(tiny_gpt2)
    adapter = load_file(tmp_path / "a" / "adapter_model.safetensors")
    for name, module in shift.modules.items():
        assert torch.equal(read.modules[name].matrix(), module.matrix())
        torch.testing.assert_close(merged[f"{name}.weight"], base[f"{name}.weight"] + module.for_weight())
        one, other = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close((other @ one).T, module.matrix(), rtol=1e-4, atol=1e-5)


def test_header_is_the_bases(tmp_path: Path, base: Path, make_shift: MakeShift) -> None:
    write_merged(tmp_path / "m", base, make_shift(base, 2), {}, card="card", force=False)
    one, other = (folder / "model.safetensors" for folder in (base, tmp_path / "m"))
    length = 8 + int.from_bytes(one.read_bytes()[:8], "little")
    assert one.read_bytes()[:length] == other.read_bytes()[:length]
    assert one.stat().st_size == other.stat().st_size


@pytest.mark.parametrize("rank", [None, 3])
def test_base_plus_delta_is_merged(
    tmp_path: Path, base: Path, rank: int | None, make_shift: MakeShift, make_manifest: Callable[..., Any]
) -> None:
    """T12: merging what was read from the delta, or applying it to a loaded model, gives merged's bytes."""
    from transformers import AutoModelForCausalLM

    shift, manifest = make_shift(base, rank), make_manifest(base)
    write_merged(tmp_path / "m", base, shift, manifest, card="card", force=False)
    write_delta(tmp_path / "d", shift, manifest, card="card", force=False)
    back, _ = read_delta(tmp_path / "d", fingerprint=fingerprint(base))
    write_merged(tmp_path / "again", base, back, manifest, card="card", force=False)
    for name in os.listdir(tmp_path / "m"):
        assert (tmp_path / "m" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", local_files_only=True).eval()
    with applied(model, back), torch.no_grad():
        assert torch.equal(model(IDS).logits, logits(tmp_path / "m"))


def test_tied_embeddings_survive(
    tmp_path: Path, tiny_model_factory: Callable[..., Path], make_shift: MakeShift
) -> None:
    from transformers import AutoModelForCausalLM

    base = tiny_model_factory("llama", tie_word_embeddings=True)
    write_merged(tmp_path / "m", base, make_shift(base, 2), {}, card="", force=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", local_files_only=True)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert "lm_head.weight" not in read_index(tmp_path / "m")


def test_shards_stay_shards(
    tmp_path: Path, sharded: Path, make_shift: MakeShift, make_manifest: Callable[..., Any]
) -> None:
    """T14: exact listing, index and tokenizer byte-equal, total size, untouched shards byte-equal, logits."""
    shift = make_shift(sharded, 3)
    write_merged(tmp_path / "m", sharded, shift, make_manifest(sharded), card="card", force=False)
    own = {"malmen.json", "README.md"}
    assert sorted(os.listdir(tmp_path / "m")) == sorted({*os.listdir(sharded), *own})
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) >= 4
    assert index["metadata"]["total_size"] == sum(
        t.numel() * t.element_size() for t in tensors(tmp_path / "m").values()
    )
    touched = {index["weight_map"][f"{name}.weight"] for name in shift.modules}
    assert touched
    assert touched < shards
    for name in set(os.listdir(sharded)) - own:
        same = (sharded / name).read_bytes() == (tmp_path / "m" / name).read_bytes()
        assert same == (name not in touched), name
    single = tmp_path / "single"
    for name in set(os.listdir(sharded)) - shards - {"model.safetensors.index.json"}:
        single.mkdir(exist_ok=True)
        shutil.copy(sharded / name, single / name)
    save_file(tensors(tmp_path / "m"), single / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(tmp_path / "m"), logits(single))


def test_manifest_names_every_file_and_what_was_left_out(
    tmp_path: Path, tiny_llama: Path, make_shift: MakeShift, make_manifest: Callable[..., Any]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("{{ tool }}")
    copied = {"chat_template.jinja": "{{ chat }}", "LICENSE": "text", "vocab.txt": "a\n", "spiece.model": "x"}
    left = {"modeling.py": "1", "pytorch_model.bin": "1", "old.safetensors": "1", "x.index.json": "{}", "notes": "n"}
    for name, text in (copied | left | {"README.md": "the base's", "malmen.json": "{}"}).items():
        (base / name).write_text(text)
    (base / ".git").mkdir()
    manifest = make_manifest(base)
    write_merged(tmp_path / "m", base, make_shift(base, 2), manifest, card="card", force=False)
    said = read_sealed(tmp_path / "m" / "malmen.json")
    assert said["left_out"] == sorted([*left, ".git"])
    assert (tmp_path / "m" / "README.md").read_text() == "card"
    assert (tmp_path / "m" / "additional_chat_templates" / "tool.jinja").read_text() == "{{ tool }}"
    for name, text in copied.items():
        assert (tmp_path / "m" / name).read_text() == text
    found = {p.relative_to(tmp_path / "m").as_posix() for p in (tmp_path / "m").rglob("*") if p.is_file()}
    assert found - {"malmen.json"} == set(said["files"])
    assert said["files"] == {name: disk.file_sha256(tmp_path / "m" / name) for name in said["files"]}
    assert {key: said[key] for key in manifest} == manifest


def test_a_link_out_of_the_base_is_not_followed(tmp_path: Path, tiny_llama: Path, make_shift: MakeShift) -> None:
    """T18's rule for shards, for the files beside them: an output may be published."""
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    (tmp_path / "secret").write_text("secret")
    (base / "extra.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="outside its folder"):
        write_merged(tmp_path / "m", base, make_shift(base, 2), {}, card="", force=False)
    assert not (tmp_path / "m").exists()


def test_the_links_of_a_hub_snapshot_are_followed(tmp_path: Path, tiny_llama: Path, make_shift: MakeShift) -> None:
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("a" * 40)
    shutil.copytree(tiny_llama, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    write_merged(tmp_path / "m", snapshot, make_shift(snapshot, 2), {}, card="", force=False)
    assert not any(path.is_symlink() for path in (tmp_path / "m").iterdir())
    assert (tmp_path / "m" / "tokenizer.json").read_bytes() == (tiny_llama / "tokenizer.json").read_bytes()


def test_a_stale_index_beside_a_single_file_is_not_copied(tmp_path: Path, tiny_llama: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    (base / "model.safetensors.index.json").write_text("{}")
    copied, left_out = side_files(base, {base / "model.safetensors"})
    assert left_out == ["model.safetensors.index.json"]
    assert "tokenizer.json" in copied


class TestRealised:
    """T9: what survives the rounding, by hand."""

    @pytest.mark.parametrize("layout", [IN_OUT, OUT_IN])
    def test_fp32_realises_all_of_it(self, layout: str) -> None:
        module = ModuleShift(layout, dense=torch.full((4, 4), 0.5))
        weight, figures = merged_weight("m", torch.zeros(4, 4), module)
        assert torch.equal(weight, torch.full((4, 4), 0.5))
        assert figures == {"realised": 1.0, "rounding_error": 0.0, "relative_norm": 0.0}

    def test_a_shift_below_half_a_step_vanishes(self) -> None:
        # bf16 has 8 significant bits: between 1 and 2 its step is 2^-7, and 2^-9 is rounded away
        module = ModuleShift(IN_OUT, dense=torch.full((2, 2), 2.0**-9))
        weight, figures = merged_weight("m", torch.ones(2, 2, dtype=torch.bfloat16), module)
        assert torch.equal(weight, torch.ones(2, 2, dtype=torch.bfloat16))
        assert figures == {"realised": 0.0, "rounding_error": 1.0, "relative_norm": 2.0**-9}

    def test_half_of_it_by_energy(self) -> None:
        shift = torch.tensor([[2.0**-7, 0.0], [0.0, 2.0**-9]])
        _, figures = merged_weight("m", torch.ones(2, 2, dtype=torch.bfloat16), ModuleShift(IN_OUT, dense=shift))
        norm = (2.0**-14 + 2.0**-18) ** 0.5
        assert figures["realised"] == pytest.approx(2.0**-7 / norm)
        assert figures["rounding_error"] == pytest.approx(2.0**-9 / norm)

    def test_nothing_to_realise(self) -> None:
        module = ModuleShift(IN_OUT, left=torch.zeros(2, 0), right=torch.zeros(0, 2))
        figures = merged_weight("m", torch.ones(2, 2), module)[1]
        assert figures == {"realised": 1.0, "rounding_error": 0.0, "relative_norm": 0.0}

    def test_fp64_is_summed_in_fp64(self) -> None:
        weight = torch.full((1, 1), 1.0 + 2.0**-40, dtype=torch.float64)
        summed, _ = merged_weight("m", weight, ModuleShift(IN_OUT, dense=torch.ones(1, 1)))
        assert float(summed) == 2.0 + 2.0**-40

    def test_in_the_manifest_and_before_writing(
        self, tmp_path: Path, tiny_model_factory: Callable[..., Path], make_shift: MakeShift
    ) -> None:
        base = tiny_model_factory("gpt2", dtype="bfloat16")
        shift = make_shift(base, 3, scale=1e-4)
        write_merged(tmp_path / "m", base, shift, {}, card="", force=False)
        modules = read_sealed(tmp_path / "m" / "malmen.json")["modules"]
        for name, figures in measure(base, shift).items():
            assert {key: modules[name][key] for key in figures} == figures
            assert figures["realised"] == pytest.approx(1.0, abs=0.1)
            assert figures["rounding_error"] > 0.5  # a shift of 1e-4 beside bf16 weights of 0.2


class TestNumerics:
    def test_overflow_in_fp16_names_the_module(
        self, tmp_path: Path, tiny_model_factory: Callable[..., Path], make_shift: MakeShift
    ) -> None:
        """T21."""
        base = tiny_model_factory("gpt2", dtype="float16")
        shift = make_shift(base, None, scale=1e6)
        with pytest.raises(NumericsError, match=r"transformer.h.0.mlp.c_proj"):
            write_merged(tmp_path / "m", base, shift, {}, card="", force=False)
        assert os.listdir(tmp_path) == []

    def test_a_base_that_is_not_finite_names_the_module(
        self, tmp_path: Path, tiny_llama: Path, make_shift: MakeShift
    ) -> None:
        """T21."""
        base = rewritten(tmp_path, tiny_llama, lambda name, t: t.fill_(float("nan")) if "down_proj" in name else t)
        with pytest.raises(NumericsError, match=r"model.layers.0.mlp.down_proj"):
            write_merged(tmp_path / "m", base, make_shift(base, 2), {}, card="", force=False)
        assert not (tmp_path / "m").exists()


def rewritten(tmp_path: Path, source: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> Path:
    """A copy of a checkpoint with changed tensors; None leaves one out."""
    base = tmp_path / "changed"
    shutil.copytree(source, base)
    changed = {name: change(name, tensor) for name, tensor in load_file(source / "model.safetensors").items()}
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    save_file(kept, base / "model.safetensors", metadata={"format": "pt"})
    return base


class TestPlan:
    def test_exact_names(self, base: Path, make_shift: MakeShift) -> None:
        shift = make_shift(base, 1)
        assert merge_plan(base, shift) == {name: f"{name}.weight" for name in shift.modules}

    @pytest.mark.parametrize("prefix", ["missing", "added"])
    def test_a_prefix_missing_or_added(
        self, tmp_path: Path, tiny_gpt2: Path, prefix: str, make_shift: MakeShift
    ) -> None:
        shift = make_shift(tiny_gpt2, 1)
        folder = tmp_path / "renamed"
        shutil.copytree(tiny_gpt2, folder)
        whole = load_file(tiny_gpt2 / "model.safetensors")
        rename = (lambda n: n.removeprefix("transformer.")) if prefix == "missing" else (lambda n: "model." + n)
        save_file({rename(name): tensor for name, tensor in whole.items()}, folder / "model.safetensors")
        assert merge_plan(folder, shift) == {name: rename(f"{name}.weight") for name in shift.modules}

    def test_two_candidates_are_refused(self, tmp_path: Path, tiny_gpt2: Path, make_shift: MakeShift) -> None:
        folder = tmp_path / "two"
        shutil.copytree(tiny_gpt2, folder)
        whole = load_file(tiny_gpt2 / "model.safetensors")
        twice = {f"{prefix}.{name}": tensor.clone() for name, tensor in whole.items() for prefix in ("a", "b")}
        save_file(twice, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match="2 tensors that may be"):
            merge_plan(folder, make_shift(tiny_gpt2, 1))

    def test_no_such_tensor(self, tiny_llama: Path, tiny_gpt2: Path, make_shift: MakeShift) -> None:
        with pytest.raises(CheckpointError, match=r"no tensor transformer.h.0.mlp.c_proj.weight"):
            merge_plan(tiny_llama, make_shift(tiny_gpt2, 1))

    def test_another_shape(
        self, tiny_model_factory: Callable[..., Path], tiny_gpt2: Path, make_shift: MakeShift
    ) -> None:
        """T22: refused on shape too."""
        with pytest.raises(CheckpointError, match=r"has shape \(96, 32\), the shift .* needs \(64, 32\)"):
            merge_plan(tiny_model_factory("gpt2", mlp=96), make_shift(tiny_gpt2, 1))

    def test_layout_is_part_of_the_shape(self, tiny_gpt2: Path) -> None:
        shift = Shift({"transformer.h.0.mlp.c_proj": ModuleShift(OUT_IN, dense=torch.zeros(64, 32))})
        with pytest.raises(CheckpointError, match="needs \\(32, 64\\)"):
            merge_plan(tiny_gpt2, shift)

    def test_one_tensor_for_two_modules(self, tiny_gpt2: Path) -> None:
        module = ModuleShift(IN_OUT, dense=torch.zeros(64, 32))
        shift = Shift({"transformer.h.0.mlp.c_proj": module, "h.0.mlp.c_proj": module})
        with pytest.raises(CheckpointError, match="two edited modules have one weight"):
            merge_plan(tiny_gpt2, shift)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
    def test_quantised_weights_are_refused(
        self, tmp_path: Path, tiny_llama: Path, dtype: torch.dtype, make_shift: MakeShift
    ) -> None:
        base = rewritten(tmp_path, tiny_llama, lambda name, t: t.to(dtype) if "down_proj" in name else t)
        with pytest.raises(CheckpointError, match="unquantised"):
            merge_plan(base, make_shift(tiny_llama, 1))


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "no space"), KeyboardInterrupt()], ids=["full", "interrupt"])
@pytest.mark.parametrize("force", [False, True], ids=["fresh", "replacing"])
def test_a_failure_at_every_write(
    tmp_path: Path,
    sharded: Path,
    failure: BaseException,
    force: bool,
    make_shift: MakeShift,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """T24: at the k-th write, for every k, the output stays absent or old; then the next run succeeds."""
    shift, out, originals = make_shift(sharded, 2), tmp_path / "m", {n: getattr(disk, n) for n in ("write", "copy")}
    monkeypatch.setattr(disk, "sync", lambda descriptor: None)  # fsync is slow and fails in test_atomic.py
    if force:
        write_merged(out, sharded, make_shift(sharded, 1), {}, card="old", force=False)
    before = {path.name: path.read_bytes() for path in out.iterdir()} if force else None
    writes = 0
    while True:
        calls = [0]

        def fail_at_kth(name: str, *given: Any, calls: list[int] = calls, k: int = writes) -> Any:
            calls[0] += 1
            if calls[0] == k + 1:
                raise failure
            return originals[name](*given)

        for name in originals:
            monkeypatch.setattr(disk, name, partial(fail_at_kth, name))
        try:
            write_merged(out, sharded, shift, {}, card="new", force=force)
        except (OutputError, KeyboardInterrupt):
            after = {path.name: path.read_bytes() for path in out.iterdir()} if out.exists() else None
            assert after == before
            assert os.listdir(tmp_path) == (["m"] if force else [])
            writes += 1
        else:
            break
    assert writes >= 15
    assert (out / "README.md").read_text() == "new"


STABLE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from conftest import build_shift
from malmen_cli.artifact.adapter import write_adapter
from malmen_cli.artifact.disk import file_sha256
from malmen_cli.artifact.card import model_card
from malmen_cli.artifact.delta import write_delta
from malmen_cli.artifact.editors import save_editor
from malmen_cli.artifact.merged import write_merged
base, root = Path(sys.argv[2]), Path(sys.argv[3])
manifest = {key: {"name": key, **{str(n): n for n in {"x", "y", "z", key}}} for key in {"base", "method", "editor"}}
for run in "123":
    for rank in (3, None):
        shift = build_shift(base, rank)
        out = root / f"{run}-{rank}"
        write_merged(out / "m", base, shift, manifest, card=model_card("merged", manifest), force=False)
        write_delta(out / "d", shift, manifest, card=model_card("delta", manifest), force=False)
        card = model_card("adapter", manifest)
        write_adapter(out / "a", shift, manifest, base_name="b", card=card, force=False, max_rank=8)
        save_editor(out / "e", {m: s.matrix() for m, s in shift.modules.items()}, manifest, force=False)
for file in sorted(root.rglob("*")):
    if file.is_file():
        print(file.relative_to(root).as_posix()[2:], file_sha256(file))
"""


@pytest.mark.parametrize("share", ["none", "reflink", "hardlink"])
def test_untouched_shards_are_linked_only_when_asked(
    tmp_path: Path, sharded: Path, make_shift: MakeShift, make_manifest: Callable[..., Any], share: Sharing
) -> None:
    """The output's bytes are the same whatever it shares with the base, and the base's stay what they were."""
    shift, before = make_shift(sharded, 3), {f.name: f.read_bytes() for f in sharded.iterdir()}
    write_merged(tmp_path / "m", sharded, shift, make_manifest(sharded), card="card", force=False)
    write_merged(tmp_path / "s", sharded, shift, make_manifest(sharded), card="card", force=False, share=share)
    plain, shared = read_sealed(tmp_path / "m" / "malmen.json"), read_sealed(tmp_path / "s" / "malmen.json")
    assert shared["files"] == plain["files"]
    index = read_index(sharded)
    edited = {index[name].file.name for name in merge_plan(sharded, shift).values()}
    untouched = sorted({entry.file.name for entry in index.values()} - edited)
    linked = untouched if share == "hardlink" else []
    assert len(untouched) >= 2
    assert shared.get("linked", []) == linked
    for name, content in before.items():
        assert (tmp_path / "s" / name).samefile(sharded / name) == (name in linked)
        assert (sharded / name).read_bytes() == content
    # Where a linked shard is replaced, by the next run, the base keeps its own.
    write_merged(tmp_path / "s", sharded, make_shift(sharded, 1), make_manifest(sharded), card="card", force=True)
    assert {f.name: f.read_bytes() for f in sharded.iterdir()} == before


def test_what_is_remembered_of_a_base_outlives_links_to_it(
    tmp_path: Path, sharded: Path, make_shift: MakeShift, make_manifest: Callable[..., Any], monkeypatch
) -> None:
    """A link changes when a file was last changed, and reading a large base again takes minutes."""
    base = Path(shutil.copytree(sharded, tmp_path / "base"))
    for file in base.iterdir():
        os.utime(file, (1e9, 1e9))
    shift, known = make_shift(base, 3), fingerprint(base)
    monkeypatch.setattr(weights, "_digest", lambda entries: pytest.fail("the base was read again"))
    write_merged(tmp_path / "m", base, shift, make_manifest(base), card="", force=False, share="hardlink")
    assert read_sealed(tmp_path / "m" / "malmen.json")["linked"]
    assert fingerprint(base) == known


def test_a_shard_that_cannot_be_read_is_not_linked(
    tmp_path: Path, sharded: Path, make_shift: MakeShift, make_manifest: Callable[..., Any], monkeypatch
) -> None:
    def failing(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(disk, "file_sha256", failing)
    shift = make_shift(sharded, 3)
    with pytest.raises(CheckpointError, match=r"safetensors: cannot be read: Input/output error"):
        write_merged(tmp_path / "m", sharded, shift, make_manifest(sharded), card="", force=False, share="hardlink")
    assert not (tmp_path / "m").exists()


def test_on_another_device_nothing_is_linked_and_room_is_needed_for_all(
    tmp_path: Path, sharded: Path, make_shift: MakeShift, monkeypatch: pytest.MonkeyPatch
) -> None:
    shift = make_shift(sharded, 3)
    assert unedited_shards(sharded, shift.modules, tmp_path / "out")
    if not os.access("/dev/shm", os.W_OK) or os.stat("/dev/shm").st_dev == os.stat(sharded).st_dev:
        pytest.skip("there is no second device to write to")
    assert unedited_shards(sharded, shift.modules, Path("/dev/shm/out")) == []


def test_what_is_linked_needs_no_room(
    tmp_path: Path, sharded: Path, make_shift: MakeShift, make_manifest: Callable[..., Any], monkeypatch
) -> None:
    needs: list[int] = []
    monkeypatch.setattr(disk, "check_free", lambda out, need: needs.append(need))
    shift = make_shift(sharded, 3)
    shares: tuple[Sharing, ...] = ("none", "hardlink")
    for share in shares:
        write_merged(tmp_path / share, sharded, shift, make_manifest(sharded), card="", force=False, share=share)
    linked = read_sealed(tmp_path / "hardlink" / "malmen.json")["linked"]
    assert needs[0] - needs[1] == sum((sharded / name).stat().st_size for name in linked) > 0


@pytest.mark.slow  # imports torch in two fresh processes
def test_same_inputs_same_bytes(tmp_path: Path, sharded: Path) -> None:
    """T15: three runs under each of two hash seeds."""
    seen: dict[str, set[str]] = {}
    for seed in ("0", "1"):
        command = [sys.executable, "-c", STABLE, str(Path(__file__).parent), str(sharded), str(tmp_path / seed)]
        (tmp_path / seed).mkdir()
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(disk.__file__).parents[2])}
        printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        for line in printed.splitlines():
            name, digest = line.split()
            seen.setdefault(name, set()).add(digest)
    assert len(seen) > 20
    assert {name for name, digests in seen.items() if len(digests) > 1} == set()


ALONE = """
import sys
sys.modules["malmen_cli"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        torch.save(model(torch.tensor([[5, 17, 33, 2]])).logits, folder + ".logits")
"""


@pytest.mark.slow  # imports transformers in a fresh process
def test_loads_where_malmen_cannot_be_imported(
    tmp_path: Path, tiny_gpt2: Path, sharded: Path, make_shift: MakeShift
) -> None:
    """T16: the same logits as the base with the shift applied."""
    from transformers import AutoModelForCausalLM

    bases = {"gpt2": tiny_gpt2, "sharded": sharded}
    for name, base in bases.items():
        write_merged(tmp_path / name, base, make_shift(base, 3), {}, card="", force=False)
    subprocess.run([sys.executable, "-c", ALONE, *(str(tmp_path / name) for name in bases)], check=True)
    for name, base in bases.items():
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", local_files_only=True).eval()
        with applied(model, make_shift(base, 3)), torch.no_grad():
            assert torch.equal(model(IDS).logits, torch.load(tmp_path / f"{name}.logits"))


def test_a_shard_that_vanishes_meanwhile(
    tmp_path: Path, tiny_llama: Path, make_shift: MakeShift, monkeypatch: pytest.MonkeyPatch
) -> None:
    from malmen_cli.artifact import merged

    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    shift = make_shift(base, 2)
    index = read_index(base)
    for damage in (lambda: os.truncate(base / "model.safetensors", 100), (base / "model.safetensors").unlink):
        monkeypatch.setattr(
            merged, "merge_plan", lambda *_, d=damage: (d(), {n: f"{n}.weight" for n in shift.modules})[1]
        )
        monkeypatch.setattr(merged, "read_index", lambda folder: index)
        monkeypatch.setattr(merged, "plan_bytes", lambda *_, **__: 0)
        with pytest.raises(MalmenError, match=r"start again|cannot be read"):
            write_merged(tmp_path / "m", base, shift, {}, card="", force=False)
        assert sorted(os.listdir(tmp_path)) == ["base"]
