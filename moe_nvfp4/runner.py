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
from moe_nvfp4.engine.scheduler import STRETCH
from moe_nvfp4.engine.stepper import Stepper
from moe_nvfp4.engine.warm_up import warm_up
from moe_nvfp4.errors import RequestError
from moe_nvfp4.expert_loads import ExpertLoads
from moe_nvfp4.frontend import Frontend
from moe_nvfp4.preparation import Preparation


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
            verbose=prepared.verbose,
            fill_rows=prepared.step_rows if prepared.fast else 0,
            ranks=prepared.ranks,
            count_rows=prepared.count_experts,
            determinism=prepared.determinism,
        )
        if prepared.warm_up:
            warm_up(self.stepper, prepared.step_rows, prepared.verbose)
            self.experts.tables.forget_counts()
        self.engine: Engine = Engine(
            self.stepper,
            scheduler_of(prepared),
            prepared.eos_token_ids,
            self.config.vocab_size,
            orders(self.answer) if orders else None,
        )
        if prepared.count_experts:
            self.expert_loads = ExpertLoads(self._expert_rows, self.config.num_experts)
        self.load_seconds = time.perf_counter() - prepared.started

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path, **settings: Any) -> "MoERunner":
        """Opens and checks the checkpoint, plans the memory, prints the plan, then loads.

        Takes the settings of `prepare`.
        """
        return cls(cls.prepare(path_or_hub_id, **settings))

    @staticmethod
    def prepare(
        path_or_hub_id: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        max_batch_size: int = 8,
        max_seq_len: int | None = None,
        kv_dtype: str = "auto",
        cuda_graphs: bool = True,
        buckets: Sequence[int] | None = None,
        prefix_reuse: bool = True,
        deterministic: bool = False,
        max_waiting: int = 4096,
        stretch: float = STRETCH,
        warm_up: bool = False,
        count_experts: bool = False,
        verbose: bool = True,
        **of_a_group: Any,
    ) -> Preparation:
        """All checks and the memory plan, without loading; `MoERunner(prepared)` loads.

        `device` defaults to the GPU where there is one; `dtype`, of activations and plain weights, to bfloat16
        on a GPU and float32 on a CPU; `max_seq_len` to 4096 or the model's context, whichever is less. `kv_dtype` of
        fp8 keeps keys and values as E4M3. Without `cuda_graphs` a GPU takes the same steps launch by launch.
        `buckets`: batch sizes that get a graph, the largest of them max_batch_size; default: some sizes up to it.
        Beyond max_batch_size requests at once, `max_waiting` may wait. `stretch`: a step of answers takes about
        so many times as long, at most, for the prompts beside it; math.inf cuts no prompts, which gives the most tokens
        a second and the longest gaps between them. `prefix_reuse`: what a prompt has in common with one before it is
        not computed again. `deterministic`: the same request gives the same tokens and log-probabilities, to the last
        bit, whatever else runs (see determinism.py); slower, and for one rank only. `warm_up`, on a GPU: compile and
        capture at once what prompts of any length need, and not when the first of them comes. `count_experts`: count
        the rows that each expert takes, for `expert_loads`; one launch more a layer. `of_a_group`: for one rank of
        several, see `Preparation`.
        """
        return Preparation(
            path_or_hub_id,
            device=device,
            dtype=dtype,
            max_batch_size=max_batch_size,
            max_seq_len=max_seq_len,
            kv_dtype=kv_dtype,
            cuda_graphs=cuda_graphs,
            buckets=buckets,
            prefix_reuse=prefix_reuse,
            deterministic=deterministic,
            max_waiting=max_waiting,
            stretch=stretch,
            warm_up=warm_up,
            count_experts=count_experts,
            verbose=verbose,
            **of_a_group,
        )

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
