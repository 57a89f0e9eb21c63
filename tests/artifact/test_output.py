"""T25: what may not be an output is refused before the work, and nothing is touched."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from malmen_cli.artifact.adapter import write_adapter
from malmen_cli.artifact.delta import write_delta
from malmen_cli.artifact.editors import save_editor
from malmen_cli.artifact.manifest import sealed
from malmen_cli.artifact.merged import write_merged
from malmen_cli.artifact.output import check_disk, check_output, plan_bytes
from malmen_cli.editing.shift import Shift
from malmen_cli.exceptions import OutputError


def snapshot(root: Path) -> list[tuple[str, int, int]]:
    return sorted((str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in root.rglob("*"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    return tmp_path / "base"


def refused(tmp_path: Path, out: Path, base: Path | None, *, force: bool, match: str) -> None:
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match=match):
        check_output(out, base_folder=base, force=force)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("inside", ["", "out", "deep/er/out"])
def test_the_base_folder_and_what_is_in_it(tmp_path: Path, base: Path, inside: str, force: bool) -> None:
    (base / "malmen.json").write_text("{}")  # written by us, and still not to be replaced by itself
    match = "use --force" if not inside and not force else "inside the base"
    refused(tmp_path, base / inside, base, force=force, match=match)


def test_the_base_by_another_name(tmp_path: Path, base: Path) -> None:
    (tmp_path / "alias").symlink_to(base)
    refused(tmp_path, tmp_path / "alias" / "out", base, force=True, match="inside the base")
    refused(tmp_path, base / ".." / "base" / "out", base, force=True, match="inside the base")
    refused(tmp_path, base / "out", tmp_path / "alias", force=True, match="inside the base")


def test_a_folder_around_the_base(tmp_path: Path, base: Path) -> None:
    (tmp_path / "malmen.json").write_text("{}")
    refused(tmp_path, tmp_path, base, force=True, match="contains the base")


@pytest.mark.parametrize(
    ("variable", "below"),
    [("HF_HOME", "hub/x"), ("HF_HUB_CACHE", "x"), ("HUGGINGFACE_HUB_CACHE", "x"), ("MALMEN_HOME", "bases/x")],
)
def test_caches(tmp_path: Path, variable: str, below: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, str(tmp_path / "cache"))
    refused(tmp_path, tmp_path / "cache" / below, None, force=True, match="cache")


def test_the_hub_cache_of_a_home_without_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    out = tmp_path / ".cache" / "huggingface" / "hub" / "models--x"
    refused(tmp_path, out, None, force=True, match="Hugging Face cache")


@pytest.mark.parametrize("force", [False, True])
def test_files_and_links(tmp_path: Path, base: Path, force: bool) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "full-link").symlink_to(base)
    refused(tmp_path, tmp_path / "file", base, force=force, match="a file is in the way")
    refused(tmp_path, tmp_path / "file" / "out", base, force=force, match="is a file, not a folder")
    refused(tmp_path, tmp_path / "link", base, force=force, match="symbolic link")
    refused(tmp_path, tmp_path / "full-link", base, force=force, match="symbolic link")


def test_folders_that_are_not_empty(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    check_output(out, base_folder=None, force=False)
    (out / "thesis.tex").write_text("x")
    for force in (False, True):
        refused(tmp_path, out, None, force=force, match="not written by malmen.*delete it yourself")
    (out / "malmen.json").write_text("{}")
    refused(tmp_path, out, None, force=False, match="use --force")
    check_output(out, base_folder=None, force=True)


@pytest.mark.parametrize("name", ["targets.json", "statistics.json", "editor.json"])
def test_a_file_of_somebody_else_s_by_our_name_is_no_licence(tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text('{"seal": "a grey one", "targets": [1, 2]}')
    refused(tmp_path, tmp_path / "out", None, force=True, match="not written by malmen")
    (tmp_path / "out" / name).unlink()
    os.mkfifo(tmp_path / "out" / name)  # reading it would never end
    with pytest.raises(OutputError, match="not written by malmen"):
        check_output(tmp_path / "out", base_folder=None, force=True)
    (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / name).write_bytes(sealed({"format": name}))
    check_output(tmp_path / "out", base_folder=None, force=True)


def test_the_root_folder() -> None:
    with pytest.raises(OutputError, match="root folder"):
        check_output(Path("/"), base_folder=None, force=True)


def test_a_parent_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere, so permissions do not do
    refused(tmp_path, tmp_path / "out", None, force=False, match="not writable")


def test_missing_parents_are_fine_and_not_created(tmp_path: Path) -> None:
    check_output(tmp_path / "x" / "y" / "out", base_folder=None, force=False)
    assert os.listdir(tmp_path) == []


def test_every_writer_refuses(tmp_path: Path, tiny_gpt2: Path, make_shift: Callable[..., Shift]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    before = snapshot(tmp_path)
    shift = make_shift(tiny_gpt2, 2)
    writers: list[Callable[..., Any]] = [
        lambda: write_delta(out, shift, {}, card="", force=True),
        lambda: write_merged(out, tiny_gpt2, shift, {}, card="", force=True),
        lambda: write_adapter(out, shift, {}, base_name="b", card="", force=True),
        lambda: save_editor(out, {}, {}, force=True),
    ]
    for write in writers:
        with pytest.raises(OutputError, match="not written by malmen"):
            write()
    with pytest.raises(OutputError, match="inside the base"):
        write_merged(tiny_gpt2 / "x", tiny_gpt2, shift, {}, card="", force=True)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("rank", [None, 3, 100])
def test_planned_bytes_are_enough_and_not_much_more(
    tmp_path: Path, sharded: Path, rank: int | None, make_shift: Callable[..., Shift]
) -> None:
    shift = make_shift(sharded, rank)
    shapes = [tuple(module.matrix().shape) for module in shift.modules.values()]
    write_merged(tmp_path / "merged", sharded, shift, {}, card="", force=False)
    write_delta(tmp_path / "delta", shift, {}, card="", force=False)
    write_adapter(tmp_path / "adapter", shift, {}, base_name="b", card="", force=False)
    for format in ("merged", "delta", "adapter"):
        planned = plan_bytes(format, base_folder=sharded, shapes=shapes, rank=rank)
        written = sum(path.stat().st_size for path in (tmp_path / format).iterdir())
        slack = 2 << 20 if format != "delta" or rank != 100 else 3 << 20
        assert written <= planned < written + slack


def test_disk(tmp_path: Path) -> None:
    check_disk(tmp_path / "not" / "there", 1)
    with pytest.raises(OutputError, match="bytes are needed and"):
        check_disk(tmp_path / "not" / "there", 1 << 60)
