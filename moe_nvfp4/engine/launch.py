"""From a planned step to calls of cache and stepper: pages, states, penalties, then the rows.

Where every rank has sequences of its own, each launches its own rows and takes part in the exchanges of all.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Final, NamedTuple

import torch

from moe_nvfp4.batch import Piece
from moe_nvfp4.determinism import Determinism
from moe_nvfp4.engine.data_parallel import GroupStep
from moe_nvfp4.engine.scheduler import Rows, Step
from moe_nvfp4.engine.step_buffers import DecodeRow
from moe_nvfp4.engine.stepper import Stepper, StepResult, WholeStep
from moe_nvfp4.generation import Answer
from moe_nvfp4.grammar import TokenMasks
from moe_nvfp4.kernels.rows import upload
from moe_nvfp4.kernels.sample import Logprobs
from moe_nvfp4.sampling import SamplingParams

Pairs = Sequence[tuple[Rows, Answer]]
_NOBODY: Final = SamplingParams()  # of a row whose token is known


class SeparateResults(NamedTuple):
    """Of sequences that were computed one after the other, as of one step."""

    parts: list[StepResult]

    def wait(self) -> tuple[list[int], list[float]]:
        token_ids, peaks = zip(*(part.wait() for part in self.parts), strict=True)
        return list(chain(*token_ids)), list(chain(*peaks))

    @property
    def logprobs(self) -> Logprobs | None:
        found = [part.logprobs for part in self.parts if part.logprobs is not None]
        return Logprobs(*map(torch.cat, zip(*found, strict=True))) if found else None


def launch(stepper: Stepper, step: Step, answers: Sequence[Answer], vocab_size: int) -> StepResult | SeparateResults:
    """`answers`: of each of the step's rows. The results are in the order of the rows, at every rank."""
    cache, pairs = stepper.cache, list(zip(step.rows, answers, strict=True))
    wanted = [answer.params.logprobs for answer in answers if answer.params.logprobs is not None]
    tops, whole = max(wanted, default=None), None
    if isinstance(step, GroupStep):
        whole = _whole(step, pairs, stepper.ranks.size)
        pairs = [pair for pair, rank in zip(pairs, step.ranks, strict=True) if rank == stepper.ranks.rank]
    cache.set_pages([(c.group, rows.sequence.slot, c.index, c.page) for rows, _ in pairs for c in rows.changes])
    for rows, answer in pairs:
        if rows.restore is not None:
            cache.copy_states(cache.first_snapshot + rows.restore, rows.sequence.slot)
        if rows.samples and not rows.continues and answer.params.changes_logits:
            tokens, prompt = rows.sequence.tokens, rows.sequence.prompt_length
            stepper.penalties.begin(rows.sequence.slot, tokens[:prompt], tokens[prompt:], vocab_size)
    result: StepResult | SeparateResults
    if stepper.determinism is Determinism.APART:
        # In order: a sequence may share pages that one before it fills in this very step.
        result = SeparateResults([_run(stepper, [pair], pair[0].decodes, tops, None) for pair in pairs])
    else:
        result = _run(stepper, pairs, step.decodes_only, tops, whole)
    for rows, _ in pairs:
        if rows.snapshot is not None:
            cache.copy_states(rows.sequence.slot, cache.first_snapshot + rows.snapshot)
    return result


def _run(stepper: Stepper, pairs: Pairs, decodes_only: bool, tops: int | None, whole: WholeStep | None) -> StepResult:
    bound = [
        (i, answer.matcher) for i, (rows, answer) in enumerate(pairs) if rows.samples and answer.matcher is not None
    ]
    masks = TokenMasks(*map(list, zip(*bound, strict=True))) if bound else None
    if not decodes_only:
        first = stepper.cache.first_snapshot
        pieces = [Piece(rows.sequence.slot, rows.start, _token_ids(rows), _line(rows, first)) for rows, _ in pairs]
        samplers = [answer.sampler if rows.samples else None for rows, answer in pairs]
        return stepper.mixed(pieces, samplers, tops, masks, whole)
    known = [(rows.sequence.slot, rows.sequence.tokens[rows.start]) for rows, _ in pairs if rows.recomputes]
    if known:
        slots, tokens = upload(list(zip(*known, strict=True)), stepper.device)
        stepper.last_tokens.index_copy_(0, slots.long(), tokens)
    params = [answer.params if rows.samples else _NOBODY for rows, answer in pairs]
    decode_rows = [DecodeRow(rows.sequence.slot, rows.start, one) for (rows, _), one in zip(pairs, params, strict=True)]
    greedy = all(one.greedy for one in params)
    uniforms = None if greedy else [answer.sampler.uniform() if rows.samples else 0.0 for rows, answer in pairs]
    return stepper.decode(decode_rows, uniforms, tops, masks, whole)


def _token_ids(rows: Rows) -> Sequence[int]:
    """Empty for a row that takes the token which its slot has given last."""
    return () if rows.continues else rows.sequence.tokens[rows.start : rows.start + rows.count]


def _line(rows: Rows, first_snapshot: int) -> int:
    return -1 if rows.inner_snapshot is None else first_snapshot + rows.inner_snapshot


def _whole(step: GroupStep, pairs: Sequence[tuple[Rows, Answer]], size: int) -> WholeStep:
    sequences, tokens, prompts, places = [0] * size, [0] * size, [0] * size, []
    for rows, rank in zip(step.rows, step.ranks, strict=True):
        places.append((rank, sequences[rank]))
        sequences[rank] += 1
        tokens[rank] += rows.count
        prompts[rank] += rows.count > 1
    changed = any(
        answer.params.changes_logits or (rows.samples and answer.matcher is not None) for rows, answer in pairs
    )
    return WholeStep(tuple(sequences), tuple(tokens), tuple(prompts), tuple(places), changed)
