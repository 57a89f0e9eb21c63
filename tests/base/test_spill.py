"""Tensors on disk: bit by bit what was given, within their limit, and gone when nobody needs them."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from malmen_cli.base import spill
from malmen_cli.base.cache import cache_home
from malmen_cli.base.spill import Spill

CPU = torch.device("cpu")
EACH = 4 * 8 * 4  # bytes of one tensor below


def tensors(*keys: int) -> dict[int, torch.Tensor]:
    return {key: torch.randn(4, 8, generator=torch.Generator().manual_seed(key)) for key in keys}


def folders() -> list[Path]:
    place = cache_home() / "spill"
    return sorted(place.iterdir()) if place.exists() else []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_is_what_was_kept(dtype: torch.dtype) -> None:
    kept, given = Spill(1 << 20), {key: tensor.to(dtype) for key, tensor in tensors(1, 2, 3).items()}
    kept.add(given)
    for key, tensor in given.items():
        found = kept.get(key, CPU)
        assert found is not None
        assert found.dtype == dtype
        assert torch.equal(found, tensor)
    assert kept.get(4, CPU) is None


def test_a_slice_of_something_larger_takes_its_own_bytes_alone() -> None:
    kept, whole = Spill(1 << 20), torch.arange(1 << 16).reshape(256, 256)
    kept.add({"part": whole[3:5, :7]})
    (folder,) = folders()
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1024
    assert torch.equal(kept.get("part", CPU), whole[3:5, :7])


def test_the_limit_holds_and_the_least_recently_read_go_first() -> None:
    kept = Spill(4 * EACH)
    kept.add(tensors(1, 2))
    kept.add(tensors(3, 4))
    assert kept.get(1, CPU) is not None
    kept.add(tensors(5, 6))  # in place of 3 and 4, which nobody asked for
    assert [key for key in range(1, 7) if kept.get(key, CPU) is not None] == [1, 2, 5, 6]
    (folder,) = folders()
    assert len(list(folder.iterdir())) == 2
    kept.add(tensors(7, 8, 9, 10, 11))  # more than all of it
    assert len(kept) == 4


def test_a_key_kept_already_is_not_written_again() -> None:
    kept = Spill(1 << 20)
    kept.add(tensors(1, 2))
    kept.add(tensors(1, 2))
    (folder,) = folders()
    assert len(list(folder.iterdir())) == 1


def test_nothing_is_made_without_need_and_nothing_stays() -> None:
    kept = Spill(1 << 20)
    kept.add({})
    assert folders() == []
    kept.add(tensors(1))
    assert len(folders()) == 1
    del kept
    gc.collect()
    assert folders() == []


def test_a_file_that_vanished_or_broke_costs_time_only() -> None:
    kept = Spill(1 << 20)
    kept.add(tensors(1, 2))
    kept.add(tensors(3))
    (folder,) = folders()
    first, second = sorted(folder.iterdir())
    first.unlink()
    second.write_bytes(b"nonsense")
    assert [kept.get(key, CPU) for key in (1, 2, 3)] == [None] * 3
    kept.add(tensors(1))
    assert torch.equal(kept.get(1, CPU), tensors(1)[1])


def test_a_full_disk_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Spill(1 << 20)
    monkeypatch.setattr(spill.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, spill.LEFT_FREE))
    kept.add(tensors(1))
    assert kept.get(1, CPU) is None


def test_a_failing_disk_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spill, "save_file", fail)
    kept = Spill(1 << 20)
    kept.add(tensors(1))
    assert kept.get(1, CPU) is None
    assert len(kept) == 0


def test_what_a_killed_process_left_is_cleaned_and_a_living_one_s_is_not() -> None:
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    place = cache_home() / "spill"
    dead, alive, other = place / f".malmen-{int(child.stdout)}-x", place / ".malmen-1-x", place / "mine"
    for folder in (dead, alive, other):
        folder.mkdir(parents=True)
    Spill(1 << 20).add(tensors(1))
    assert not dead.exists()
    assert alive.exists()
    assert other.exists()
