"""The steps of a whole model, sampling included: decode steps as CUDA graphs or as they are, and mixed steps.

The token that a sequence got last stays on the device, under its slot, and the next step takes it from there. So a
step can be launched before the tokens of the one before it have reached the host. There is a graph for each bucket of
batch sizes; rows that fill a bucket up are padding, which reads and writes the cache's spare slot.

In a group all ranks take a step together. Those that share rows go on with the tokens of rank 0. Where each has
sequences of its own, every rank brings as many rows, padding included, and learns the tokens of all.
"""

import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch.nn import functional as F

from moe_nvfp4.batch import Batch, Piece
from moe_nvfp4.cache import SequenceCache
from moe_nvfp4.determinism import Determinism
from moe_nvfp4.engine.compile_ahead import compile_ahead
from moe_nvfp4.engine.penalties import Penalties
from moe_nvfp4.engine.prompt_buffers import PromptBuffers, PromptBuffersBySize, row_buckets
from moe_nvfp4.engine.step_buffers import DecodeRow, StepBuffers
from moe_nvfp4.grammar import TokenMasks
from moe_nvfp4.kernels.rows import upload
from moe_nvfp4.kernels.sample import Logprobs, Sampled, SamplingRows, logprobs, sample
from moe_nvfp4.models import Model
from moe_nvfp4.parallel import ALONE, Ranks
from moe_nvfp4.routing.dispatch import StepRows
from moe_nvfp4.sampling import Sampler, SamplingParams, sampling_rows


class WholeStep(NamedTuple):
    """A step of ranks that have sequences of their own: what all of them know of it. Without it all step alike."""

    sequences: tuple[int, ...]  # of each rank
    tokens: tuple[int, ...]  # rows of each rank
    prompts: tuple[int, ...]  # sequences of each rank with more rows than one
    places: tuple[tuple[int, int], ...]  # where each result lies: rank, and index among that rank's sequences
    changed: bool  # whether logits of any sequence are changed before its token is chosen


class StepResult(NamedTuple):
    """One step's tokens on their way to the host."""

    token_ids: torch.Tensor
    peaks: torch.Tensor  # of the logits
    logprobs: Logprobs | None
    arrived: torch.cuda.Event | None
    order: list[int] | None = None  # where the results lie, if not in their order; logprobs do

    def wait(self) -> tuple[list[int], list[float]]:
        if self.arrived is not None:
            self.arrived.synchronize()
        token_ids, peaks = self.token_ids.tolist(), self.peaks.tolist()
        if self.order is None:
            return token_ids, peaks
        return [token_ids[index] for index in self.order], [peaks[index] for index in self.order]


class Stepper:
    """Batches of decode steps are filled up to one of `buckets`, and so are the rows of steps with prompts, up to
    `fill_rows` of them. `graphs`: captures those of decode steps when it is built, the others when they are needed.
    `count_rows`: somebody counts rows, and must know which of them fill up."""

    def __init__(
        self,
        model: Model,
        cache: SequenceCache,
        device: torch.device,
        *,
        buckets: Sequence[int],
        graphs: bool,
        verbose: bool,
        fill_rows: int = 0,
        ranks: Ranks = ALONE,
        count_rows: bool = False,
        determinism: Determinism = Determinism.OFF,
    ):
        self.model, self.cache, self.device, self.buckets = model, cache, device, sorted(buckets)
        self.ranks, self._tells_rows = ranks, ranks.size > 1 or count_rows
        self.determinism = determinism
        self._logprobs = partial(logprobs, batch_invariant=determinism is not Determinism.OFF)
        self._lines = ranks.size if ranks.splits_rows else 1  # ranks with sequences of their own
        self._line = ranks.rank if ranks.splits_rows else 0
        self.penalties = Penalties(cache.slots, device)
        self.last_tokens = torch.zeros(cache.slots + 1, dtype=torch.int32, device=device)
        self._buffers: dict[int, StepBuffers] = {}
        lines = self._lines if self._tells_rows else None
        self.sizes = row_buckets(fill_rows)  # to which steps with prompts are filled up
        self._prompt_buffers = PromptBuffersBySize(self.sizes, cache, device, graphs=graphs, lines=lines)
        if graphs:
            self._capture_all(verbose)

    @property
    def has_graphs(self) -> bool:
        return any(buffers.graph is not None for buffers in self._buffers.values())

    @torch.inference_mode()
    def decode(
        self,
        rows: Sequence[DecodeRow],
        uniforms: Sequence[float] | None = None,
        top_logprobs: int | None = None,
        masks: TokenMasks | None = None,
        whole: WholeStep | None = None,
    ) -> StepResult:
        """Launches one step and returns at once. `uniforms`: the random number of each row; none for greedy rows."""
        live = (len(rows),) * self._lines if whole is None else whole.sequences
        size = self._bucket(max(live)) if self.device.type == "cuda" else max(live)
        if size not in self._buffers:
            self._buffers[size] = self._new_buffers(size)
        buffers = self._buffers[size]
        buffers.set_live(live)
        if buffers.next_rows != rows:
            buffers.fill(rows, self.cache.spare_slot)
        if uniforms is not None:
            buffers.set_uniforms(uniforms)
        if buffers.graph is not None:
            buffers.graph.replay()
        else:
            self._run(buffers)
        buffers.next_rows = [DecodeRow(slot, position + 1, params) for slot, position, params in rows]
        assert buffers.sampled is not None and buffers.logits is not None
        sampled = buffers.sampled
        changed = masks is not None or any(row.params.changes_logits for row in rows)
        if changed or (whole is not None and whole.changed):
            own = Sampled(*(part[self._line] for part in sampled))
            if changed:
                params = [row.params for row in rows] + [SamplingParams()] * (size - len(rows))
                slots = [row.slot for row in rows] + [self.cache.spare_slot] * (size - len(rows))
                own = self._sample_changed(buffers.logits, buffers.sampling, slots, params, masks)
            sampled = self._share(own, size)
            self.last_tokens.index_copy_(0, buffers.rows.slots.long(), sampled.token_ids[self._line])
        return self._results(sampled, buffers.logits, top_logprobs, len(rows), whole)

    @torch.inference_mode()
    def mixed(
        self,
        pieces: Sequence[Piece],
        samplers: Sequence[Sampler | None],
        top_logprobs: int | None = None,
        masks: TokenMasks | None = None,
        whole: WholeStep | None = None,
    ) -> StepResult:
        """Chunks of prompts and next tokens in one step; a piece of one next token has no ids of its own: it takes the
        token that its sequence got last. A result for every piece, to be ignored where the sampler is None."""
        count = len(pieces)
        if not pieces:  # other ranks have some
            pieces, samplers = [Piece(self.cache.spare_slot, 0, (0,))], [None]
        known = [p if p.token_ids else p._replace(token_ids=(0,)) for p in pieces]
        batch, buffers = self._batch(known, whole)
        continued = [index for index, piece in enumerate(pieces) if not piece.token_ids]
        if continued:
            places, slots = upload([continued, [pieces[index].slot for index in continued]], self.device)
            batch.token_ids.index_copy_(0, batch.last_rows[places].long(), self.last_tokens[slots])
        hidden = self.model.forward(batch, self.cache) if buffers is None else buffers.forward(self.model)
        logits = self.determinism.alike(self.model.logits(hidden[batch.last_rows]))
        wanted, targets = sampling_rows(samplers, self.device), [piece.slot for piece in pieces]
        params = [SamplingParams() if sampler is None else sampler.params for sampler in samplers]
        if masks is not None or any(one.changes_logits for one in params):
            sampled = self._sample_changed(logits, wanted, targets, params, masks)
        else:
            sampled = sample(logits, wanted)
        sampled = self._share(sampled, len(pieces) if whole is None else max(whole.sequences))
        giving = [index for index, sampler in enumerate(samplers) if sampler is not None]
        if giving:
            places, lines = upload([giving, [targets[index] for index in giving]], self.device)
            self.last_tokens.index_copy_(0, lines.long(), sampled.token_ids[self._line][places])
        return self._results(sampled, logits, top_logprobs, count, whole)

    def _batch(self, pieces: Sequence[Piece], whole: WholeStep | None) -> tuple[Batch, PromptBuffers | None]:
        if whole is None:
            counts = [len(piece.token_ids) for piece in pieces]
            rows, prompts = (sum(counts),) * self._lines, (sum(count > 1 for count in counts),) * self._lines
        else:
            rows, prompts = whole.tokens, whole.prompts
        buffers = self._prompt_buffers.of(rows, prompts)
        (live_G,) = upload([rows], self.device) if self._tells_rows else (None,)
        if buffers is None:
            return Batch.of(pieces, self.device, None if live_G is None else StepRows(max(rows), live_G)), None
        if live_G is not None and buffers.step is not None:
            buffers.step.live_G.copy_(live_G)
        return buffers.fill(pieces), buffers

    def _share(self, sampled: Sampled, size: int) -> Sampled:
        """[lines, size] of what all ranks go on with."""
        missing = size - len(sampled.token_ids)
        return Sampled(*self.ranks.share([F.pad(part, (0, missing)) if missing else part for part in sampled]))

    def _results(
        self, sampled: Sampled, logits: torch.Tensor, top: int | None, count: int, whole: WholeStep | None
    ) -> StepResult:
        """`count`: of this rank's rows, the first ones that matter."""
        if whole is None:
            sampled = Sampled(*(part[self._line, :count] for part in sampled))
            return _in_flight(sampled, None if top is None else self._logprobs(logits[:count], sampled.token_ids, top))
        size = sampled.token_ids.shape[1]
        order = [rank * size + index for rank, index in whole.places]
        tops = None
        if top is not None:
            own = self._logprobs(logits, sampled.token_ids[self._line][: len(logits)], top)
            (places,) = upload([order], self.device)
            tops = Logprobs(*(self.ranks.gather(part, size)[places] for part in own))
        return _in_flight(Sampled(*(part.flatten() for part in sampled)), tops, order)

    def _sample_changed(
        self,
        logits: torch.Tensor,
        wanted: SamplingRows,
        slots: Sequence[int],
        params: Sequence[SamplingParams],
        masks: TokenMasks | None,
    ) -> Sampled:
        """Tokens where some rows have penalties or biases, or follow a grammar."""
        changed = [index for index, one in enumerate(params) if one.changes_logits]
        theirs = [slots[index] for index in changed]
        (rows,) = (part.long() for part in upload([changed], self.device))
        logits = logits.to(torch.float32, copy=True)
        if changed:
            self.penalties.apply(logits, rows, theirs, [params[index] for index in changed])
        if masks is not None:
            masks.exclude(logits)
        sampled = sample(logits, wanted)
        if changed:
            self.penalties.count(theirs, sampled.token_ids[rows])
        return sampled

    def _run(self, buffers: StepBuffers) -> None:
        slots = buffers.rows.slots
        hidden = self.model.forward(self._decode_batch(buffers), self.cache)
        buffers.logits = self.determinism.alike(self.model.logits(hidden))
        buffers.sampled = self._share(sample(buffers.logits, buffers.sampling), len(slots))
        self.last_tokens[slots] = buffers.sampled.token_ids[self._line]
        positions_and_lengths, live = buffers.flat[0:2], buffers.flat[3]
        positions_and_lengths.add_(live)

    def _decode_batch(self, buffers: StepBuffers) -> Batch:
        rows = buffers.rows
        return Batch(self.last_tokens[rows.slots], rows, rows.starts[:-1], buffers.step)

    def _new_buffers(self, size: int) -> StepBuffers:
        return StepBuffers.new(size, self.device, self._lines if self._tells_rows else None)

    def _bucket(self, rows: int) -> int:
        return next((size for size in self.buckets if size >= rows), rows)

    def compile_mixed(self, steps: Sequence[Sequence[Piece]], rows_at_once: int) -> None:
        """What steps of these pieces will launch."""
        self._compile([self._batch(pieces, None)[0] for pieces in steps], rows_at_once)

    def _compile(self, batches: Sequence[Batch], rows_at_once: int) -> None:
        """Where it can be done ahead; see compile_ahead."""
        if self.device.type == "cuda" and self.ranks.size == 1:  # what ranks exchange must have one order
            compile_ahead(self.model, self.cache, self.device, batches, rows_at_once)

    @torch.inference_mode()
    def _capture_all(self, verbose: bool) -> None:
        began, pool = time.perf_counter(), torch.cuda.graph_pool_handle()
        for size in reversed(self.buckets):
            self._buffers[size] = self._new_buffers(size)
            self._buffers[size].fill([], self.cache.spare_slot)
        self._compile([self._decode_batch(buffers) for buffers in self._buffers.values()], 2 * self.buckets[-1])
        for size, buffers in self._buffers.items():  # the largest first: the others fit in its memory
            stream = torch.cuda.Stream(self.device)
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                self._run(buffers)  # compiles what is not compiled yet
            torch.cuda.current_stream(self.device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Another runner of this process may be at work in its own thread.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._run(buffers)
            buffers.graph = graph
            if verbose:
                seconds = time.perf_counter() - began
                print(f"\rdecode graphs: batch {size:<5} {seconds:6.1f} s", end="", file=sys.stderr, flush=True)
        if verbose:
            seconds, sizes = time.perf_counter() - began, ", ".join(map(str, self.buckets))
            print(f"\rdecode graphs for batches of {sizes}: {seconds:.1f} s", file=sys.stderr)


def _in_flight(sampled: Sampled, tops: Logprobs | None, order: list[int] | None = None) -> StepResult:
    """Copies of a step's results that the next step does not overwrite, on their way to the host."""
    if not sampled.token_ids.is_cuda:
        return StepResult(sampled.token_ids.clone(), sampled.peaks.clone(), tops, None, order)

    def to_host(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

    host = None if tops is None else Logprobs(*map(to_host, tops))
    token_ids, peaks = map(to_host, sampled)
    arrived = torch.cuda.Event()
    arrived.record()
    return StepResult(token_ids, peaks, host, arrived, order)
