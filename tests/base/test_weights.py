"""Weights are read without believing them: hostile indexes, broken headers, pickles, and what identity means."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from malmen_cli.artifact import disk
from malmen_cli.base import cache, header, weights
from malmen_cli.base.header import read_header
from malmen_cli.base.weights import INDEX_FILE, SINGLE_FILE, TensorEntry, fingerprint, read_index, read_tensor
from malmen_cli.exceptions import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def tensors() -> dict[str, torch.Tensor]:
    return {
        "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "b.weight": torch.arange(4, dtype=torch.bfloat16),
        "c.bias": torch.tensor([1, -2], dtype=torch.int64),
    }


def raw_file(fields: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def single(folder: Path, content: dict[str, torch.Tensor] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors() if content is None else content, folder / SINGLE_FILE)
    return folder


def sharded(folder: Path, weight_map: dict[str, Any] | None = None) -> Path:
    """Two shards; `weight_map` replaces the true one."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = tensors()
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save_file({"c.bias": whole["c.bias"], "a.weight": whole["a.weight"]}, folder / first)
    save_file({"b.weight": whole["b.weight"]}, folder / second)
    true_map = {"a.weight": first, "b.weight": second, "c.bias": first}
    index = {"metadata": {"total_size": 48}, "weight_map": true_map if weight_map is None else weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    return folder


def refusal(folder: Path) -> str:
    """The one line with which `folder` is refused."""
    with pytest.raises(CheckpointError) as caught:
        read_index(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


# ---------------------------------------------------------------- reading


def test_single_file_gives_every_tensor(tmp_path):
    found = read_index(single(tmp_path))
    assert list(found) == ["a.weight", "b.weight", "c.bias"]
    assert {(e.name, e.dtype, e.shape, e.end - e.start) for e in found.values()} == {
        ("a.weight", "F32", (2, 3), 24),
        ("b.weight", "BF16", (4,), 8),
        ("c.bias", "I64", (2,), 16),
    }
    assert {e.file for e in found.values()} == {tmp_path / SINGLE_FILE}


def test_shards_give_the_same_tensors_and_their_own_files(tmp_path):
    found = read_index(sharded(tmp_path))
    assert {name: e.file.name[:11] for name, e in found.items()} == {
        "a.weight": "model-00001",
        "b.weight": "model-00002",
        "c.bias": "model-00001",
    }
    for name, tensor in tensors().items():
        assert torch.equal(read_tensor(found[name]), tensor)


def test_a_single_file_wins_over_an_index_as_in_transformers(tmp_path):
    sharded(tmp_path, {"x": "../outside.safetensors"})
    single(tmp_path)
    assert set(read_index(tmp_path)) == set(tensors())


KINDS = {
    "BOOL": torch.tensor([True, False, True]),
    "U8": torch.tensor([0, 255], dtype=torch.uint8),
    "I8": torch.tensor([-128, 127], dtype=torch.int8),
    "I16": torch.tensor([[-3, 5]], dtype=torch.int16),
    "I32": torch.tensor([[[7]]], dtype=torch.int32),
    "I64": torch.tensor([2**40, -1]),
    "F16": torch.tensor([0.5, -2.0], dtype=torch.float16),
    "BF16": torch.tensor([[1.5, 3.0]], dtype=torch.bfloat16),
    "F32": torch.tensor([[0.1], [0.2]]),
    "F64": torch.tensor(0.1, dtype=torch.float64),
    "F8_E4M3": torch.tensor([0.5, 448.0]).to(torch.float8_e4m3fn),
    "F8_E5M2": torch.tensor([0.25, 2.0]).to(torch.float8_e5m2),
    "C64": torch.tensor([1 + 2j]),
}


@pytest.mark.parametrize("dtype", KINDS)
def test_read_tensor_is_exact_for_every_dtype(tmp_path, dtype):
    save_file({"pad": torch.zeros(1, dtype=torch.uint8), "t": KINDS[dtype]}, tmp_path / SINGLE_FILE)
    found = read_index(tmp_path)["t"]
    tensor = read_tensor(found)
    assert found.dtype == dtype
    assert (tensor.dtype, tensor.shape) == (KINDS[dtype].dtype, KINDS[dtype].shape)
    assert torch.equal(tensor.reshape(-1).view(torch.uint8), KINDS[dtype].reshape(-1).view(torch.uint8))


def test_read_tensor_of_no_elements_and_of_none_dimensions(tmp_path):
    save_file({"empty": torch.empty(0, 5), "one": torch.tensor(2.5)}, tmp_path / SINGLE_FILE)
    found = read_index(tmp_path)
    assert read_tensor(found["empty"]).shape == (0, 5)
    assert read_tensor(found["one"]).item() == 2.5


def test_every_dtype_that_is_accepted_can_be_read():
    assert header.ITEM_BYTES.keys() == weights.TORCH_NAMES.keys()
    for dtype, name in weights.TORCH_NAMES.items():
        assert getattr(torch, name).itemsize == header.ITEM_BYTES[dtype]


def test_read_tensor_of_a_file_cut_or_removed_since(tmp_path):
    found = read_index(single(tmp_path))["c.bias"]
    os.truncate(found.file, found.end - 1)
    with pytest.raises(CheckpointError, match="became shorter"):
        read_tensor(found)
    found.file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_tensor(found)


# ---------------------------------------------------------------- T18: hostile indexes

HOSTILE = [
    "../x",
    "../outside.safetensors",
    "/abs.safetensors",
    "/etc/passwd",
    "C:\\x.safetensors",
    "C:x.safetensors",
    "\\\\unc\\share\\x.safetensors",
    "a/../../x.safetensors",
    "sub/model.safetensors",
    "..",
    ".",
    "",
    "a\0b.safetensors",
    "a\nb.safetensors",
    "\u202e.safetensors",
    "~/x.safetensors",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_an_index_may_name_only_files_beside_it(tmp_path, name, monkeypatch):
    single(tmp_path / "outside").joinpath(SINGLE_FILE).rename(tmp_path / "outside.safetensors")
    folder = sharded(tmp_path / "base", {"a.weight": "model-00001-of-00002.safetensors", "b.weight": name})
    monkeypatch.setattr(weights, "read_header", lambda file: pytest.fail(f"{file} was opened"))
    assert "names the file" in refusal(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.pt", "x.pth", "model.gguf", "x.safetensors.bin"])
def test_an_index_may_name_only_safetensors(tmp_path, name):
    folder = sharded(tmp_path / "base", {"a.weight": name})
    (folder / name).write_bytes(b"")
    assert "not safetensors" in refusal(folder)


def test_an_index_that_names_a_missing_file(tmp_path):
    folder = sharded(tmp_path / "base", {"a.weight": "model-00009-of-00009.safetensors"})
    assert "model-00009-of-00009.safetensors: missing" in refusal(folder)


def test_an_index_that_names_a_folder(tmp_path):
    folder = sharded(tmp_path / "base", {"a.weight": "x.safetensors"})
    (folder / "x.safetensors").mkdir()
    assert "not a file" in refusal(folder)


@pytest.mark.parametrize("name", [SINGLE_FILE, "x.safetensors", INDEX_FILE])
def test_a_symlink_out_of_the_folder_is_not_followed(tmp_path, name):
    outside = single(tmp_path / "outside") / SINGLE_FILE
    folder = sharded(tmp_path / "base", {"a.weight": "x.safetensors"})
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    assert f"{name}: a symlink to a file outside" in refusal(folder)


def test_symlinks_that_dangle_or_go_round_are_missing_files(tmp_path):
    folder = sharded(tmp_path / "base", {"a.weight": "x.safetensors"})
    (folder / "x.safetensors").symlink_to(folder / "nowhere.safetensors")
    assert "missing" in refusal(folder)
    (folder / SINGLE_FILE).symlink_to(SINGLE_FILE)
    assert "missing" in refusal(folder)


def test_a_symlink_within_the_folder_is_fine(tmp_path):
    folder = single(tmp_path)
    (folder / SINGLE_FILE).rename(folder / "weights.safetensors")
    (folder / SINGLE_FILE).symlink_to("weights.safetensors")
    assert set(read_index(folder)) == set(tensors())


def test_a_million_keys_are_refused_before_any_file_is_opened(tmp_path, monkeypatch):
    folder = sharded(tmp_path, {f"t{number}": "model.safetensors" for number in range(1_000_001)})
    monkeypatch.setattr(weights, "_checked", lambda folder, name: folder / name)
    monkeypatch.setattr(weights, "read_header", lambda file: pytest.fail(f"{file} was opened"))
    assert "1000001 tensors" in refusal(folder)


def test_an_index_too_large_is_refused_unread(tmp_path, monkeypatch):
    folder = sharded(tmp_path)
    with (folder / INDEX_FILE).open("r+b") as stream:
        stream.truncate(weights.MAX_INDEX_BYTES + 1)  # sparse: takes no disk
    monkeypatch.setattr(weights, "load_json", lambda text: pytest.fail("was read"))
    assert "more than" in refusal(folder)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "not a safetensors index"),
        (b"[]", "no weight_map"),
        (b"{}", "no weight_map"),
        (b'{"weight_map": {}}', "no weight_map"),
        (b'{"weight_map": []}', "no weight_map"),
        (b'{"weight_map": {"a": 1}}', "not a string"),
        (b'{"weight_map": {"a": null}}', "not a string"),
        (b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "twice"),
        (b'{"weight_map": {"a": NaN}}', "NaN"),
        (b'\xff\xfe{"weight_map"', "not a safetensors index"),
        (b'{"weight_map": ' + b"[" * 200_000, "nested too deep"),
        (b"1" * 10_000, "not a safetensors index"),
    ],
)
def test_an_index_that_is_not_one(tmp_path, text, why):
    folder = sharded(tmp_path)
    (folder / INDEX_FILE).write_bytes(text)
    assert why in refusal(folder)


def test_a_tensor_that_the_index_promises_is_not_in_its_shard(tmp_path):
    first = "model-00001-of-00002.safetensors"
    folder = sharded(tmp_path, {"a.weight": first, "c.bias": first, "ghost\n": first})
    message = refusal(folder)
    assert 'the first "ghost\\n"' in message
    assert first in message


def test_a_tensor_that_the_index_does_not_name_or_puts_elsewhere(tmp_path):
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    message = refusal(sharded(tmp_path, {"a.weight": first, "b.weight": second}))
    assert '"c.bias" is in it' in message
    assert '"b.weight" is in it' in refusal(
        sharded(tmp_path, {"a.weight": first, "c.bias": first, "b.weight": first, "d": second})
    )


# ---------------------------------------------------------------- T19: pickles


class Trap:
    """Unpickling one leaves a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.trace),))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "MODEL.BIN"])
def test_a_pickle_is_refused_unopened(tmp_path, name):
    folder, trace = tmp_path / "base", tmp_path / "trace"
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps(Trap(trace)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", lambda *_: pytest.fail("something was opened"))
        message = refusal(folder)
    assert name in message
    assert f"A.from_pretrained('{folder}').save_pretrained('{folder}-safe')" in message
    assert not trace.exists()
    pickle.loads((folder / name).read_bytes())  # the trap does work
    assert trace.exists()


def test_a_pickle_named_safetensors_is_never_unpickled(tmp_path):
    folder, trace = tmp_path / "base", tmp_path / "trace"
    folder.mkdir()
    (folder / SINGLE_FILE).write_bytes(pickle.dumps(Trap(trace)))
    refusal(folder)
    assert not trace.exists()


def test_a_folder_without_weights_or_without_being_there(tmp_path):
    assert "no model.safetensors" in refusal(tmp_path)
    assert "cannot be read" in refusal(tmp_path / "nowhere")


# ---------------------------------------------------------------- T20: broken headers


def small_file() -> bytes:
    return raw_file({"a": entry(), "b": entry("F16", [1, 2], [8, 12])}, bytes(range(12)))


def test_the_small_file_is_sound(tmp_path):
    (tmp_path / SINGLE_FILE).write_bytes(small_file())
    assert {name: (e.dtype, e.shape) for name, e in read_index(tmp_path).items()} == {
        "a": ("F32", (2,)),
        "b": ("F16", (1, 2)),
    }


def test_cut_at_every_byte(tmp_path):
    whole = small_file()
    for length in range(len(whole)):
        (tmp_path / SINGLE_FILE).write_bytes(whole[:length])
        assert "not a sound safetensors file" in refusal(tmp_path), length


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, len(small_file()) - 12, len(small_file()) - 1])
def test_a_cut_says_that_the_file_is_cut(tmp_path, length):
    (tmp_path / SINGLE_FILE).write_bytes(small_file()[:length])
    message = refusal(tmp_path)
    assert "cut short" in message or "outside the file" in message


def test_bit_flips_in_the_header_are_refused_or_change_the_fingerprint(tmp_path):
    folder = single(tmp_path)
    file = folder / SINGLE_FILE
    whole, truth = file.read_bytes(), fingerprint(folder)
    sensible = {name: tensor.clone() for name, tensor in load_file(file).items()}
    first_data = 8 + struct.unpack("<Q", whole[:8])[0]
    generator = random.Random(0)
    refused = 0
    for _ in range(500):
        broken = bytearray(whole)
        broken[generator.randrange(first_data)] ^= 1 << generator.randrange(8)
        file.write_bytes(broken)
        try:
            changed = fingerprint(folder) != truth
        except CheckpointError:
            refused += 1
            continue
        # what is neither refused nor another base is the same base, byte for byte
        assert changed or all(torch.equal(load_file(file)[name], tensor) for name, tensor in sensible.items())
    assert refused > 300


def test_bit_flips_in_the_data_change_the_fingerprint(tmp_path):
    folder = single(tmp_path)
    file = folder / SINGLE_FILE
    whole = file.read_bytes()
    first_data = 8 + struct.unpack("<Q", whole[:8])[0]
    seen = {fingerprint(folder)}
    for position in range(first_data, len(whole)):
        broken = bytearray(whole)
        broken[position] ^= 1 << position % 8
        file.write_bytes(broken)
        seen.add(fingerprint(folder))
    assert len(seen) == 1 + len(whole) - first_data


BROKEN = [
    ("overlap", {"a": entry(), "b": entry(offsets=(4, 12))}, 12, "shares bytes"),
    ("same bytes", {"a": entry(), "b": entry()}, 8, "shares bytes"),
    ("gap", {"a": entry(), "b": entry(offsets=(12, 20))}, 20, "leaves a gap"),
    ("gap at the start", {"a": entry(offsets=(4, 12))}, 12, "leaves a gap"),
    ("bytes left over", {"a": entry()}, 9, "belong to no tensor"),
    ("beyond the end", {"a": entry()}, 7, "outside the file"),
    ("backwards", {"a": entry(offsets=(8, 0))}, 8, "outside the file"),
    ("negative offset", {"a": entry(offsets=(-8, 0))}, 8, "outside the file"),
    ("one offset", {"a": entry(offsets=(0,))}, 8, "outside the file"),
    ("offset as text", {"a": entry(offsets=("0", "8"))}, 8, "outside the file"),
    ("offset as float", {"a": entry(offsets=(0, 8.0))}, 8, "outside the file"),
    ("offset as bool", {"a": entry("U8", [1], [False, True])}, 1, "outside the file"),
    ("negative size", {"a": entry(shape=(-2, -1))}, 8, "shape"),
    ("size as float", {"a": entry(shape=(2.0,))}, 8, "shape"),
    ("size as bool", {"a": entry("F64", shape=(True,))}, 8, "shape"),
    ("shape as number", {"a": entry(shape=2)}, 8, "shape"),
    ("65 dimensions", {"a": entry(shape=[1] * 64 + [2])}, 8, "shape"),
    ("size over 64 bits", {"a": entry(shape=[2**64])}, 8, "shape"),
    ("overflowing product", {"a": entry(shape=[2**62, 2**62, 2])}, 8, "not those of"),
    ("overflow hidden by a zero", {"a": entry(shape=[2**62, 2**62, 0], offsets=(0, 0))}, 0, "not those of"),
    ("terabytes", {"a": entry(shape=[2**40], offsets=(0, 2**42))}, 8, "outside the file"),
    ("wrong product", {"a": entry(shape=[3])}, 8, "not those of"),
    ("unknown dtype", {"a": entry("F4")}, 8, 'dtype "F4"'),
    ("dtype as list", {"a": entry(["F32"])}, 8, "dtype"),
    ("an extra field", {"a": entry(more=1)}, 8, "nothing else"),
    ("a field short", {"a": {"dtype": "F32", "shape": [2]}}, 8, "nothing else"),
    ("no object", {"a": [1]}, 8, "nothing else"),
    ("metadata of numbers", {"__metadata__": {"a": 1}, "a": entry()}, 8, "__metadata__"),
    ("metadata as list", {"__metadata__": [], "a": entry()}, 8, "__metadata__"),
    ("name of half a character", {"\ud800": entry()}, 8, "Unicode"),
    (
        "the same name twice",
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
        2,
        "twice",
    ),
    ("the same field twice", b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', 1, "twice"),
    ("not JSON", b'{"a"', 0, "not JSON"),
    ("an array", b"[]", 0, "not JSON"),
    ("a space before", b' {"a":1}', 0, "not JSON"),
    ("not UTF-8", b'{"\xff": 1}', 0, "not JSON"),
    ("NaN", b'{"a": NaN}', 0, "not JSON"),
    ("a bomb of brackets", b'{"a":' + b"[" * 200_000, 0, "nested too deep"),
    ("a number of 10000 digits", b'{"a":' + b"9" * 10_000 + b"}", 0, "not JSON"),
    ("nothing in it", {}, 0, "no tensor"),
]


@pytest.mark.parametrize(("fields", "size", "why"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_a_header_that_lies_is_refused(tmp_path, fields, size, why):
    (tmp_path / SINGLE_FILE).write_bytes(raw_file(fields, bytes(size)))
    assert why in refusal(tmp_path)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40, 100_000_001])
def test_a_header_length_is_checked_before_it_is_allocated(tmp_path, length):
    with (tmp_path / SINGLE_FILE).open("wb") as stream:
        stream.write(struct.pack("<Q", length))
        stream.truncate(100_000_100)  # sparse
    tracemalloc.start()
    refusal(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_more_tensors_than_any_checkpoint_has(tmp_path, monkeypatch):
    monkeypatch.setattr(header, "MAX_TENSORS", 1)
    (tmp_path / SINGLE_FILE).write_bytes(raw_file({"a": entry(), "b": entry(offsets=(8, 16))}, bytes(16)))
    assert "names 2 tensors" in refusal(tmp_path)


def test_padding_metadata_and_empty_tensors_are_part_of_the_format(tmp_path):
    fields = {"__metadata__": {"format": "pt"}, "z": entry(shape=[0], offsets=(8, 8)), "a": entry()}
    (tmp_path / SINGLE_FILE).write_bytes(raw_file(json.dumps(fields).encode() + b"   ", bytes(8)))
    assert [(e.name, e.shape) for e in read_header(tmp_path / SINGLE_FILE)] == [("a", (2,)), ("z", (0,))]


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("any") / "x.safetensors"
    for content in (data, raw_file(data), raw_file(b"{" + data)):
        file.write_bytes(content)
        try:
            found = read_header(file)
        except CheckpointError:
            continue
        assert found == []


@settings(deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(["F32", "BF16", "U8", "I64"]), st.lists(st.integers(0, 4), max_size=3)),
        min_size=1,
        max_size=6,
    ),
    st.randoms(use_true_random=False),
)
def test_whatever_is_laid_out_by_the_rules_is_read(tmp_path_factory, layout, shuffler):
    fields, position = {}, 0
    for name, (dtype, shape) in layout.items():
        size = header.ITEM_BYTES[dtype] * int(torch.Size(shape).numel())
        fields[name] = entry(dtype, shape, (position, position + size))
        position += size
    order = list(fields)
    shuffler.shuffle(order)
    folder = tmp_path_factory.mktemp("laid")
    (folder / SINGLE_FILE).write_bytes(raw_file({name: fields[name] for name in order}, bytes(position)))
    found = read_index(folder)
    assert {name: (e.dtype, list(e.shape)) for name, e in found.items()} == {n: (d, s) for n, (d, s) in layout.items()}
    assert all(read_tensor(e).shape == e.shape for e in found.values())


def test_hostile_names_do_not_reach_the_terminal(tmp_path):
    (tmp_path / SINGLE_FILE).write_bytes(raw_file({"\x1b[31m\n" + "x" * 10_000: entry("F5")}, bytes(8)))
    message = refusal(tmp_path)
    assert "\x1b" not in message
    assert len(message) < 500 + len(str(tmp_path))


# ---------------------------------------------------------------- the hub cache


def hub_snapshot(cache_folder: Path, *, shared: bool = False) -> Path:
    """`sharded` as huggingface_hub stores it: links into blobs, with `shared` through the store of all repositories."""
    repository = cache_folder / "models--owner--name"
    snapshot = repository / "snapshots" / COMMIT
    sharded(snapshot)
    for file in sorted(snapshot.iterdir()):
        blob = repository / "blobs" / hashlib.sha256(file.name.encode()).hexdigest()
        stored = cache_folder / "blobs" / "ab" / blob.name if shared else blob
        for folder in (blob.parent, stored.parent):
            folder.mkdir(parents=True, exist_ok=True)
        file.rename(stored)
        if shared:
            blob.symlink_to(os.path.relpath(stored, blob.parent))
        file.symlink_to(os.path.relpath(blob, file.parent))
    return snapshot


@pytest.mark.parametrize("shared", [False, True])
def test_a_snapshot_of_the_hub_cache_is_read_through_its_links(tmp_path, shared):
    snapshot = hub_snapshot(tmp_path / "hub", shared=shared)
    found = read_index(snapshot)
    assert torch.equal(read_tensor(found["a.weight"]), tensors()["a.weight"])
    assert found["a.weight"].file == snapshot / "model-00001-of-00002.safetensors"
    assert fingerprint(snapshot) == fingerprint(single(tmp_path / "plain"))


def test_a_folder_reached_through_a_link_is_read(tmp_path):
    (tmp_path / "link").symlink_to(hub_snapshot(tmp_path / "hub"))
    assert set(read_index(tmp_path / "link")) == set(tensors())


def test_a_snapshot_may_not_link_to_another_repository(tmp_path):
    snapshot = hub_snapshot(tmp_path / "hub")
    other = single(tmp_path / "hub" / "models--owner--other" / "blobs") / SINGLE_FILE
    shard = snapshot / "model-00002-of-00002.safetensors"
    shard.unlink()
    shard.symlink_to(other)
    assert "a symlink to a file outside" in refusal(snapshot)


# ---------------------------------------------------------------- the fingerprint


def test_the_fingerprint_is_the_sha256_it_says_it_is(tmp_path):
    """Written out once by hand: a change of the recipe orphans every editor and delta in the world."""
    whole = tensors()
    expected = hashlib.sha256()
    for line, name in [
        (b'["a.weight", "F32", [2, 3]]\n', "a.weight"),
        (b'["b.weight", "BF16", [4]]\n', "b.weight"),
        (b'["c.bias", "I64", [2]]\n', "c.bias"),
    ]:
        expected.update(line + whole[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    assert fingerprint(single(tmp_path)) == expected.hexdigest()


def test_the_fingerprint_does_not_see_sharding_order_or_metadata(tmp_path):
    one, two, three = single(tmp_path / "one"), sharded(tmp_path / "two"), tmp_path / "three"
    three.mkdir()
    save_file(dict(reversed(tensors().items())), three / SINGLE_FILE, metadata={"format": "pt"})
    assert fingerprint(one) == fingerprint(two) == fingerprint(three)


def test_the_fingerprint_does_not_see_the_order_of_bytes_in_the_file(tmp_path):
    for name, order in (("one", ("a", "b")), ("two", ("b", "a"))):
        (tmp_path / name).mkdir()
        data = {"a": b"aaaaaaaa", "b": b"bbbbbbbb"}
        fields = {key: entry(offsets=(8 * place, 8 * place + 8)) for place, key in enumerate(order)}
        (tmp_path / name / SINGLE_FILE).write_bytes(raw_file(fields, b"".join(data[key] for key in order)))
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")


def one_tensor(tensor: torch.Tensor, name: str = "w") -> dict[str, torch.Tensor]:
    return {name: tensor}


@pytest.mark.parametrize(
    "other",
    [
        one_tensor(torch.tensor([1.0, 2.0, 3.0, 4.0]).nextafter(torch.tensor(9.0))),
        one_tensor(torch.tensor([1.0, 2.0, 3.0, 4.0]).view(torch.int32)),
        one_tensor(torch.tensor([[1.0, 2.0], [3.0, 4.0]])),
        one_tensor(torch.tensor([1.0, 2.0, 3.0, 4.0]), "v"),
        one_tensor(torch.tensor([1.0, 2.0, 3.0])),
        {**one_tensor(torch.tensor([1.0, 2.0, 3.0, 4.0])), "empty": torch.empty(0)},
    ],
    ids=["byte", "dtype", "shape", "name", "size", "another tensor"],
)
def test_the_fingerprint_sees_every_change_of_content(tmp_path, other):
    one = single(tmp_path / "one", one_tensor(torch.tensor([1.0, 2.0, 3.0, 4.0])))
    assert fingerprint(one) != fingerprint(single(tmp_path / "two", other))


def test_the_fingerprint_is_computed_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "CHUNK_BYTES", 1 << 16)
    folder = single(tmp_path, {"big": torch.arange(1 << 21, dtype=torch.int32), "small": torch.ones(3)})
    torch.ones(1)
    tracemalloc.start()
    small_chunks = fingerprint(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20  # of 8 MiB
    monkeypatch.undo()
    assert fingerprint(folder) == small_chunks


# ---------------------------------------------------------------- its cache


def aged(folder: Path) -> Path:
    """Files old enough to be trusted to change their mtime when they change."""
    for file in folder.iterdir():
        os.utime(file, (1_600_000_000, 1_600_000_000))
    return folder


@pytest.fixture
def digests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """One item for every time that weights are hashed."""
    monkeypatch.setenv("MALMEN_HOME", str(tmp_path / "home"))
    calls: list[int] = []
    real = weights._digest
    monkeypatch.setattr(weights, "_digest", lambda entries: (calls.append(1), real(entries))[1])
    return calls


def test_a_fingerprint_is_remembered(tmp_path, digests):
    folder = aged(sharded(tmp_path / "base"))
    first = fingerprint(folder)
    kept = list((tmp_path / "home" / "fingerprints").iterdir())
    assert [file.read_text() for file in kept] == [first]
    assert fingerprint(folder) == first
    assert len(digests) == 1


def test_changed_bytes_are_noticed_even_with_the_old_size_and_mtime(tmp_path, digests):
    folder = aged(single(tmp_path / "base"))
    first = fingerprint(folder)
    file = folder / SINGLE_FILE
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    file.write_bytes(changed)
    aged(folder)
    assert fingerprint(folder) != first
    assert len(digests) == 2


def test_a_file_written_just_now_is_not_remembered(tmp_path, digests):
    folder = single(tmp_path / "base")
    assert fingerprint(folder) == fingerprint(folder)
    assert len(digests) == 2


def test_weights_that_change_while_they_are_hashed_are_not_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("MALMEN_HOME", str(tmp_path / "home"))
    folder = aged(single(tmp_path / "base"))
    cache.cached_digest([folder / SINGLE_FILE], lambda: (os.utime(folder / SINGLE_FILE, (1, 1)), "0" * 64)[1])
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("text", [b"", b"zz", b"A" * 64, b"0" * 63, b"0" * 65, b"\xff" * 64])
def test_a_broken_cache_is_ignored_and_mended(tmp_path, digests, text):
    folder = aged(single(tmp_path / "base"))
    truth = fingerprint(folder)
    kept = next((tmp_path / "home" / "fingerprints").iterdir())
    kept.write_bytes(text)
    assert fingerprint(folder) == truth
    assert kept.read_text() == truth
    assert len(digests) == 2


def test_a_home_that_cannot_be_written_costs_time_only(tmp_path, digests):
    (tmp_path / "home").write_text("a file where the folder should be")
    folder = aged(single(tmp_path / "base"))
    assert fingerprint(folder) == fingerprint(folder)
    assert len(digests) == 2


def test_a_disk_that_fills_up_leaves_no_half_entry(tmp_path, digests, monkeypatch):
    folder = aged(single(tmp_path / "base"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "rename", full)
    assert len(fingerprint(folder)) == 64
    assert list((tmp_path / "home" / "fingerprints").iterdir()) == []


def test_weights_that_vanish_are_a_checkpoint_error(tmp_path, monkeypatch):
    folder = single(tmp_path / "base")
    gone = TensorEntry("a", folder / "gone.safetensors", "F32", (1,), 8, 12)
    monkeypatch.setattr(weights, "read_index", lambda folder: {"a": gone})
    with pytest.raises(CheckpointError, match="cannot be read"):
        fingerprint(folder)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    folder = single(tmp_path / "base")

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    assert refusal(folder).endswith("cannot be read: Permission denied")
