"""Several processes of one run: ranks that are forked, so that nothing is imported again; they meet on the loopback
device."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest_socket

from malmen_cli.base import ranks
from malmen_cli.cli.errors import main


def free_port() -> int:
    pytest_socket.enable_socket()
    try:
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            return int(listening.getsockname()[1])
    finally:
        pytest_socket.disable_socket(allow_unix_socket=True)


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in told.items()} | {"GLOO_SOCKET_IFNAME": "lo"}


def start(work: Callable[[int], Any], count: int) -> list[tuple[Any, Any]]:
    """Fork `count` ranks that each do `work(rank)`; processes, and pipes that their results come through."""
    port, context, started = free_port(), multiprocessing.get_context("fork"), []

    def child(rank: int, pipe: Any) -> None:
        os.environ.update(environment(rank, count, port))
        try:
            pipe.send(work(rank))
        except BaseException:  # noqa: BLE001  # told to the test, which fails on it
            pipe.send(traceback.format_exc())
        pipe.close()
        os._exit(0)

    for rank in range(count):
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=child, args=(rank, sending))
        process.start()
        sending.close()
        started.append((process, receiving))
    return started


def on_ranks(work: Callable[[], Any], count: int = 2) -> list[Any]:
    """What `work()` returned on every rank of a process group."""

    def joined(rank: int) -> Any:
        with ranks.joined():
            assert (ranks.count(), ranks.first()) == (count, rank == 0)
            return work()

    results = []
    for process, pipe in start(joined, count):
        results.append(pipe.recv())
        process.join(60)
    assert not [result for result in results if isinstance(result, str)], results
    return results


def malmen(rank: int, arguments: list[str], folder: Path) -> int:
    """The program as a rank runs it, its streams in files."""
    sys.stdout, sys.stderr = ((folder / f"{name}.{rank}").open("w") for name in ("stdout", "stderr"))
    return main(arguments)


def run_all(arguments: list[str], folder: Path) -> list[int]:
    """The exit codes of two ranks that run the program."""
    codes = []
    for process, pipe in start(lambda rank: malmen(rank, arguments, folder), 2):
        codes.append(pipe.recv())
        process.join(60)
    return codes
