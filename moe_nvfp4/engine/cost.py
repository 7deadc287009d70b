"""How long a step takes, in closed form, so that prompts do not hold up answers more than they may.

No clock: ranks that plan the same steps must come to the same numbers. Only ratios matter to the scheduler, so figures
of one machine and model serve for others of their kind.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCost:
    """Milliseconds."""

    fixed: float
    experts: float  # to read the weights of all experts
    left_out: float  # share of the experts that a row does not choose
    decode_row: float
    prompt_row: float
    decode_context: float  # a token that a decode row sees
    prompt_context: float  # a token that a prompt's row sees
    least_prompt_rows: int  # beside answers, whatever they wait for it: with fewer prompts would hardly get on

    def decodes(self, rows: int, context: int) -> float:
        """A step of next tokens, whose sequences have `context` tokens in all."""
        touched = 1 - self.left_out**rows
        return self.fixed + self.experts * touched + self.decode_row * rows + self.decode_context * context

    def prompt(self, start: int, rows: int) -> float:
        """What rows of a prompt add that follow `start` tokens, once all experts are read."""
        return rows * (self.prompt_row + self.prompt_context * (start + rows / 2))

    def untouched(self, rows: int) -> float:
        """To read the experts that so many rows do not choose."""
        return self.experts * self.left_out**rows

    def rows_within(self, milliseconds: float, start: int) -> int:
        """The most rows for which `prompt` takes no longer."""
        if milliseconds <= 0:
            return 0
        linear, square = self.prompt_row + self.prompt_context * start, self.prompt_context / 2
        return int(2 * milliseconds / (linear + math.sqrt(linear * linear + 4 * square * milliseconds)))


@dataclass(slots=True)
class PromptBudget:
    """What a step has left for prompts. A step is filled up to one of `sizes` and takes as long as if all of its rows
    counted: so prompts get as many rows as fill one, where that is possible."""

    rows: int
    cost: StepCost | None
    sizes: Sequence[int] = ()
    taken: int = 0  # rows of the step that are given away already
    milliseconds: float = math.inf
    untouched: bool = True

    def beside(self, answers: int, context: int, stretch: float) -> "PromptBudget":
        """So that a step of these answers, with `context` tokens in all, takes at most `stretch` times as long."""
        if self.cost is not None and answers:
            alone = self.cost.decodes(answers, context)
            spare = (stretch - 1) * alone - self.cost.untouched(answers)
            self.milliseconds = max(spare, self.cost.prompt(0, self.cost.least_prompt_rows))
        return self

    def most(self, start: int) -> int:
        """Rows of a prompt that may follow `start` tokens of it."""
        rows = self._within(start)
        full = max((size for size in self.sizes if size <= self.taken + rows), default=0) - self.taken
        if full > 0:
            return full
        return 0 if self.taken in self.sizes and not self.untouched else rows

    def takes(self, start: int, rows: int) -> bool:
        """Whether there is room for so many rows that must not be parted. The first ones may take longer than there is
        time, since they would never come else."""
        return rows <= self.rows and (self.untouched or rows <= self._within(start))

    def spend(self, start: int, rows: int) -> None:
        self.untouched = False
        self.rows -= rows
        self.taken += rows
        if self.cost is not None:
            self.milliseconds -= self.cost.prompt(start, rows)

    def _within(self, start: int) -> int:
        if self.cost is None or self.milliseconds == math.inf:
            return self.rows
        return min(self.rows, self.cost.rows_within(self.milliseconds, start))


# Fitted to steps of 8 to 256 sequences and to prompts of 2048 tokens in steps of 4096, Qwen3.6-35B-A3B on one H200
# (benchmarks/results); 5 % off at 32 sequences and more, a third too long for one. What a token of context costs is
# from its bytes at 4.8 TB/s and its operations at 300 TFLOP/s.
USUAL = StepCost(
    fixed=1.88,
    experts=4.9,
    left_out=1 - 8 / 256,
    decode_row=0.0539,
    prompt_row=0.0122,
    decode_context=4.3e-6,
    prompt_context=5.5e-7,
    least_prompt_rows=512,
)
