"""A model as the server sees it: prompts encoded beside the event loop, answers measured, and proof that it decodes."""

import asyncio
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from moe_nvfp4.async_runner import AsyncMoERunner, Following, Receiver
from moe_nvfp4.engine.loop import Engine
from moe_nvfp4.errors import MoeNvfp4Error
from moe_nvfp4.generation import Completion, Increment
from moe_nvfp4.launch.bench_timing import measure_read
from moe_nvfp4.launch.http_dialects import Dialect
from moe_nvfp4.launch.http_errors import ApiError
from moe_nvfp4.launch.http_metrics import Family, Registry, gauge
from moe_nvfp4.launch.http_process import process_figures
from moe_nvfp4.prompts import PromptEncoder
from moe_nvfp4.runner import MoERunner
from moe_nvfp4.sampling import SamplingParams

Result = TypeVar("Result")
ENCODERS, COMPILERS = 4, 8
PROBE_SECONDS = 10.0  # in which a model that is asked for one token must give it


class Metrics:
    """What the server counts itself, beside what others register."""

    def __init__(self) -> None:
        self.registry = Registry()
        counter, histogram = self.registry.counter, self.registry.histogram
        self.requests = counter("moe_nvfp4_requests_total", "Requests by endpoint and outcome.")
        self.prompt_tokens = counter("moe_nvfp4_prompt_tokens_total", "Tokens of prompts.")
        self.reused_tokens = counter("moe_nvfp4_reused_prompt_tokens_total", "Of those, found in the cache.")
        self.new_tokens = counter("moe_nvfp4_generated_tokens_total", "Tokens of answers.")
        self.first_token = histogram("moe_nvfp4_time_to_first_token_seconds", "From request to first token.")
        self.between = histogram("moe_nvfp4_time_between_tokens_seconds", "From one token of an answer to the next.")
        self.whole = histogram("moe_nvfp4_request_seconds", "From request to the end of its last answer.")
        self.registry.register(process_figures)


class ServedModel:
    def __init__(self, name: str, runner: AsyncMoERunner, metrics: Metrics):
        self.name, self.runner, self.metrics = name, runner, metrics
        self.prompts: PromptEncoder = runner.runner.prompts
        self.tokenizer = self.prompts.tokenizer
        self.dialect = Dialect.of(self.tokenizer)
        self.created = int(time.time())
        self._last_token = -float("inf")
        self._probe: asyncio.Task[bool] | None = None
        # A long prompt holds up few other prompts, a new schema only other new ones, and neither of them an answer.
        self._encoder = ThreadPoolExecutor(ENCODERS, thread_name_prefix=f"moe-nvfp4 prompts {name}")
        self._compiler = ThreadPoolExecutor(COMPILERS, thread_name_prefix=f"moe-nvfp4 grammars {name}")
        self._mean_seconds = 1.0
        self._between = metrics.between.labelled(model=name)
        self._first_token = metrics.first_token.labelled(model=name)
        self._new_tokens = metrics.new_tokens.labelled(model=name)
        metrics.registry.register(self._engine_figures)
        if isinstance(runner.runner, MoERunner):
            rate = measure_read(runner.runner.device)
            metrics.registry.register(partial(self._floor_figures, runner.runner.engine, rate))

    async def encode(self, params: SamplingParams, function: Callable[[], Result]) -> Result:
        threads = self._compiler if self.prompts.compiles(params) else self._encoder
        return await asyncio.get_running_loop().run_in_executor(threads, function)

    def check(self, prompts: list[list[int]], params: SamplingParams, param: str) -> None:
        """All that can be refused before the engine is asked; takes long where a schema has to be compiled. A prompt
        that leaves no room for an answer gets the error that clients know."""
        longest, most = max(map(len, prompts)), self.prompts.max_seq_len
        if longest >= most:
            raise ApiError(
                400,
                f"{param}: {longest:,} tokens; the model's context is {most:,}, the answer included. Shorten it",
                param=param,
                code="context_length_exceeded",
            )
        self.prompts.encode(prompts, params)

    def follow(self, prompts: list[list[int]], params: SamplingParams, receiver: Receiver) -> Following:
        """Increments of all answers, measured when they arrive."""
        began, between = time.monotonic(), self._between
        last: dict[tuple[int, int], float] = {}

        def measured(item: Increment | Exception | None) -> None:
            now = time.monotonic()
            if isinstance(item, Increment):
                key = item.prompt, item.choice
                if (before := last.get(key)) is not None:
                    between.observe(now - before)
                else:
                    self._first_token.observe(now - began)
                last[key] = self._last_token = now
                self._new_tokens.add(len(item.token_ids))
                if item.completion is not None:
                    self._count_prompt(item.choice, item.completion)
            elif item is None:
                self.metrics.whole.observe(now - began, model=self.name)
                self._mean_seconds += 0.1 * (now - began - self._mean_seconds)
            receiver(item)

        return self.runner.follow(prompts, params, measured)

    def _count_prompt(self, choice: int, completion: Completion) -> None:
        if choice == 0:
            self.metrics.prompt_tokens.add(completion.timing.prompt_tokens, model=self.name)
            self.metrics.reused_tokens.add(completion.timing.reused_tokens, model=self.name)

    @property
    def retry_after(self) -> float:
        """Seconds until a place in the queue is likely to be free."""
        return min(60.0, max(1.0, self._mean_seconds))

    async def decodes(self, interval: float) -> bool:
        """Whether a token was decoded within the interval; if none was asked for, one is, for all who ask together."""
        if time.monotonic() - self._last_token <= interval:
            return True
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._decode_one())
        return await asyncio.shield(self._probe)

    async def _decode_one(self) -> bool:
        token = next(token for token in range(self.prompts.vocab_size) if token not in self.prompts.media_tokens)
        # Before all others: a full queue is no reason to be called broken.
        params = SamplingParams(max_new_tokens=1, ignore_eos=True, priority=-(2**62), timeout=PROBE_SECONDS)
        try:
            await asyncio.wait_for(self.runner.generate([token], params), PROBE_SECONDS + 1)
        except (MoeNvfp4Error, TimeoutError, FloatingPointError):
            return False
        self._last_token = time.monotonic()
        return True

    def _engine_figures(self) -> Iterable[Family]:
        now = self.runner.runner.engine.stats()
        label, counters = {"model": self.name}, now.counters
        for name, text, value in (
            ("requests_running", "Answers that are computed.", now.running),
            ("requests_waiting", "Answers that wait for a place.", now.waiting),
            ("places_free", "Answers more that could be computed at once.", now.free_slots),
        ):
            yield gauge(f"moe_nvfp4_{name}", text, [(label, value)])
        for name, text, total in (
            ("preemptions_total", "Answers that gave their pages up for a while.", float(counters.preemptions)),
            ("decode_steps_total", "Steps of next tokens only.", counters.decode_steps),
            ("mixed_steps_total", "Steps with parts of prompts.", counters.mixed_steps),
            ("busy_seconds_total", "In which the engine had something to do.", counters.busy_seconds),
        ):
            yield gauge(f"moe_nvfp4_{name}", text, [(label, total)], "counter")
        groups = [{**label, "group": str(group)} for group in range(len(now.pages))]
        held = [count - free for count, free in zip(now.pages, now.free_pages, strict=True)]
        free_text, held_text = "Pages of the cache that no answer holds.", "Pages of the cache that answers hold."
        yield gauge("moe_nvfp4_pages_free", free_text, zip(groups, now.free_pages, strict=True))
        yield gauge("moe_nvfp4_pages_held", held_text, zip(groups, held, strict=True))

    def _floor_figures(self, engine: Engine, bytes_per_second: float) -> Iterable[Family]:
        """Bytes over seconds and over the rate of reading is the share of a step that its bytes alone would take."""
        label, counters = {"model": self.name}, engine.stats().counters
        seconds, moved = "In steps of next tokens only.", "Bytes that those steps had to move, at least."
        rate = "Rate at which this device reads its memory, measured when the model was loaded."
        yield gauge("moe_nvfp4_decode_seconds_total", seconds, [(label, counters.decode_seconds)], "counter")
        yield gauge("moe_nvfp4_decode_bytes_total", moved, [(label, counters.decode_bytes)], "counter")
        yield gauge("moe_nvfp4_read_bytes_per_second", rate, [(label, bytes_per_second)])

    def close(self) -> None:
        for threads in (self._encoder, self._compiler):
            threads.shutdown(wait=False, cancel_futures=True)

    def card(self) -> dict[str, Any]:
        owner = {"object": "model", "created": self.created, "owned_by": "moe-nvfp4"}
        return {"id": self.name, **owner, "max_model_len": self.prompts.max_seq_len}
