"""Files that somebody else wrote, mangled: every reader answers with its own error in a line, or with something sound.

By default a few dozen cases a reader; `make fuzz` runs for MALMEN_FUZZ_SECONDS in all (600 by default) from a new seed,
which it prints. The seeds under `corpus/` are made up. A crash that is found is fixed and kept below as a case.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from malmen_cli.artifact.delta import read_delta
from malmen_cli.artifact.editors import load_editor
from malmen_cli.artifact.tensors import raw_bytes
from malmen_cli.base.config import check_sizes, read_config
from malmen_cli.base.gguf_header import check_gguf
from malmen_cli.base.sealed import read_sealed, sealed
from malmen_cli.base.weights import read_index, read_tensor
from malmen_cli.editing.settings import MalmenSettings, from_mapping
from malmen_cli.editing.spec import read_spec
from malmen_cli.exceptions import CheckpointError, EditorError, FactsError, NumericsError, SpecError
from malmen_cli.facts.contradictions import contradictions
from malmen_cli.facts.files import canonical_line, read_facts

CORPUS = Path(__file__).with_name("corpus")
SECONDS = float(os.environ.get("MALMEN_FUZZ_SECONDS", "0"))
EXAMPLES = 500 if SECONDS else 30
SEED = int(os.environ.get("MALMEN_FUZZ_SEED", time.time_ns() % 10**6 if SECONDS else 0))
LONGEST_LINE = 1000  # characters of one problem: a message never grows with the file

# What tends to be believed: lengths, separators, words of other formats, numbers at an edge.
WORDS = [
    *(value.to_bytes(8, "little") for value in (0, 1, 2**31, 2**32, 2**60, 2**63, 2**64 - 1)),
    *b'{ } [ ] , : " \\ \n \r \t \0 \xff \xef\xbb\xbf \xed\xa0\x80'.split(b" "),
    *b"- --- &a *a <<: !!python/object: ../ / null NaN Infinity".split(b" "),
    *(str(value).encode() for value in (-1, 2**31, 2**63, 10**30, 1e308)),
    b"[" * 5000, b'{"a":' * 5000, b"9" * 5000, b"\xe2\x80\xa8", b'"prompt": "x", ', b'"__proto__": 1, ',
]  # fmt: skip
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 3), st.just(2**60), st.floats(allow_nan=False),
    st.text(max_size=8), st.sampled_from(["", " ", "../x", "/etc/passwd", "dense", "in_out", "F32", "x" * 200_000]),
)  # fmt: skip
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
Reader = Callable[[Path, Path], object]


@st.composite
def mangled_bytes(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A seed with pieces cut out, doubled, overwritten or put in, up to six of them."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 40)))
        kind = draw(st.sampled_from(["cut", "double", "word", "insert", "flip", "truncate"]))
        if kind == "cut":
            del data[start:end]
        elif kind == "double":
            data[start:start] = data[start:end] * draw(st.integers(1, 50))
        elif kind == "word":
            data[start:end] = draw(st.sampled_from(WORDS))
        elif kind == "insert":
            data[start:start] = draw(st.binary(max_size=20))
        elif kind == "flip" and start < len(data):
            data[start] ^= 1 << draw(st.integers(0, 7))
        elif kind == "truncate":
            del data[start:]
    return bytes(data)


@st.composite
def mangled_json(draw: st.DrawFn, seeds: list[Any]) -> Any:
    """A seed with up to three of its parts replaced, dropped, renamed or doubled."""
    root = [json.loads(json.dumps(draw(st.sampled_from(seeds))))]
    for _ in range(draw(st.integers(1, 3))):
        holder, key = draw(st.sampled_from(_places(root)))
        kind = draw(st.sampled_from(["value", "value", "drop", "double", "rename"]))
        if kind == "value" or holder is root:
            holder[key] = draw(VALUES)
        elif kind == "drop":
            del holder[key]
        elif isinstance(holder, list):
            holder.insert(key, holder[key])
        elif kind == "rename":
            holder[draw(st.text(max_size=6) | st.just("x" * 20_000))] = holder.pop(key)
        else:
            holder[key] = [holder[key], holder[key]]
    return root[0]


def _places(value: Any) -> list[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [place for key in keys for place in ((value, key), *_places(value[key]))]


# ---------------------------------------------------------------- readers: what they may say, and what must hold


def facts(file: Path, _: Path) -> None:
    """What is read is written and read back the same."""
    read = read_facts(str(file))
    again = read_facts("-", stdin=io.BytesIO("".join(map(canonical_line, read.facts)).encode()))
    assert (again.facts, again.sha256) == (read.facts, read.sha256)
    list(contradictions(read.facts))


def index(file: Path, folder: Path) -> None:
    """No tensor is found outside the folder."""
    file.rename(folder / "model.safetensors.index.json")
    seed = (CORPUS / "header" / "two.safetensors").read_bytes()
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (folder / name).write_bytes(seed)
    assert all(entry.file.resolve().parent == folder.resolve() for entry in read_index(folder).values())


def header(file: Path, folder: Path) -> None:
    """Whatever is accepted the safetensors library accepts too, with the same numbers."""
    from safetensors.torch import load_file

    file.rename(folder / "model.safetensors")
    ours = {name: read_tensor(entry) for name, entry in read_index(folder).items()}
    assert _plain(ours) == _plain(load_file(folder / "model.safetensors"))


def _plain(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: (t.dtype, t.shape, bytes(raw_bytes(t))) for name, t in tensors.items()}


def config(file: Path, folder: Path) -> None:
    file.rename(folder / "config.json")
    check_sizes(folder, read_config(folder), 12)


def manifest(file: Path, _: Path) -> None:
    """Only what was sealed is believed."""
    assert sealed(read_sealed(file)) == file.read_bytes()


def delta(file: Path, folder: Path) -> None:
    """A stranger's manifest with a right seal."""
    shutil.copy(CORPUS / "delta" / "delta.safetensors", folder)
    (folder / "malmen.json").write_bytes(sealed(json.loads(file.read_bytes())))
    shift, _ = read_delta(folder, fingerprint=None)
    assert all(module.matrix().isfinite().all() for module in shift.modules.values())


def editor(file: Path, folder: Path) -> None:
    """A stranger's description with a right seal."""
    shutil.copy(CORPUS / "editor" / "editor.safetensors", folder)
    (folder / "editor.json").write_bytes(sealed(json.loads(file.read_bytes())))
    _, description = load_editor(folder)
    given = description.get("settings")
    if isinstance(given, dict):
        from_mapping(MalmenSettings, given, "settings")


def _bytes(pattern: str) -> st.SearchStrategy[bytes]:
    return mangled_bytes([file.read_bytes() for file in sorted(CORPUS.glob(pattern))])


def _json(pattern: str) -> st.SearchStrategy[bytes]:
    """Cases that are JSON all through; an object where the seeds are objects, as a seal is put on them."""
    seeds = [json.loads(file.read_bytes()) for file in sorted(CORPUS.glob(pattern))]
    kept = mangled_json(seeds).filter(lambda value: isinstance(value, type(seeds[0])))
    return kept.map(lambda value: json.dumps(value).encode())


# name -> (cases, ending of the file, reader, errors it may raise)
TARGETS: dict[str, tuple[st.SearchStrategy[bytes], str, Reader, tuple[type[Exception], ...]]] = {
    "facts-jsonl": (_bytes("facts/*.jsonl"), ".jsonl", facts, (FactsError,)),
    "facts-json": (_bytes("facts/*.json"), ".json", facts, (FactsError,)),
    "facts-yaml": (_bytes("facts/*.yaml"), ".yaml", facts, (FactsError,)),
    "facts-csv": (_bytes("facts/*.csv"), ".csv", facts, (FactsError,)),
    "facts-sniffed": (_bytes("facts/*"), ".facts", facts, (FactsError,)),
    "dialects": (_json("facts/*.json"), ".json", facts, (FactsError,)),
    "index": (_bytes("index/*"), ".json", index, (CheckpointError,)),
    "index-json": (_json("index/*"), ".json", index, (CheckpointError,)),
    "safetensors": (_bytes("header/*"), ".safetensors", header, (CheckpointError,)),
    "gguf": (_bytes("gguf/*"), ".gguf", lambda file, _: check_gguf(file), (CheckpointError,)),
    "config": (_bytes("config/*"), ".json", config, (CheckpointError,)),
    "config-json": (_json("config/*"), ".json", config, (CheckpointError,)),
    "malmen.json": (_bytes("delta/malmen.json"), ".json", manifest, (EditorError,)),
    "editor.json": (_bytes("editor/editor.json"), ".json", manifest, (EditorError,)),
    "delta": (_json("delta/malmen.json"), ".json", delta, (EditorError, NumericsError)),
    "editor": (_json("editor/editor.json"), ".json", editor, (EditorError, NumericsError, SpecError)),
    "spec": (_bytes("spec/*"), ".yaml", lambda file, _: read_spec(file), (SpecError, FactsError)),
}


def read(name: str, data: bytes, root: Path) -> None:
    """One case: read, or refused in lines that do not grow with the file."""
    _, ending, reader, expected = TARGETS[name]
    folder = root / f"{random.getrandbits(64):x}"
    folder.mkdir()
    file = folder / f"case{ending}"
    file.write_bytes(data)
    said = ""
    try:
        reader(file, folder)
    except expected as error:
        said = str(error)
    finally:
        shutil.rmtree(folder)
    assert len(said.splitlines()) <= 20
    assert max(map(len, said.splitlines()), default=0) <= LONGEST_LINE


@pytest.mark.parametrize("name", TARGETS)
def test_mangled_files(name: str, tmp_path: Path) -> None:
    until = time.monotonic() + SECONDS / len(TARGETS)
    run = hypothesis.given(TARGETS[name][0])(lambda data: read(name, data, tmp_path))
    run = settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))(run)
    cases = 0
    while not cases or time.monotonic() < until:
        hypothesis.seed(SEED + cases)(run)()
        cases += EXAMPLES
    print(f"{name}: {cases} cases from seed {SEED}")


def _with(pattern: str, **changes: Any) -> bytes:
    return json.dumps(json.loads((CORPUS / pattern).read_bytes()) | changes).encode()


KEPT = {
    "index-long-name": ("index", _with("index/two.json", weight_map={"a": "m" * 990 + ".safetensors"})),
    "delta-long-format": ("delta", _with("delta/malmen.json", format="x" * 2000)),
    "spec-long-method": ("spec", b"method: m" + b"[" * 5000 + b"\n"),
    "spec-long-key": ("spec", b"m" * 5000 + b": 1\n"),
    "spec-long-value": ("spec", b"method: malmen\nsettings: {tokens: " + b"m" * 5000 + b"}\n"),
    "delta-long-module": ("delta", _with("delta/malmen.json", modules={"x" * 2000: {}})),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_was_found_once(name: str, tmp_path: Path) -> None:
    target, data = KEPT[name]
    read(target, data, tmp_path)


SOUND = {
    "facts": facts,
    "header": header,
    "config": config,
    "delta/malmen.json": manifest,
    "editor/editor.json": manifest,
}


@pytest.mark.parametrize("name", SOUND)
def test_the_seeds_themselves_are_read(name: str, tmp_path: Path) -> None:
    """A corpus that no reader takes would only test the first line of each."""
    seeds = sorted((CORPUS / name).iterdir()) if (CORPUS / name).is_dir() else [CORPUS / name]
    for seed in seeds:
        folder = tmp_path / seed.name
        folder.mkdir()
        SOUND[name](Path(shutil.copy(seed, folder / f"case{seed.suffix}")), folder)


def test_the_seeds_of_gguf_and_specs_are_read() -> None:
    check_gguf(CORPUS / "gguf" / "small.gguf")
    assert [read_spec(file).method for file in sorted((CORPUS / "spec").iterdir())] == ["malmen", "memit"]
