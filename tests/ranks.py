"""Ranks for tests: processes of a gloo group that live as long as a test file, and what they do there."""

import multiprocessing
import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from moe_nvfp4.batch import Batch, Piece
from moe_nvfp4.cache import SequenceCache
from moe_nvfp4.engine import scheduler
from moe_nvfp4.engine.data_parallel import scheduler_of
from moe_nvfp4.engine.launch import launch
from moe_nvfp4.engine.step_buffers import DecodeRow
from moe_nvfp4.engine.stepper import Stepper
from moe_nvfp4.errors import MoeNvfp4Error
from moe_nvfp4.generation import Answer
from moe_nvfp4.memory import MemoryPlan
from moe_nvfp4.parallel import ALONE, Ranks
from moe_nvfp4.preparation import Preparation
from moe_nvfp4.rebalancing import Rebalancing
from moe_nvfp4.routing.placement import Placement
from moe_nvfp4.sampling import Sampler, SamplingParams
from moe_nvfp4.settings import RunnerSettings

SECONDS = 120  # for one task; a rank that waits for another for ever is an error


def fork_server() -> Any:
    """As `spawn`, but what takes seconds of each process to import is imported once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "moe_nvfp4.engine.launch", "moe_nvfp4.preparation", "moe_nvfp4.models.moe"]
    )
    return context


class RankPool:
    """`run(function, ...)` calls a function of a module in every process, and gives all results."""

    def __init__(self, size: int, folder: Path, device: str = "cpu"):
        context = fork_server()
        before, os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS"), "1"
        self.size, self._ends, self._processes = size, [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, size, str(folder / f"store{size}"), device, theirs), daemon=True
            )
            process.start()
            self._ends.append(ours)
            self._processes.append(process)
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before

    def run(self, function: Callable[..., Any], *args: Any, **named: Any) -> list[Any]:
        for end in self._ends:
            end.send((function, args, named))
        results = []
        for rank, end in enumerate(self._ends):
            assert end.poll(SECONDS), f"rank {rank} did not answer"
            results.append(end.recv())
        for rank, (succeeded, value) in enumerate(results):
            assert succeeded, f"rank {rank}:\n{value}"
        return [value for _, value in results]

    def close(self) -> None:
        for end in self._ends:
            end.send(None)
        for process in self._processes:
            process.join(10)
            process.kill()


def _serve(rank: int, size: int, store: str, device: str, end: Connection) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    patience = timedelta(seconds=SECONDS / 2)
    files = dist.FileStore(store, size)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=files, rank=rank, world_size=size, timeout=patience)
    while (task := end.recv()) is not None:
        function, args, named = task
        try:
            end.send((True, function(*args, **named)))
        except Exception:
            end.send((False, traceback.format_exc()))


class Rank:
    """A loaded model with what serves it, without the threads of an engine."""

    def __init__(self, folder: Path, ranks: Ranks | None = None, *, fill_rows: int | None = None, **settings: Any):
        """`fill_rows`: also where no kernels need it."""
        self.prepared = prepared = prepare(folder, ranks, **settings)
        if fill_rows is not None:
            prepared.fill_rows = fill_rows
        self.model, self.experts = prepared.load_model()
        self.cache = SequenceCache(
            prepared.config.cache_spec,
            prepared.cache_settings,
            prepared.device,
            shared_pages=prepared.plan.pages,
            snapshots=prepared.plan.snapshots,
        )
        self.stepper = Stepper(
            self.model,
            self.cache,
            prepared.device,
            buckets=prepared.buckets,
            graphs=prepared.cuda_graphs,
            verbose=False,
            fill_rows=prepared.fill_rows,
            ranks=prepared.ranks,
        )
        self.scheduler = scheduler_of(prepared)

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Of every position; where ranks have rows of their own, all compute the same."""
        slot, memory = self.scheduler.lend()
        assert self.scheduler.memory.grow(memory, 0, len(token_ids))
        self.cache.set_pages([(c.group, slot, c.index, c.page) for c in memory.take_changes()])
        batch = Batch.of([Piece(slot, 0, token_ids)], self.prepared.device)
        with torch.inference_mode():
            logits = self.model.logits(self.model.forward(batch, self.cache)).float()
        self.scheduler.give_back(slot, memory)
        return logits

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        late: int = 0,
        between: Callable[[int], None] | None = None,
    ) -> list[Answer]:
        """The last `late` prompts come after three steps. `between` is called before every step."""
        every = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        waiting = [self._answer(i, ids, one) for i, (ids, one) in enumerate(zip(prompts, every, strict=True))]
        answers, step, steps = {answer.prompt: answer for answer in waiting}, None, 0
        while waiting or step is not None:
            while waiting and (len(waiting) > late or steps > 2):
                self.scheduler.add(waiting.pop(0).sequence)
            if between is not None:
                between(steps)
            step, steps = self.scheduler.plan(), steps + 1
            if step is None:
                continue
            with torch.inference_mode():
                result = launch(self.stepper, step, [answers[r.sequence.ident] for r in step.rows], self.vocab_size)
            token_ids, peaks = result.wait()
            for index, rows in enumerate(step.rows):
                if rows.samples:
                    self.scheduler.took(rows, token_ids[index])
                    answer = answers[rows.sequence.ident]
                    if answer.advance(index, token_ids[index], peaks[index], result.logprobs, frozenset()).completion:
                        self.scheduler.finish(rows.sequence)
        return list(answers.values())

    @property
    def vocab_size(self) -> int:
        return self.prepared.config.vocab_size

    def _answer(self, ident: int, ids: Sequence[int], params: SamplingParams) -> Answer:
        length = self.prepared.plan.max_seq_len
        sequence = scheduler.Sequence(ident, list(ids), params.max_new_tokens, length)
        return Answer(ident, 0, params, sequence, Sampler(params), None, 0.0)


def one_thread(function: Callable[[], Any]) -> Any:
    """As in the processes of a pool; tiny models are slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return function()
    finally:
        torch.set_num_threads(threads)


def prepare(folder: Path, ranks: Ranks | None = None, **settings: Any) -> Preparation:
    device = "cpu" if ranks is None else str(ranks.device)
    defaults = {"device": device, "dtype": "float32", "max_batch_size": 8, "max_seq_len": 256, "verbose": False}
    placement = settings.pop("placement", None)
    return Preparation(folder, RunnerSettings(**(defaults | settings)), ranks or ALONE, placement)


def join(attention: Any = "replicated") -> Ranks:
    device = f"cuda:{dist.get_rank()}" if dist.get_backend() == "nccl" else "cpu"
    return Ranks.join(device=device, attention=attention)


def answers_of(
    folder: Path,
    attention: str | None,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    *,
    chunk: int = 16,
    **settings: Any,
) -> tuple[list[tuple[int, ...]], list[list[Any]], torch.Tensor]:
    """Tokens and logprobs of all answers, and the logits of the first prompt. `attention` None: one rank alone."""
    rank = Rank(folder, None if attention is None else join(attention), **settings)
    rank.scheduler.limits = replace(rank.scheduler.limits, chunk=chunk)
    answers = rank.generate(prompts, params, late=len(prompts) // 2)
    return [tuple(a.new_ids) for a in answers], [a.logprobs for a in answers], rank.logits(prompts[0]).cpu()


def answers_while_experts_move(
    folder: Path,
    attention: str,
    placements: Sequence[Placement],
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    **settings: Any,
) -> tuple[list[tuple[int, ...]], list[dict[int, list[int]]]]:
    """Every fourth step the next placement is taken. Tokens, and rows of the experts before each move and after all."""
    rank = Rank(folder, join(attention), count_experts=True, **settings)
    rebalancing, coming, counts = Rebalancing(rank.prepared, rank.experts), list(placements), []
    lies = [layer.up.codes.data_ptr() for layer in rank.experts.layers.values()]

    def taken() -> dict[int, list[int]]:
        counted = rank.experts.tables.all_counts()
        rank.experts.tables.forget_counts()
        return counted

    def between(step: int) -> None:
        if coming and step % 4 == 3:
            counts.append(taken())
            placement = coming.pop(0)
            for moves in rebalancing.moves(placement):
                rebalancing.replace(placement, moves, rebalancing.read(moves))

    answers = rank.generate(prompts, params, late=len(prompts) // 2, between=between)
    assert not coming and rank.experts.placement == placements[-1]
    assert lies == [layer.up.codes.data_ptr() for layer in rank.experts.layers.values()]
    counts.append(taken())
    return [tuple(a.new_ids) for a in answers], counts


def refusal(folder: Path, attention: str, **settings: Any) -> str:
    try:
        prepare(folder, join(attention), **settings).close()
    except (MoeNvfp4Error, ValueError) as error:
        return str(error)
    return ""


def plan_of(folder: Path, attention: str, available: Sequence[int]) -> MemoryPlan | str:
    """Where each rank has so many bytes left; or what it is told."""
    ranks = join(attention)
    with patch("moe_nvfp4.memory.available_bytes", lambda _: available[ranks.rank]):
        try:
            prepared = prepare(folder, ranks)
        except MoeNvfp4Error as error:
            return str(error)
    prepared.close()
    return prepared.plan


def tokens_without_a_plan(folder: Path, attention: str | None, prompt: Sequence[int]) -> list[int]:
    """All ranks take the same steps on sequences of their own, and nobody says so: a prompt, and three tokens."""
    rank = Rank(folder, None if attention is None else join(attention))
    slot, memory = rank.scheduler.lend()
    assert rank.scheduler.memory.grow(memory, 0, len(prompt) + 3)
    rank.cache.set_pages([(c.group, slot, c.index, c.page) for c in memory.take_changes()])
    greedy = SamplingParams(max_new_tokens=1)
    tokens = rank.stepper.mixed([Piece(slot, 0, prompt)], [Sampler(greedy)]).wait()[0]
    for position in range(len(prompt), len(prompt) + 3):
        tokens += rank.stepper.decode([DecodeRow(slot, position, greedy)]).wait()[0]
    return tokens
