"""`MoERunner` owns one rank's memory: expert buffers, dense weights, cache. `generate` and `stream` sit on it."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import torch

from moe_nvfp4.batch import Batch, Piece
from moe_nvfp4.cache import SequenceCache
from moe_nvfp4.decoding import Decoder
from moe_nvfp4.detokenize import IncrementalDetokenizer
from moe_nvfp4.generation import Answer, Completion, Generation, Increment, generate
from moe_nvfp4.preparation import Preparation
from moe_nvfp4.prompts import Message, Prompt, Requests
from moe_nvfp4.sampling import Sampler, SamplingParams


class MoERunner:
    """One model on one device. Build with `from_pretrained`; close it, or use it as a context manager."""

    def __init__(self, prepared: Preparation):
        self.plan, self.device, self.dtype = prepared.plan, prepared.device, prepared.dtype
        self.prompts, self.tokenizer = prepared.prompts, prepared.prompts.tokenizer
        self.eos_token_ids = prepared.eos_token_ids
        self.max_seq_len = self.plan.max_seq_len
        self.step_rows, self.prefill_chunk = prepared.step_rows, prepared.cache_settings.chunk
        self.config, self.found = prepared.config, prepared.found
        self.model, self.experts = prepared.load_model()
        self.cache = SequenceCache(self.config.cache_spec, prepared.cache_settings, self.device)
        self.decoder = Decoder(
            self.model,
            self.cache,
            self.device,
            buckets=prepared.buckets,
            graphs=prepared.cuda_graphs,
            verbose=prepared.verbose,
        )
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
        verbose: bool = True,
    ) -> Preparation:
        """All checks and the memory plan, without loading; `MoERunner(prepared)` loads.

        `device` defaults to the GPU where there is one; `dtype`, of activations and plain weights, to bfloat16
        on a GPU and float32 on a CPU; `max_seq_len` to 4096 or the model's context, whichever is less. `kv_dtype` of
        fp8 keeps keys and values as E4M3. Without `cuda_graphs` a GPU takes the same steps launch by launch.
        `buckets`: batch sizes that get a graph, the largest of them max_batch_size; default: some sizes up to it.
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
            verbose=verbose,
        )

    @overload  # a str is a Sequence[str] to the type checker, hence the ignore
    def generate(  # type: ignore[overload-overlap]
        self, prompts: str, sampling: SamplingParams | None = None
    ) -> Generation: ...
    @overload
    def generate(self, prompts: Sequence[int], sampling: SamplingParams | None = None) -> Generation: ...
    @overload
    def generate(self, prompts: Sequence[Message], sampling: SamplingParams | None = None) -> Generation: ...
    @overload
    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Generation]: ...

    def generate(
        self, prompts: Any, sampling: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Generation | list[Generation]:
        """Answers one prompt or many. A prompt is a string, a list of chat messages, or a list of token ids.

        Many prompts may come with one SamplingParams for all, or one each.
        """
        requests = self.prompts.encode(prompts, sampling)
        done: dict[tuple[int, int], Completion] = {}
        for increment in generate(self, self._answers(requests)):
            if increment.completion is not None:
                done[increment.prompt, increment.choice] = increment.completion
        results = [
            Generation(tuple(ids), tuple(done[index, choice] for choice in range(params.n)))
            for index, (ids, params) in enumerate(zip(requests.token_ids, requests.sampling, strict=True))
        ]
        return results if requests.many else results[0]

    def stream(
        self, prompts: Any, sampling: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[Increment]:
        """The same, as increments while they come. A bad request raises here; closing the iterator frees its slots."""
        return generate(self, self._answers(self.prompts.encode(prompts, sampling)))

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """float32 logits [T, vocabulary] of every position, on the CPU."""
        ids = self.prompts.check(list(token_ids), "token_ids", answer=False)
        slot = self.cache.acquire()
        try:
            rows = []
            with torch.inference_mode():
                for start in range(0, len(ids), self.prefill_chunk):
                    batch = Batch.of([Piece(slot, start, ids[start : start + self.prefill_chunk])], self.device)
                    rows.append(self.model.logits(self.model.forward(batch, self.cache)).float().cpu())
        finally:
            self.cache.release(slot)
        return torch.cat(rows)

    def close(self) -> None:
        """Frees the device memory; the runner cannot be used afterwards."""
        for name in ("decoder", "model", "experts", "cache"):
            self.__dict__.pop(name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def __enter__(self) -> "MoERunner":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answers(self, requests: Requests) -> deque[Answer]:
        started = time.perf_counter()
        return deque(
            Answer(
                prompt=index,
                choice=choice,
                prompt_ids=ids,
                params=params,
                sampler=Sampler(params, choice),
                detokenizer=IncrementalDetokenizer(self.tokenizer, params.stop) if self.tokenizer else None,
                started=started,
            )
            for index, (ids, params) in enumerate(zip(requests.token_ids, requests.sampling, strict=True))
            for choice in range(params.n)
        )
