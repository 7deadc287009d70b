"""A device for the scheduler that computes nothing but knows what every place ought to hold.

The keys and values of a token depend on all tokens before it, so each place of a page holds the identity of the prefix
that ends there. Steps run in the order in which they were planned; their tokens come back later.
"""

from collections import deque

from moe_nvfp4.engine.invariants import check
from moe_nvfp4.engine.scheduler import Rows, Scheduler, Sequence, Step

END = 0  # the token that ends an answer
ROOT = 0


class Prefixes:
    """Equal prefixes have equal numbers. `follows` stands for the model: greedy, so it depends on the prefix alone."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self._numbers: dict[tuple[int, int], int] = {}

    def after(self, prefix: int, token: int) -> int:
        return self._numbers.setdefault((prefix, token), len(self._numbers) + 1)

    def follows(self, prefix: int) -> int:
        return (prefix * 2654435761 >> 9) % self.vocabulary

    def answer(self, prompt: list[int], max_new_tokens: int, max_length: int) -> list[int]:
        prefix, tokens = ROOT, []
        for token in prompt:
            prefix = self.after(prefix, token)
        while len(tokens) < max_new_tokens and len(prompt) + len(tokens) < max_length:
            tokens.append(self.follows(prefix))
            if tokens[-1] == END:
                break
            prefix = self.after(prefix, tokens[-1])
        return tokens


class Device:
    """What the loop and the stepper do with a step, and what must be true of it."""

    def __init__(self, scheduler: Scheduler, vocabulary: int = 97) -> None:
        self.memory, self.prefixes = scheduler.memory, Prefixes(vocabulary)
        self.pages: dict[tuple[int, int, int], int] = {}  # group, page, place: prefix
        self.tables: dict[tuple[int, int, int], int] = {}  # group, slot, index: page; never cleared
        self.states: dict[int, int] = {}
        self.lines: dict[int, int] = {}
        self.last_tokens: dict[int, int] = {}
        self.truth: dict[int, list[int]] = {}  # tokens of each sequence, those on their way included
        self.chains: dict[int, list[int]] = {}  # prefixes before each token

    def run(self, step: Step) -> list[int | None]:
        """The token that each row gives."""
        assert len({rows.sequence.slot for rows in step.rows}) == len(step.rows), "two rows of one slot"
        for rows in step.rows:
            slot = rows.sequence.slot
            for group, index, page in rows.changes:
                self.tables[group, slot, index] = page
            if rows.restore is not None:
                self.states[slot] = self.lines[rows.restore]
        written: set[tuple[int, int, int]] = set()
        for rows in step.rows:
            self._write(rows, step.decodes_only, written)
        for rows in step.rows:
            self._read(rows)
        kept = [line for rows in step.rows for line in (rows.snapshot, rows.inner_snapshot) if line is not None]
        assert len(set(kept)) == len(kept), "two states for one line"
        for rows in step.rows:
            if rows.snapshot is not None:
                self.lines[rows.snapshot] = self.states[rows.sequence.slot]
            if rows.inner_snapshot is not None:
                page = self.memory.page
                place = (rows.start + rows.count - 1) // page * page
                assert rows.start % page == 0 and rows.start < place, "no kernel comes by there"
                self.lines[rows.inner_snapshot] = self.chains[rows.sequence.ident][place]
        return [self._sample(rows) if rows.samples else None for rows in step.rows]

    def _write(self, rows: Rows, decodes_only: bool, written: set[tuple[int, int, int]]) -> None:
        sequence, slot, end = rows.sequence, rows.sequence.slot, rows.start + rows.count
        truth = self.truth.setdefault(sequence.ident, list(sequence.tokens))
        chain = self.chains.setdefault(sequence.ident, [ROOT])
        # As the loop does: a decode step takes the slot's token, a mixed one only where the host does not know it.
        known = [] if decodes_only and not rows.recomputes else sequence.tokens[rows.start : end]
        tokens = known or [self.last_tokens[slot]]
        assert tokens == truth[rows.start : end], "a row computes another token than the one that follows"
        for token in truth[len(chain) - 1 : end]:
            chain.append(self.prefixes.after(chain[-1], token))
        for group in range(len(self.memory.groups)):
            for position in range(rows.start, end):
                place = self._place(group, slot, position)
                assert place not in written, "two rows write one place"
                written.add(place)
                self.pages[place] = chain[position + 1]
        if self.memory.snapshots is not None:
            assert rows.start == 0 or self.states[slot] == chain[rows.start], "states of another prefix"
            self.states[slot] = chain[end]

    def _read(self, rows: Rows) -> None:
        chain, end = self.chains[rows.sequence.ident], rows.start + rows.count
        for group, (_, window) in enumerate(self.memory.groups):
            for position in range(max(0, rows.start - window + 1) if window else 0, end):
                place = self._place(group, rows.sequence.slot, position)
                assert self.pages.get(place) == chain[position + 1], f"token {position} of group {group} is another's"

    def _place(self, group: int, slot: int, position: int) -> tuple[int, int, int]:
        index, place = divmod(position, self.memory.page)
        return group, self.tables[group, slot, index], place

    def _sample(self, rows: Rows) -> int:
        token = self.prefixes.follows(self.chains[rows.sequence.ident][rows.start + rows.count])
        truth = self.truth[rows.sequence.ident]
        assert len(truth) == rows.start + rows.count, "a token was sampled twice"
        truth.append(token)
        self.last_tokens[rows.sequence.slot] = token
        return token


class PieceDevice(Device):
    """Knows also in which piece of its sequence a place was computed: with whole chunks that follows from prompt and
    place alone, whoever computed it."""

    def __init__(self, scheduler: Scheduler, vocabulary: int) -> None:
        super().__init__(scheduler, vocabulary)
        self.chunk = scheduler.limits.chunk
        self.pieces: dict[tuple[int, int, int], tuple[int, int]] = {}  # group, page, place: start and end
        self.ends: dict[int, int] = {}  # slot: start of the piece after which its states are
        self.line_ends: dict[int, int] = {}

    def piece_of(self, sequence: Sequence, position: int) -> tuple[int, int]:
        if position >= sequence.prompt_length:
            return position, position + 1
        start = position // self.chunk * self.chunk
        return start, min(start + self.chunk, sequence.prompt_length)

    def run(self, step: Step) -> list[int | None]:
        for rows in step.rows:
            if rows.restore is not None:
                self.ends[rows.sequence.slot] = self.line_ends[rows.restore]
        tokens = super().run(step)
        for rows in step.rows:
            if rows.snapshot is not None:
                self.line_ends[rows.snapshot] = rows.start
        return tokens

    def _write(self, rows: Rows, decodes_only: bool, written: set[tuple[int, int, int]]) -> None:
        super()._write(rows, decodes_only, written)
        sequence, end = rows.sequence, rows.start + rows.count
        assert (rows.start, end) == self.piece_of(sequence, rows.start), "a piece that depends on what else runs"
        assert rows.inner_snapshot is None, "states that depend on later rows"
        assert rows.decodes == (rows.start >= sequence.prompt_length), "a row takes another path than it did once"
        for group in range(len(self.memory.groups)):
            for position in range(rows.start, end):
                self.pieces[self._place(group, sequence.slot, position)] = rows.start, end
        if self.memory.snapshots is not None:
            if rows.start:
                before = self.piece_of(sequence, rows.start - 1)[0]
                assert self.ends[sequence.slot] == before, "states after other pieces"
            self.ends[sequence.slot] = rows.start

    def _read(self, rows: Rows) -> None:
        super()._read(rows)
        sequence, end = rows.sequence, rows.start + rows.count
        for group, (_, window) in enumerate(self.memory.groups):
            for position in range(max(0, rows.start - window + 1) if window else 0, end):
                place = self._place(group, sequence.slot, position)
                assert self.pieces[place] == self.piece_of(sequence, position), "computed in another piece"


class Server:
    """The engine's loop in small, with checks of every step."""

    def __init__(self, scheduler: Scheduler, depth: int, vocabulary: int = 97) -> None:
        self.scheduler, self.depth = scheduler, depth
        self.device = (PieceDevice if scheduler.limits.whole_chunks else Device)(scheduler, vocabulary)
        self.flights: deque[tuple[Step, list[int | None]]] = deque()
        self.answers: dict[int, list[int]] = {}
        self.sequences: list[Sequence] = []
        self.prompts: dict[int, list[int]] = {}

    def add(self, sequence: Sequence) -> None:
        self.scheduler.add(sequence)
        self.sequences.append(sequence)
        self.answers[sequence.ident], self.prompts[sequence.ident] = [], list(sequence.tokens)

    def turn(self) -> bool:
        """One turn of the loop. False: there was nothing to do."""
        before = list(self.scheduler.running)
        decoding = [s for s in before if s.computed + 1 == s.length and not s.ends_at(s.length)]
        step = self.scheduler.plan()
        self._check_order(before)
        planned = set() if step is None else {id(rows.sequence) for rows in step.rows}
        assert all(id(s) in planned for s in decoding if s.slot >= 0 and s in before), (
            "the next token of an answer waits"
        )
        check(self.scheduler, self.sequences)
        if step is not None:
            limits = self.scheduler.limits
            assert sum(rows.count for rows in step.rows) <= limits.most_rows
            assert all(0 < rows.count <= limits.chunk for rows in step.rows)
            self.flights.append((step, self.device.run(step)))
        if self.flights and (step is None or len(self.flights) >= self.depth):
            self.land()
            return True
        return step is not None

    def _check_order(self, before: list[Sequence]) -> None:
        stayed = [s for s in self.scheduler.running if s in before and s.computed]
        admitted = [s for s in self.scheduler.running if s not in before]
        for sequence in self.scheduler.waiting:
            assert all(s.order < sequence.order for s in admitted), "somebody was overtaken"
            if sequence in before:
                assert all(s.order < sequence.order for s in stayed), "one who is not the last gave way"

    def land(self) -> None:
        step, tokens = self.flights.popleft()
        for rows, token in zip(step.rows, tokens, strict=True):
            if token is None:
                continue
            sequence = rows.sequence
            self.scheduler.took(rows, token)
            if sequence.done:
                continue
            answer = self.answers[sequence.ident]
            answer.append(token)
            length = sequence.prompt_length + len(answer)
            if token == END or len(answer) >= sequence.max_new_tokens or length >= sequence.max_length:
                self.scheduler.finish(sequence)

    def finish(self, turns: int = 20_000) -> None:
        for _ in range(turns):
            if not self.turn():
                break
        assert not (self.scheduler.running or self.scheduler.waiting or self.flights), "it does not come to an end"

    def check_answers(self, cancelled: set[int]) -> None:
        for sequence in self.sequences:
            prompt, answer = self.prompts[sequence.ident], self.answers[sequence.ident]
            expected = self.device.prefixes.answer(prompt, sequence.max_new_tokens, sequence.max_length)
            assert sequence.done
            if sequence.ident in cancelled:
                assert answer == expected[: len(answer)]
            else:
                assert answer == expected
            assert sequence.tokens[: len(prompt) + len(answer)] == prompt + answer
            assert sequence.in_flight == 0 and sequence.memory is None
