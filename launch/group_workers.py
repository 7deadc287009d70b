"""The actors of a group: placed, started together, watched, and ended. Which requests they serve is group.py's."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from moe_nvfp4.engine.stats import EngineStats
from moe_nvfp4.errors import EngineError, MoeNvfp4Error
from moe_nvfp4.launch.rendezvous import Place
from moe_nvfp4.launch.worker import CONCURRENCY_GROUPS, Beat, ExpertWorker, Profile, Whereabouts
from moe_nvfp4.parallel import AttentionMode

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
BEAT_EVERY: Final = 0.5
CLOSING_SECONDS: Final = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSettings:
    """`device`: cuda, or cpu for ranks on CPUs. A rank whose engine does not move for `hang_seconds` is hung. A first
    start waits `placement_seconds` at most for its GPUs, and as long again for processes that run; any start takes at
    most `load_seconds`."""

    gpus: int
    device: Literal["cuda", "cpu"] = "cuda"
    attention: AttentionMode = "auto"
    strategy: Strategy = "PACK"
    hang_seconds: float = 20.0
    placement_seconds: float = 60.0
    load_seconds: float = 1800.0

    @property
    def bundle(self) -> dict[str, float]:
        return {"CPU": 1.0} if self.device == "cpu" else {"CPU": 1.0, "GPU": 1.0}


class WorkerFailed(EngineError):
    """One rank has failed; says which, where, and why."""


def place(settings: GroupSettings, size: int, seconds: float) -> PlacementGroup | None:
    """Room for so many ranks, or None where there is none within `seconds`."""
    group = placement_group([settings.bundle] * size, strategy=settings.strategy)
    if group.wait(seconds):
        return group
    remove_placement_group(group)
    return None


class Workers:
    """A group of ranks that is ready to serve when it is built. `report` is told how far it is."""

    def __init__(
        self,
        settings: GroupSettings,
        group: PlacementGroup,
        model: str,
        model_settings: dict[str, Any],
        report: Callable[[str], None],
    ):
        self._settings, self._group = settings, group
        began, options = time.monotonic(), settings.bundle
        actor = ray.remote(concurrency_groups=CONCURRENCY_GROUPS)(ExpertWorker)
        self.actors = [
            actor.options(
                num_cpus=options["CPU"],
                num_gpus=options.get("GPU", 0.0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, rank),
                max_restarts=0,
            ).remote()
            for rank in range(group.bundle_count)
        ]
        self.size = len(self.actors)
        self._where: list[Whereabouts | None] = [None] * self.size
        self._turns: dict[int, tuple[int, float]] = {}
        self.stats: EngineStats | None = None  # of rank 0, when it was last checked
        try:
            calls = [actor.whereabouts.remote(settings.device) for actor in self.actors]
            self._where = self._gather(calls, settings.placement_seconds)
            for rank, where in enumerate(self._where):
                report(f"rank {rank}: {where}")
            host, port = self._get(0, self.leader.meeting_point.remote())
            places = [
                Place(rank, self.size, host, port, settings.attention, settings.hang_seconds, settings.load_seconds)
                for rank in range(self.size)
            ]
            calls = [a.prepare.remote(p, model, model_settings) for a, p in zip(self.actors, places, strict=True)]
            profile, *_ = self._gather(calls, settings.load_seconds)
            assert isinstance(profile, Profile)
            self.profile = profile
            loads = [actor.load.remote() for actor in self.actors]
            self.load_seconds = max(self._gather(loads, settings.load_seconds))
            ended = [actor.end_of_start.remote() for actor in self.actors]
            self._gather(ended, settings.load_seconds)
            self._get(0, self.leader.first_token.remote())
            self.check()
        except BaseException:
            self.end()
            raise
        self.start_seconds = time.monotonic() - began
        report(f"{self.size} ranks decoded a first token {self.start_seconds:.1f} s after they were asked for")

    @property
    def leader(self) -> Any:
        return self.actors[0]

    def increments(self) -> Any:
        """Batches of what arrives at the leader."""
        options = self.leader.increments.options(concurrency_group="increments", num_returns="streaming")
        return options.remote()

    @property
    def where(self) -> Sequence[Whereabouts | None]:
        return self._where

    def check(self) -> None:
        """Raises WorkerFailed when a rank is dead, has raised, or hangs. Takes as long as the ranks need to answer."""
        calls = [actor.beat.options(concurrency_group="beats").remote() for actor in self.actors]
        ray.wait(calls, num_returns=len(calls), timeout=self._settings.hang_seconds)
        beats = []
        for rank, call in enumerate(calls):
            if not ray.wait([call], timeout=0)[0]:
                raise self._failed(rank, f"hangs: it has not answered for {self._settings.hang_seconds:g} s")
            beats.append(self._get(rank, call))
        errors = {rank: beat.error for rank, beat in enumerate(beats) if beat.error}
        if errors:
            # When one rank raises, the lines and collectives of the others break; what they say comes last.
            first = min(errors, key=lambda rank: (_is_consequence(errors[rank]), rank))
            raise self._failed(first, f"raised\n{errors[first]}")
        self._check_turns(beats)
        self.stats = beats[0].stats or self.stats

    def end(self) -> None:
        """At once, and gives the room back. A process that does not react is killed by its node's Ray after 5 s."""
        for actor in self.actors:
            ray.kill(actor, no_restart=True)
        remove_placement_group(self._group)

    def close(self) -> None:
        """With the leader's goodbye to the others, so that no rank reports an error."""
        ray.wait([self.leader.close.remote()], timeout=CLOSING_SECONDS)
        self.end()

    def _check_turns(self, beats: Sequence[Beat]) -> None:
        now = time.monotonic()
        for rank, beat in enumerate(beats):
            turns, since = self._turns.get(rank, (-1, now))
            if turns != beat.turns:
                self._turns[rank] = beat.turns, now
            elif now - since > self._settings.hang_seconds:
                stuck = min(self._turns, key=lambda rank: self._turns[rank])
                raise self._failed(stuck, f"hangs: its engine has not moved for {now - since:.0f} s")

    def _gather(self, calls: Sequence[Any], seconds: float) -> list[Any]:
        """The results of all ranks, or the first failure: the others may wait for the one that failed."""
        waiting, deadline = list(calls), time.monotonic() + seconds
        while waiting:
            done, waiting = ray.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                raise self._failed(calls.index(waiting[0]), f"hangs: it has not answered for {seconds:g} s")
            for call in done:
                self._get(calls.index(call), call)
        return list(ray.get(list(calls)))

    def _get(self, rank: int, call: Any) -> Any:
        seconds = self._settings.load_seconds
        try:
            return ray.get(call, timeout=seconds)
        except ray.exceptions.GetTimeoutError:
            raise self._failed(rank, f"hangs: it has not answered for {seconds:g} s") from None
        except RayTaskError as error:
            if isinstance(error.cause, MoeNvfp4Error) and not isinstance(error.cause, EngineError):
                # Of the user's making: trying again will not help.
                raise error.cause from None
            raise self._failed(rank, f"raised\n{error}") from None
        except RayActorError as error:
            raise self._failed(rank, f"died: {_reason(error)}") from None
        except RayError as error:
            raise self._failed(rank, f"is lost: {error}") from None

    def _failed(self, rank: int, why: str) -> WorkerFailed:
        where = self._where[rank]
        return WorkerFailed(f"rank {rank} of {self.size}{f' ({where})' if where else ''} {why}")


def _is_consequence(error: str) -> bool:
    last = error.rsplit("\n", 1)[-1]
    return any(mark in last for mark in ("ConnectionError", "TimeoutError", "Connection closed", "DistBackendError"))


def _reason(error: RayActorError) -> str:
    """The part of Ray's long message that tells it."""
    lines = [line.strip() for line in str(error).splitlines() if "exit" in line or "dead" in line]
    return (" ".join(lines) or str(error)).split(" Some common causes", 1)[0]


def connect(device: str, verbose: bool) -> bool:
    """To the cluster that Ray's environment or this machine has, else to one of its own. False: there is one already,
    and it is not ours to leave."""
    if ray.is_initialized():
        return False
    ray.init(log_to_driver=verbose, configure_logging=False, include_dashboard=False)
    if device == "cuda" and not ray.cluster_resources().get("GPU"):
        raise EngineError("this Ray cluster has no GPU; use --device cpu, or RAY_ADDRESS of one that has")
    print(f"Ray: {len(ray.nodes())} nodes, {ray.cluster_resources().get('GPU', 0):g} GPUs", file=sys.stderr)
    return True
