"""Steps of prompts of every size, ahead, so that no request has to wait until what serves its size is there.

Which kernels serve a step depends on its number of rows, and each number has a graph (see prompt_buffers.py); the
decode graphs have compiled those of decode steps. Everything goes to the cache's spare slot.
"""

import sys
import time
from collections.abc import Sequence

import torch

from moe_nvfp4.batch import Piece
from moe_nvfp4.cache import SequenceCache
from moe_nvfp4.engine.stepper import Stepper, WholeStep
from moe_nvfp4.sampling import Sampler, SamplingParams


def warm_up(stepper: Stepper, step_rows: int, verbose: bool) -> None:
    began, sizes = time.perf_counter(), step_sizes(stepper.sizes, step_rows)
    stepper.compile_mixed([spare_pieces(stepper.cache, rows) for rows in sizes], step_rows)
    for rows in sizes:
        for _ in range(2):  # its graph is captured the second time
            _step(stepper, rows, SamplingParams())
        if verbose:
            seconds = time.perf_counter() - began
            print(f"\rsteps with prompts: {rows:>5} rows {seconds:6.1f} s", end="", file=sys.stderr, flush=True)
    for params in (SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_k=20, top_p=0.9)):
        _step(stepper, 16, params)
    if stepper.device.type == "cuda":
        torch.cuda.empty_cache()  # of what ran beside the captures
    if verbose:
        print(f"\rsteps with prompts of up to {step_rows} rows: {time.perf_counter() - began:.1f} s", file=sys.stderr)


def step_sizes(sizes: Sequence[int], most: int) -> list[int]:
    """Largest first: the memory it takes serves the others. Those with graphs, or each range that a kernel's table of
    choices tells apart: powers of two and what lies between them."""
    every = sizes or {2**n for n in range(1, 20)} | {3 * 2**n for n in range(1, 20)}
    return sorted({size for size in every if size < most} | {most}, reverse=True)


def spare_pieces(cache: SequenceCache, rows: int) -> list[Piece]:
    """A step of so many rows, all in the spare slot: a third are next tokens, as beside answers that have begun, and no
    prompt has more than the cache takes in a step."""
    counts, left = [1] * min(rows // 3, cache.slots), rows - min(rows // 3, cache.slots)
    while left:
        counts.append(min(left, cache.most_rows))
        left -= counts[-1]
    return [Piece(cache.spare_slot, 0, [0] * count) for count in counts]


def _step(stepper: Stepper, rows: int, params: SamplingParams) -> None:
    pieces = spare_pieces(stepper.cache, rows)
    whole = None
    if stepper.ranks.splits_rows:
        size = stepper.ranks.size
        places = tuple((rank, index) for rank in range(size) for index in range(len(pieces)))
        prompts = sum(len(piece.token_ids) > 1 for piece in pieces)
        whole = WholeStep((len(pieces),) * size, (rows,) * size, (prompts,) * size, places, False)
    stepper.mixed(pieces, [Sampler(params)] * len(pieces), whole=whole).wait()
    if stepper.device.type == "cuda":
        torch.cuda.synchronize(stepper.device)
