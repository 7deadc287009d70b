"""How the ranks of a group find each other, whoever started their processes: a store, collectives, a line for orders.

The store listens at rank 0. Ray's actors get its address from each other; torchrun gives it in the environment.
"""

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from moe_nvfp4.engine.order_link import Line, Lines
from moe_nvfp4.engine.orders import Build, FollowerOrders, LeaderOrders, Orders
from moe_nvfp4.errors import RequestError
from moe_nvfp4.parallel import AttentionMode, Ranks

KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class Place:
    """Of one rank in its group. A rank that waits longer than `seconds` for another calls it gone, or while the group
    starts, when some have more to read or compile than others, longer than `start_seconds`."""

    rank: int
    size: int
    host: str  # of rank 0
    port: int  # of the store
    attention: AttentionMode
    seconds: float
    start_seconds: float

    @classmethod
    def from_environment(cls, attention: AttentionMode, seconds: float, start_seconds: float) -> "Place":
        """As torchrun says."""
        try:
            rank, size, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
            return cls(rank, size, os.environ["MASTER_ADDR"], port, attention, seconds, start_seconds)
        except (KeyError, ValueError) as error:
            raise RequestError(f"RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT: {error}; start with torchrun") from None


class Member(NamedTuple):
    """A rank that has joined. `orders` is for `MoERunner`."""

    ranks: Ranks
    orders: Callable[[Build], Orders]


def open_store(host: str) -> TCPStore:
    """At rank 0, on a port that is free; the others need its `port`."""
    return TCPStore(host, 0, is_master=True, wait_for_workers=False)


def find_store(place: Place) -> TCPStore:
    """At the other ranks."""
    return TCPStore(place.host, place.port, is_master=False, timeout=timedelta(seconds=place.start_seconds))


def join_ranks(place: Place, device: torch.device, store: TCPStore | None = None, *, symmetric: bool = True) -> Ranks:
    """Called by all ranks. Without a store there is the one that torchrun has made."""
    patience = timedelta(seconds=place.start_seconds)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=patience)
    return Ranks.join(device=device, attention=place.attention, symmetric=symmetric)


def join(place: Place, device: torch.device, store: TCPStore | None = None) -> Member:
    """The same, with a line for orders."""
    ranks = join_ranks(place, device, store)
    line = _line_for_orders(place, device)
    if isinstance(line, Lines):
        leader = LeaderOrders(line)
        return Member(ranks, lambda build: leader)
    return Member(ranks, lambda build: FollowerOrders(line, build))


def _line_for_orders(place: Place, device: torch.device) -> Lines | Line:
    """Rank 0 tells its port and the key through the collectives that there are already."""
    lines = Lines(place.host, secrets.token_bytes(KEY_BYTES)) if place.rank == 0 else None
    told = [0] * (2 + KEY_BYTES) if lines is None else [*lines.port.to_bytes(2, "little"), *lines.key]
    message = torch.tensor(told, dtype=torch.int32, device=device)
    dist.broadcast(message, src=0)
    if lines is not None:
        lines.accept(place.size - 1, place.start_seconds, place.seconds)
        return lines
    values = bytes(message.tolist())
    return Line(
        place.host, int.from_bytes(values[:2], "little"), values[2:], place.rank, place.seconds, place.start_seconds
    )


def end_of_start(place: Place) -> None:
    """Called when all ranks have loaded: collectives of this rank wait no longer than `seconds` from now on."""
    c10d._set_pg_timeout(timedelta(seconds=place.seconds), dist.group.WORLD)
