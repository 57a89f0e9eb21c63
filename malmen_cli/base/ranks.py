"""Several processes on one run, as torchrun and `accelerate launch` start them.

Every rank knows all facts, runs the language model on its share of them, and solves for its share of the modules: what
its rows are to all modules is added up, or its rows are dealt out, and what comes of the solves is put together. A
training takes the first rank's parameters after every step. With one process each function here is its plain
counterpart. What is exchanged is tensors and JSON, never pickles.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from malmen_cli.exceptions import RankError

T = TypeVar("T")


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the ranks that the environment tells of (RANK, WORLD_SIZE, MASTER_ADDR ...) during the body.

    Raises RankError where the others cannot be reached.
    """
    with _others_alive():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        yield
    finally:
        dist.destroy_process_group()


def count() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if _several() else 1


def first() -> bool:
    """Whether this is the rank that prints and writes."""
    return not _several() or dist.get_rank() == 0


def share(size: int) -> range:
    """Which of `size` things are this rank's."""
    return range(dist.get_rank(), size, count()) if _several() else range(size)


def mine() -> slice:
    """The same share, to index an axis by."""
    return slice(dist.get_rank(), None, count()) if _several() else slice(None)


def add_up(*tensors: Tensor) -> None:
    """Put the sum over ranks in place of each tensor."""
    if _several():
        for tensor in tensors:
            with _others_alive():
                dist.all_reduce(tensor)


def collected(tensor: Tensor, dim: int = 0) -> Tensor:
    """The tensors of all ranks, one after another along `dim`, where they may differ in size."""
    if not _several():
        return tensor
    rows = tensor.movedim(dim, 0).contiguous()
    sizes = torch.zeros(count(), dtype=torch.long, device=rows.device)
    sizes[dist.get_rank()] = len(rows)
    add_up(sizes)
    longest = int(sizes.max())
    padded = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(count())]
    with _others_alive():
        dist.all_gather(parts, padded)
    found = torch.cat([part[:size] for part, size in zip(parts, sizes.tolist(), strict=True)])
    return found.movedim(0, dim).contiguous()


def dealt(rows: Tensor) -> Tensor:
    """From this rank's rows of all modules (m, n, *), the rows of all ranks, one after another, of its share of the
    modules (m', N, *)."""
    if not _several():
        return rows
    shares = [range(rank, len(rows), count()) for rank in range(count())]
    sizes = collected(torch.tensor([rows.shape[1]], device=rows.device)).tolist()
    own, width = len(shares[dist.get_rank()]), rows.shape[2:]
    sent = [len(share) * rows.shape[1] * width.numel() for share in shares]
    taken = [own * size * width.numel() for size in sizes]
    found = rows.new_empty(sum(taken))
    with _others_alive():
        dist.all_to_all_single(found, rows[[module for share in shares for module in share]].flatten(), taken, sent)
    parts = found.split(taken)
    return torch.cat([part.view(own, size, *width) for part, size in zip(parts, sizes, strict=True)], 1)


def assembled(own: Tensor, size: int) -> Tensor:
    """The whole of `size` things along the first axis, of which each rank's tensor has its share."""
    if not _several():
        return own
    whole = own.new_zeros(size, *own.shape[1:])
    whole[mine()] = own
    add_up(whole)
    return whole


def worst(value: float) -> float:
    """The largest of all ranks' values, NaN if one is."""
    return float(collected(torch.tensor([value], dtype=torch.float64)).max())


def spread(items: Sequence[T], work: Callable[[Sequence[T]], Sequence[Any]]) -> list[Any]:
    """`work(items)`, each rank doing its share; what JSON makes of a result (lists of tuples) with several ranks."""
    if not _several():
        return list(work(items))
    own = json.dumps(list(work([items[i] for i in share(len(items))])))
    text = torch.frombuffer(bytearray(own.encode()), dtype=torch.uint8)
    sizes = collected(torch.tensor([len(text)])).tolist()
    parts = [json.loads(bytes(part.tolist())) for part in collected(text).split(sizes)]
    return [parts[i % count()][i // count()] for i in range(len(items))]


def wait() -> None:
    """Go on when every rank is here."""
    add_up(torch.zeros(1))


def all_say(so: bool) -> bool:
    """Whether it is so on every rank."""
    said = torch.tensor(int(so))
    add_up(said)
    return int(said) == count()


def same(*tensors: Tensor) -> None:
    """Put the first rank's values in place of each tensor's."""
    if _several():
        for tensor in tensors:
            with _others_alive():
                dist.broadcast(tensor, 0)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def _others_alive() -> Iterator[None]:
    """A rank that died makes the others' next exchange fail: say so in one line."""
    try:
        yield
    except RuntimeError as error:  # of which torch's DistError and its kin are
        reason = next(iter(str(error).splitlines()), "")[:200]
        raise RankError(
            f"another process of this run died or cannot be reached ({reason}); its own message says why; "
            "nothing was written"
        ) from error
