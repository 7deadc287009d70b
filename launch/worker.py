"""`ExpertWorker`: one rank in a process of its own, as a Ray actor. It reads on its node what GPU it has been given."""

import os
import queue
import socket
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
import torch

from moe_nvfp4.checkpoint import Checkpoint
from moe_nvfp4.engine.orders import Sink
from moe_nvfp4.engine.stats import EngineStats
from moe_nvfp4.expert_buffers import LayerExperts
from moe_nvfp4.generation import Answer, Increment
from moe_nvfp4.launch.rendezvous import Place, end_of_start, find_store, join, open_store
from moe_nvfp4.preparation import Preparation
from moe_nvfp4.rebalancing import Rebalancing
from moe_nvfp4.routing.placement import Placement
from moe_nvfp4.routing.rebalance_moves import LayerMoves
from moe_nvfp4.runner import MoERunner
from moe_nvfp4.sampling import SamplingParams
from moe_nvfp4.tokenizer import JSON_FILES, VOCABULARIES

TOKENIZER_FILES = {*JSON_FILES, *(name for names in VOCABULARIES for name in names), "chat_template.jinja"}
NO_LIMIT = 2**31  # of waiting requests: the driver keeps to the limit


@dataclass(frozen=True, slots=True)
class Whereabouts:
    node: str
    address: str
    host: str
    pid: int
    device: str

    def __str__(self) -> str:
        return f"{self.device} of {self.host} ({self.address}), process {self.pid}"


@dataclass(frozen=True, slots=True)
class Profile:
    """What the driver must know of a checkpoint that it may have no access to."""

    vocab_size: int
    max_seq_len: int
    context_length: int
    media_tokens: dict[int, str]
    eos_token_ids: frozenset[int]
    slots: int
    experts: int
    tokenizer_files: dict[str, bytes] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Beat:
    turns: int  # of the engine; they count up while it lives
    error: str | None  # the traceback that ended it
    stats: EngineStats | None


@dataclass(frozen=True, slots=True)
class Request:
    """One answer, as the driver asks for it. `seconds`: left until its deadline."""

    ident: int
    prompt: list[int]
    answered: list[int]
    params: SamplingParams
    choice: int
    seconds: float | None


# Threads of a worker's own for what must be answered while others wait.
CONCURRENCY_GROUPS = {"beats": 1, "increments": 1, "experts": 1}


class ExpertWorker:
    """`group_workers.py` makes actors of it."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._arrived: queue.SimpleQueue[tuple[int, Increment | Exception] | None] = queue.SimpleQueue()
        self._answers: dict[int, Answer] = {}
        self._store: Any = None
        self.runner: MoERunner | None = None
        self._staged: tuple[Placement, LayerMoves, LayerExperts | None] | None = None

    def whereabouts(self, kind: str) -> Whereabouts:
        """`kind`: cpu or cuda. The first call: a rank that cannot have its device says so here."""
        context = ray.get_runtime_context()
        if kind == "cuda":
            self.device = torch.device("cuda", _visible_index(context.get_accelerator_ids()["GPU"][0]))
            torch.cuda.get_device_properties(self.device)
        address = ray.util.get_node_ip_address()
        return Whereabouts(context.get_node_id(), address, socket.gethostname(), os.getpid(), str(self.device))

    def meeting_point(self) -> tuple[str, int]:
        """Of rank 0: where the others find it."""
        host = ray.util.get_node_ip_address()
        self._store = open_store(host)
        return host, self._store.port

    def prepare(self, place: Place, model: str, settings: dict[str, Any]) -> Profile | None:
        """Joins the group, and checks and plans everything that can be before memory is taken."""
        self._place = place
        self._member = join(place, self.device, self._store or find_store(place))
        settings = {**settings, "device": self.device, "max_waiting": NO_LIMIT, "ranks": self._member.ranks}
        settings["verbose"] = settings.get("verbose", True) and place.rank == 0
        self._prepared = MoERunner.prepare(model, **settings)
        return _profile(self._prepared, model) if place.rank == 0 else None

    def load(self) -> float:
        """Seconds."""
        self.runner = runner = MoERunner(self._prepared, self._member.orders)
        self._rebalancing = Rebalancing(self._prepared, runner.experts)
        runner.engine.named |= {"replace_layer": self._replace_layer}
        return runner.load_seconds

    def end_of_start(self) -> None:
        end_of_start(self._place)

    def first_token(self) -> None:
        """Of rank 0: the group is ready when a token has been decoded by all of it."""
        assert self.runner is not None
        self.runner.generate([0], SamplingParams(max_new_tokens=2, ignore_eos=True))

    def expect(self, constraints: list[SamplingParams]) -> None:
        """Compiles what answers will have to follow, before they come: a rank that compiles within a turn holds up all
        of them."""
        assert self.runner is not None
        for params in constraints:
            self.runner.prompts.matcher(params)

    def take(self, requests: list[Request], cancelled: list[int]) -> None:
        """Of rank 0: what clients want."""
        assert self.runner is not None
        for request in requests:
            answer = self.runner.answer(request.prompt, request.answered, request.params, request.choice)
            if request.seconds is not None:
                answer.sequence.deadline = time.monotonic() + request.seconds
            self._answers[request.ident] = answer
            try:
                self.runner.engine.submit(answer, self._sink(request.ident))
            except Exception as error:  # the engine has ended, which `beat` tells as well
                self._arrived.put((request.ident, error))
        for ident in cancelled:
            if ident in self._answers:
                self.runner.engine.cancel(self._answers.pop(ident))

    def increments(self) -> Iterator[list[tuple[int, Increment | Exception]]]:
        """Of rank 0: all that has arrived since the last time, for as long as the worker lives."""
        while (first := self._arrived.get()) is not None:
            batch = [first]
            with suppress(queue.Empty):
                while (other := self._arrived.get_nowait()) is not None:
                    batch.append(other)
            for ident, item in batch:
                if isinstance(item, Exception) or item.completion is not None:
                    self._answers.pop(ident, None)
            yield batch

    def beat(self) -> Beat:
        if self.runner is None:
            return Beat(0, None, None)
        failure = self.runner.engine.failure
        error = None if failure is None else "".join(traceback.format_exception(failure)).strip()
        return Beat(self.runner.engine.turns, error, self.runner.engine.stats())

    def expert_rows(self) -> dict[int, list[int]]:
        """Of rank 0: every rank counts the rows of all, since it was loaded."""
        assert self.runner is not None
        return self.runner.engine.call(self.runner.experts.tables.all_counts)

    def call_everywhere(self, name: str, arguments: dict[str, Any]) -> Any:
        """Of rank 0."""
        assert self.runner is not None
        return self.runner.engine.call_everywhere(name, **arguments)

    def placement(self) -> tuple[Placement, list[int]]:
        """Of now, and the experts that stay on all ranks."""
        assert self.runner is not None
        placement = self.runner.experts.placement
        return placement, list(range(self.runner.config.num_experts, placement.num_experts))

    def stage(self, placement: Placement, moves: LayerMoves) -> None:
        """Reads what comes to this rank, while it serves."""
        self._staged = placement, moves, self._rebalancing.read(moves)

    def _replace_layer(self, layer: int) -> None:
        """In the engine's thread, at all ranks at the same turn."""
        assert self._staged is not None and self._staged[1].layer == layer, "every rank stages a layer before it"
        self._rebalancing.replace(*self._staged)
        self._staged = None

    def close(self) -> None:
        """Rank 0's end is the end of the others."""
        self._arrived.put(None)
        if self.runner is not None:
            self.runner.close()

    def _sink(self, ident: int) -> Sink:
        return lambda item: self._arrived.put((ident, item))


def _visible_index(given: str) -> int:
    """Ray shows a worker its GPU only, unless it is told not to."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return visible.index(given) if given in visible else int(given)


def _profile(prepared: Preparation, model: str) -> Profile:
    prompts = prepared.prompts
    with Checkpoint.open(model) as checkpoint:
        found = [checkpoint.folder / name for name in sorted(TOKENIZER_FILES)]
    return Profile(
        vocab_size=prompts.vocab_size,
        max_seq_len=prompts.max_seq_len,
        context_length=prompts.context_length,
        media_tokens=dict(prompts.media_tokens),
        eos_token_ids=prepared.eos_token_ids,
        experts=prepared.config.num_experts,
        slots=prepared.plan.max_batch_size * (prepared.ranks.size if prepared.ranks.splits_rows else 1),
        tokenizer_files={path.name: path.read_bytes() for path in found if path.is_file()} if prompts.tokenizer else {},
    )
