"""What an engine has done and has to do: counted by its loop, read from any thread."""

from dataclasses import dataclass

from moe_nvfp4.engine.scheduler import Step


@dataclass(slots=True)
class Counters:
    """Since the engine was started. One thread writes; a reader may see a step half counted."""

    requests: int = 0  # answers that were taken, each of n counted
    refused: int = 0  # by a full queue, or because they cannot fit
    answered: int = 0
    cancelled: int = 0
    failed: int = 0  # errors and passed deadlines
    prompt_tokens: int = 0
    reused_tokens: int = 0  # of prompt_tokens; both are counted when the first token of an answer has come
    generated_tokens: int = 0
    preemptions: int = 0
    decode_steps: int = 0  # steps of next tokens only
    mixed_steps: int = 0
    decode_rows: int = 0  # next tokens, of either kind of step
    prompt_rows: int = 0  # and of answers that are computed again
    busy_seconds: float = 0.0
    decode_seconds: float = 0.0  # of steps of next tokens only, and what they had to move; 0 where it is not known
    decode_bytes: float = 0.0
    last_token: float | None = None  # by time.monotonic()

    def launched(self, step: Step) -> None:
        rows = sum(part.count for part in step.rows)
        decodes = sum(part.continues for part in step.rows)
        if step.decodes_only:
            self.decode_steps += 1
        else:
            self.mixed_steps += 1
        self.decode_rows += decodes
        self.prompt_rows += rows - decodes


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """One look at an engine."""

    counters: Counters  # a copy
    running: int
    waiting: int
    slots: int
    free_slots: int
    pages: tuple[int, ...]  # of each geometry
    free_pages: tuple[int, ...]  # nobody holds them; some have content that may be asked for again
