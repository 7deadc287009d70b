"""Where a sequence is cut into pieces, and from where in it others may go on.

Usually a piece takes what a step has room for. With `Limits.whole_chunks` it depends on its sequence alone: a prompt is
cut at the multiples of `Limits.chunk` and nowhere else, and the tokens of an answer are computed one at a time, also
when they are computed again after a preemption. So every token is computed in the same piece, after the same ones,
whatever else runs. Others may go on after whole chunks of a prompt only: what lies behind them, in the last piece of a
prompt or in an answer, they would have computed in other pieces.
"""

from typing import TYPE_CHECKING, Final

from moe_nvfp4.engine.cost import PromptBudget
from moe_nvfp4.engine.sequence_memory import SequenceMemory

if TYPE_CHECKING:
    from moe_nvfp4.engine.scheduler import Limits, Sequence

SNAPSHOT_PAGES: Final = 4  # a shorter prefix is computed again faster than its states are copied


def next_rows(sequence: "Sequence", budget: PromptBudget, limits: "Limits", memory: SequenceMemory) -> int:
    """Rows of the next piece of a prompt, or of an answer that is computed again in pieces; 0 where the step has no
    room."""
    if limits.whole_chunks:
        count = _whole_rows(sequence, limits.chunk)
        return count if budget.takes(sequence.computed, count) else 0
    return _rows_within(sequence, budget.most(sequence.computed), limits, memory)


def first_rows(sequence: "Sequence", budget: PromptBudget, limits: "Limits", memory: SequenceMemory) -> int:
    """The same of one that `may_begin` let in, and that has to get some."""
    if limits.whole_chunks:
        return _whole_rows(sequence, limits.chunk)
    return _rows_within(sequence, max(1, budget.most(sequence.computed)), limits, memory)


def may_begin(sequence: "Sequence", budget: PromptBudget, limits: "Limits") -> bool:
    """Whether the step has room for a first piece, wherever it begins."""
    if limits.whole_chunks:
        return budget.takes(0, min(sequence.length, limits.chunk))
    return budget.most(0) > 0


def findable(sequence: "Sequence", limits: "Limits") -> int:
    """Computed tokens whose pages others may find."""
    if limits.whole_chunks:
        return min(sequence.computed, sequence.prompt_length) // limits.chunk * limits.chunk
    return sequence.computed


def searchable(sequence: "Sequence", limits: "Limits") -> int:
    """Leading tokens among which pages of others may be looked for."""
    return sequence.prompt_length if limits.whole_chunks else len(sequence.tokens)


def is_recomputed(sequence: "Sequence", start: int, limits: "Limits") -> bool:
    """Whether the piece at `start` is a known token of an answer, which was a decode row once and is one again."""
    return limits.whole_chunks and start >= sequence.prompt_length


def wants_snapshot(sequence: "Sequence", end: int, limits: "Limits", page: int) -> bool:
    """Whether states are kept where a piece of a prompt ends."""
    whole = not limits.whole_chunks or end % limits.chunk == 0
    return whole and SNAPSHOT_PAGES * page <= end <= sequence.prompt_length


def inner_snapshot(sequence: "Sequence", start: int, end: int, limits: "Limits", page: int) -> int:
    """After how many tokens a piece's step itself keeps states, so that the piece need not end there; 0: nowhere. A
    step can do so before the last page of a piece, if that begins with a page: see Rows.lines in kernels/rows.py."""
    place = (end - 1) // page * page
    possible = start % page == 0 and start < place and not limits.whole_chunks
    return place if possible and place >= SNAPSHOT_PAGES * page and place in stops(sequence, limits, page) else 0


def stops(sequence: "Sequence", limits: "Limits", page: int) -> tuple[int, int]:
    """Where a prompt's states are worth a snapshot: after what others had too, and at the last place that one with the
    same prompt could go on from."""
    unit = limits.chunk if limits.whole_chunks else page
    return sequence.shared // unit * unit, (sequence.prompt_length - 1) // unit * unit


def _whole_rows(sequence: "Sequence", chunk: int) -> int:
    return min(sequence.computed // chunk * chunk + chunk, sequence.prompt_length) - sequence.computed


def _rows_within(sequence: "Sequence", most: int, limits: "Limits", memory: SequenceMemory) -> int:
    left, page = sequence.length - sequence.computed, memory.page
    count = min(left, most, limits.chunk)
    if count and memory.takes_snapshots:
        # States can be reused only from where they were kept, and only from the end of a page.
        start = sequence.computed
        for stop in stops(sequence, limits, page):
            inside = inner_snapshot(sequence, start, start + count, limits, page) == stop
            if start < stop and stop >= SNAPSHOT_PAGES * page and not inside:
                count = min(count, stop - start)
        aligned = (start + count) // page * page
        if count < left and aligned > start:
            count = aligned - start
    return count
