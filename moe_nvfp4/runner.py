"""`MoERunner`: one rank's memory - expert buffers, dense weights, cache - and the engine that answers from it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moe_nvfp4.batch import Batch, Piece
from moe_nvfp4.cache import SequenceCache
from moe_nvfp4.engine.data_parallel import scheduler_of
from moe_nvfp4.engine.lease import Lease
from moe_nvfp4.engine.loop import Engine
from moe_nvfp4.engine.orders import Build, Orders
from moe_nvfp4.engine.stepper import Stepper
from moe_nvfp4.engine.warm_up import warm_up
from moe_nvfp4.errors import RequestError
from moe_nvfp4.expert_loads import ExpertLoads
from moe_nvfp4.frontend import Frontend
from moe_nvfp4.parallel import ALONE, Ranks
from moe_nvfp4.preparation import Preparation
from moe_nvfp4.routing.placement import Placement
from moe_nvfp4.settings import RunnerSettings
from moe_nvfp4.step_bytes import StepBytes


class MoERunner(Frontend):
    """One model on one device. Build with `from_pretrained`; close it, or use it as a context manager.

    Any number of threads may call it at once: their requests share the steps. `orders`, of one rank of several: where
    its orders come from, given how an answer is built.
    """

    def __init__(self, prepared: Preparation, orders: Callable[[Build], Orders] | None = None):
        self.plan, self.device, self.dtype = prepared.plan, prepared.device, prepared.dtype
        self.prompts = prepared.prompts
        self.eos_token_ids = prepared.eos_token_ids
        self.max_seq_len, self.config, self.found = self.plan.max_seq_len, prepared.config, prepared.found
        self.model, self.experts = prepared.load_model()
        self.cache = SequenceCache(
            self.config.cache_spec,
            prepared.cache_settings,
            self.device,
            shared_pages=self.plan.pages,
            snapshots=self.plan.snapshots,
        )
        self.stepper = Stepper(
            self.model,
            self.cache,
            self.device,
            buckets=prepared.buckets,
            graphs=prepared.cuda_graphs,
            verbose=prepared.settings.verbose,
            fill_rows=prepared.fill_rows,
            ranks=prepared.ranks,
            count_rows=prepared.settings.count_experts,
            determinism=prepared.determinism,
        )
        if prepared.warm_up:
            warm_up(self.stepper, prepared.step_rows, prepared.settings.verbose)
            self.experts.tables.forget_counts()
        self.step_bytes = StepBytes.of(self.found, self.config, self.dtype, prepared.cache_settings)
        self.engine: Engine = Engine(
            self.stepper,
            scheduler_of(prepared),
            prepared.eos_token_ids,
            self.config.vocab_size,
            orders(self.answer) if orders else None,
            self.step_bytes.total if prepared.ranks.size == 1 else None,
        )
        if prepared.settings.count_experts:
            self.expert_loads = ExpertLoads(self._expert_rows, self.config.num_experts)
        self.load_seconds = time.perf_counter() - prepared.started

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path, **settings: Any) -> "MoERunner":
        """Opens and checks the checkpoint, plans the memory, prints the plan, then loads.

        `settings`: fields of `RunnerSettings`, max_batch_size, max_seq_len and kv_dtype among them.
        """
        return cls(cls.prepare(path_or_hub_id, **settings))

    @staticmethod
    def prepare(
        path_or_hub_id: str | Path, *, ranks: Ranks = ALONE, placement: Placement | None = None, **settings: Any
    ) -> Preparation:
        """All checks and the memory plan, without loading; `MoERunner(prepared)` loads. `ranks` and `placement`: of one
        rank of several, see `Preparation`."""
        return Preparation(path_or_hub_id, RunnerSettings(**settings), ranks, placement)

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """float32 logits [T, vocabulary] of every position, on the CPU."""
        ids = self.prompts.check(list(token_ids), "token_ids", answer=False)
        lease, rows = Lease.of(self.engine), []

        def chunk(start: int) -> torch.Tensor:
            part = ids[start : start + self.prefill_chunk]
            lease.room(start, start + len(part))
            batch = Batch.of([Piece(lease.slot, start, part)], self.device)
            return self.model.logits(self.model.forward(batch, self.cache)).float().cpu()

        try:
            for start in range(0, len(ids), self.prefill_chunk):
                rows.append(self.engine.call(partial(chunk, start)))
        finally:
            lease.give_back()
        return torch.cat(rows)

    def _expert_rows(self) -> dict[int, list[int]]:
        return self.engine.call(lambda: self.experts.tables.all_counts())

    @property
    def step_rows(self) -> int:
        """Most tokens of all prompts in a step."""
        return self.engine.scheduler.limits.step_rows

    @property
    def prefill_chunk(self) -> int:
        """Most tokens of one prompt in a step."""
        return self.engine.scheduler.limits.chunk

    @prefill_chunk.setter
    def prefill_chunk(self, chunk: int) -> None:
        if self.engine.scheduler.limits.whole_chunks:
            raise RequestError(
                f"prefill_chunk: got {chunk!r:.40}; with deterministic=True it stays {self.prefill_chunk}, since "
                "prompts cut otherwise give other bits. Leave one of the two out."
            )
        self.engine.scheduler.limits = replace(self.engine.scheduler.limits, chunk=chunk)

    def close(self) -> None:
        """Ends what is running and frees the device memory; the runner cannot be used afterwards."""
        self.engine.close()
        self.prompts.close()
        for name in ("stepper", "model", "experts", "cache"):
            self.__dict__.pop(name, None)
        self.engine.release()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
