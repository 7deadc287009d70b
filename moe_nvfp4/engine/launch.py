"""From a planned step to calls of cache and stepper: pages, states, penalties, then the rows.

Where every rank has sequences of its own, each launches its own rows and takes part in the exchanges of all.
"""

from collections.abc import Sequence

from moe_nvfp4.batch import Piece
from moe_nvfp4.engine.data_parallel import GroupStep
from moe_nvfp4.engine.scheduler import Rows, Step
from moe_nvfp4.engine.step_buffers import DecodeRow
from moe_nvfp4.engine.stepper import Stepper, StepResult, WholeStep
from moe_nvfp4.generation import Answer
from moe_nvfp4.grammar import TokenMasks


def launch(stepper: Stepper, step: Step, answers: Sequence[Answer], vocab_size: int) -> StepResult:
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
    bound = [
        (i, answer.matcher) for i, (rows, answer) in enumerate(pairs) if rows.samples and answer.matcher is not None
    ]
    masks = TokenMasks(*map(list, zip(*bound, strict=True))) if bound else None
    if step.decodes_only:
        decode_rows = [DecodeRow(rows.sequence.slot, rows.start, answer.params) for rows, answer in pairs]
        greedy = all(answer.params.greedy for _, answer in pairs)
        uniforms = None if greedy else [answer.sampler.uniform() for _, answer in pairs]
        result = stepper.decode(decode_rows, uniforms, tops, masks, whole)
    else:
        pieces = [Piece(rows.sequence.slot, rows.start, _token_ids(rows)) for rows, _ in pairs]
        samplers = [answer.sampler if rows.samples else None for rows, answer in pairs]
        result = stepper.mixed(pieces, samplers, tops, masks, whole)
    for rows, _ in pairs:
        if rows.snapshot is not None:
            cache.copy_states(rows.sequence.slot, cache.first_snapshot + rows.snapshot)
    return result


def _token_ids(rows: Rows) -> Sequence[int]:
    """Empty for a row that takes the token which its slot has given last."""
    return () if rows.continues else rows.sequence.tokens[rows.start : rows.start + rows.count]


def _whole(step: GroupStep, pairs: Sequence[tuple[Rows, Answer]], size: int) -> WholeStep:
    sequences, tokens, places = [0] * size, [0] * size, []
    for rows, rank in zip(step.rows, step.ranks, strict=True):
        places.append((rank, sequences[rank]))
        sequences[rank] += 1
        tokens[rank] += rows.count
    changed = any(
        answer.params.changes_logits or (rows.samples and answer.matcher is not None) for rows, answer in pairs
    )
    return WholeStep(tuple(sequences), tuple(tokens), tuple(places), changed)
