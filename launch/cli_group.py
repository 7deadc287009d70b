"""Options of commands that run on several GPUs, and what they open: a group of Ray actors, or torchrun's rank."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from moe_nvfp4.errors import RequestError

if TYPE_CHECKING:
    from moe_nvfp4.frontend import Frontend

ATTENTION_MODES = ("auto", "replicated", "tensor", "data")
START_SECONDS = 1800.0  # the longest that ranks may differ in loading
STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")


def add_group_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("ranks")
    group.add_argument(
        "--gpus", type=int, metavar="N", help="ranks, each with a GPU, or with a CPU core with --device cpu"
    )
    group.add_argument(
        "--attention",
        choices=ATTENTION_MODES,
        default="auto",
        help="how attention is shared out; auto: tensor where heads divide evenly, else replicated; "
        "default: %(default)s",
    )
    group.add_argument(
        "--strategy", choices=STRATEGIES, default="PACK", help="how Ray places ranks on nodes; default: %(default)s"
    )
    group.add_argument(
        "--hang-seconds",
        type=float,
        default=20.0,
        metavar="S",
        help="a rank that is silent so long is taken for dead; default: %(default)g",
    )


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextmanager
def open_group(arguments: argparse.Namespace, settings: dict[str, Any]) -> "Iterator[Frontend | None]":
    """The model's frontend; None at a rank that follows another, when its work is done."""
    if arguments.device not in (None, "cpu", "cuda"):
        raise RequestError(f"--device {arguments.device:.40}: expected cpu or cuda; ranks are given their GPUs")
    device: Literal["cpu", "cuda"] = "cpu" if arguments.device == "cpu" else "cuda"
    if under_torchrun():
        with _rank_of_torchrun(arguments, device, settings) as runner:
            yield runner
        return
    if arguments.gpus is None or arguments.gpus < 1:
        raise RequestError(f"--gpus: got {arguments.gpus}; expected a number of ranks from 1 (or start with torchrun)")
    try:
        from moe_nvfp4.launch.group import GroupRunner
        from moe_nvfp4.launch.group_workers import GroupSettings
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise RequestError("ray is not installed; pip install 'moe-nvfp4[ray]', or start with torchrun") from None
    ranks = GroupSettings(
        gpus=arguments.gpus,
        device=device,
        attention=arguments.attention,
        strategy=arguments.strategy,
        hang_seconds=arguments.hang_seconds,
    )
    with GroupRunner(arguments.model, ranks, **settings) as group:
        yield group


@contextmanager
def _rank_of_torchrun(
    arguments: argparse.Namespace, kind: str, settings: dict[str, Any]
) -> "Iterator[Frontend | None]":
    import torch
    import torch.distributed as dist

    from moe_nvfp4.launch.rendezvous import Place, end_of_start, join
    from moe_nvfp4.runner import MoERunner

    place = Place.from_environment(arguments.attention, arguments.hang_seconds, START_SECONDS)
    if arguments.gpus not in (None, place.size):
        raise RequestError(f"--gpus: got {arguments.gpus}; torchrun has started {place.size} ranks. Leave it out.")
    device = torch.device("cpu") if kind == "cpu" else torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    member = join(place, device)
    try:
        verbose = settings.get("verbose", True) and place.rank == 0
        settings = {**settings, "verbose": verbose, "device": device, "ranks": member.ranks}
        with MoERunner(MoERunner.prepare(arguments.model, **settings), member.orders) as runner:
            dist.barrier()
            end_of_start(place)
            if place.rank:
                runner.engine.wait()
            yield None if place.rank else runner
    finally:
        dist.destroy_process_group()
