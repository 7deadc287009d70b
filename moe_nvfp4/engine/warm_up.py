"""Steps of prompts of every size, once, so that no request has to wait until a kernel for its size is compiled.

Which kernel serves a step depends on its number of rows; the decode graphs have compiled those of decode steps. An
empty kernel cache costs some seconds here, a filled one some tenths. Everything goes to the cache's spare slot.
"""

import sys
import time

import torch

from moe_nvfp4.batch import Piece
from moe_nvfp4.engine.stepper import Stepper, WholeStep
from moe_nvfp4.sampling import Sampler, SamplingParams


def warm_up(stepper: Stepper, step_rows: int, chunk: int, verbose: bool) -> None:
    began = time.perf_counter()
    for rows in _sizes(step_rows):
        _step(stepper, rows, chunk, SamplingParams())
    for params in (SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_k=20, top_p=0.9)):
        _step(stepper, 16, chunk, params)
    if verbose:
        print(f"kernels for prompts: {time.perf_counter() - began:.1f} s", file=sys.stderr)


def _sizes(most: int) -> list[int]:
    """Powers of two and what lies between them: each range that a kernel's table of choices tells apart."""
    sizes = {2**n for n in range(1, 20)} | {3 * 2**n for n in range(1, 20)}
    return sorted({size for size in sizes if size < most} | {most}, reverse=True)


def _step(stepper: Stepper, rows: int, chunk: int, params: SamplingParams) -> None:
    """A third of the rows are next tokens, as beside answers that have begun; no prompt has more than `chunk`."""
    spare = stepper.cache.spare_slot
    counts, left = [1] * min(rows // 3, stepper.cache.slots), rows - min(rows // 3, stepper.cache.slots)
    while left:
        counts.append(min(left, chunk, stepper.cache.settings.max_seq_len))
        left -= counts[-1]
    pieces = [Piece(spare, 0, [0] * count) for count in counts]
    whole = None
    if stepper.ranks.splits_rows:
        size = stepper.ranks.size
        places = tuple((rank, index) for rank in range(size) for index in range(len(counts)))
        whole = WholeStep((len(counts),) * size, (rows,) * size, places, False)
    stepper.mixed(pieces, [Sampler(params)] * len(pieces), whole=whole).wait()
    if stepper.device.type == "cuda":
        torch.cuda.synchronize(stepper.device)
