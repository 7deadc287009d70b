"""Requests that a simulation of the scheduler serves: who comes when, with which prompt, and when he leaves.

Prompts are pieces of one long random text, so making them costs a copy. Three traces: `bursty` alternates calm and rush
hours, and half of its prompts share one of a few beginnings; `long-tailed` has Pareto lengths; `adversarial` has huge
prompts among tiny ones, identical prompts in crowds, priorities, deadlines and cancellations, over few pages.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from moe_nvfp4.engine.cost import USUAL
from moe_nvfp4.engine.scheduler import REST, Limits
from moe_nvfp4.engine.sequence_memory import PageGroup, SequenceMemory

PAGE = 64
TEXT = 1_000_003
LOAD = 0.7  # of what steps full of rows could serve
ROW_SECONDS = 1 / 69_000, 16.6e-3 / 256  # of a prompt's token and of an answer's, in full steps


@dataclass(frozen=True, slots=True)
class Request:
    ident: int
    arrival: float
    prompt: list[int]
    new_tokens: int
    max_new_tokens: int  # the answer may end before
    priority: int = 0
    deadline: float | None = None
    cancelled: float | None = None  # when its client goes away


@dataclass(frozen=True, slots=True)
class Scene:
    """A trace and the engine that serves it."""

    name: str
    requests: Iterator[Request]
    memory: SequenceMemory
    limits: Limits


@dataclass(slots=True)
class _Shapes:
    """Prompts and answers of one trace, from one seed."""

    name: str
    random: random.Random
    text: list[int] = field(default_factory=list)
    beginnings: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.text = self.random.choices(range(150_000), k=TEXT)
        self.beginnings = [self.piece(self.random.randrange(512, 4096)) for _ in range(8)]

    def piece(self, length: int) -> list[int]:
        start = self.random.randrange(TEXT - length)
        return self.text[start : start + length]

    def lengths(self) -> tuple[int, int]:
        """Tokens of a prompt and of its answer."""
        draw = self.random
        if self.name == "long-tailed":
            return min(32_000, int(64 * draw.paretovariate(0.9))), min(2048, int(16 * draw.paretovariate(0.9)))
        if self.name == "adversarial":
            if (kind := draw.random()) < 0.02:
                return draw.randrange(16_000, 32_000), 1
            return (draw.randrange(1, 64), draw.randrange(200, 1000)) if kind < 0.3 else (draw.randrange(1, 512), 32)
        return min(8192, int(draw.lognormvariate(5.5, 1.0)) + 1), min(1024, int(draw.lognormvariate(4.3, 0.8)) + 1)

    def prompt(self, length: int) -> list[int]:
        if self.name == "bursty" and self.random.random() < 0.5:
            return self.random.choice(self.beginnings) + self.piece(length)
        if self.name == "adversarial" and self.random.random() < 0.2:
            return list(self.beginnings[0])
        return self.piece(length)


def scene(name: str, count: int, seed: int = 0) -> Scene:
    few = name == "adversarial"
    # Qwen3.6's kind, one geometry and states, with room for a million tokens; or Gemma 4's, a window, and little room.
    groups = [PageGroup(640), PageGroup(400, 1024)] if few else [PageGroup(16_384)]
    memory = SequenceMemory(groups, PAGE, None if few else 64)
    chunk = 1024 if few else 2048
    limits = Limits(slots=256, step_rows=2048, chunk=chunk, max_waiting=2048, cost=USUAL, rest=REST)
    return Scene(name, _requests(name, count, seed), memory, limits)


def _requests(name: str, count: int, seed: int) -> Iterator[Request]:
    shapes, draw = _Shapes(name, random.Random(f"{name} {seed}")), random.Random(seed)
    sample = [shapes.lengths() for _ in range(5000)]
    seconds = sum(p * ROW_SECONDS[0] + n * ROW_SECONDS[1] for p, n in sample) / len(sample)
    now, crowd = 0.0, 0
    for ident in range(count):
        rate = LOAD / seconds
        if name == "bursty":
            rate *= 2.0 if int(now / 10) % 4 == 0 else 0.5  # ten seconds of rush in forty
        if name == "adversarial":
            crowd = crowd - 1 if crowd else (50 if draw.random() < 0.02 else 0)
        now += 0.0 if crowd else draw.expovariate(rate / 3 if name == "adversarial" else rate)
        length, new = shapes.lengths()
        prompt = shapes.prompt(length)
        priority, deadline, cancelled = 0, None, None
        if name == "adversarial":
            priority = draw.choice((0, 0, 0, 1))
            deadline = now + draw.expovariate(0.2) if draw.random() < 0.05 else None
            cancelled = now + draw.expovariate(1.0) if draw.random() < 0.05 else None
        yield Request(ident, now, prompt, new, new + draw.choice((0, 0, 100)), priority, deadline, cancelled)
