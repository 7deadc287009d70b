"""A slot outside the scheduler's hands, for somebody who steps by himself: logits of a prompt, benchmarks."""

from typing import NamedTuple

from moe_nvfp4.engine.loop import Engine
from moe_nvfp4.engine.scheduler import QueueFull
from moe_nvfp4.engine.sequence_memory import Memory
from moe_nvfp4.errors import EngineError


class Lease(NamedTuple):
    """`room` is for functions that run in the engine's `call`."""

    engine: Engine
    slot: int
    memory: Memory

    @classmethod
    def of(cls, engine: Engine) -> "Lease":
        def take() -> Lease:
            try:
                return cls(engine, *engine.scheduler.lend())
            except QueueFull as error:
                raise EngineError(f"{error}; try again later, or raise max_batch_size") from None

        return engine.call(take)

    def room(self, first_row: int, length: int) -> None:
        """Pages for the rows from `first_row` on, up to `length` tokens."""
        if not self.engine.scheduler.memory.grow(self.memory, first_row, length):
            raise EngineError(f"{length:,} tokens need more pages than are free; try again when fewer requests run")
        self.engine.stepper.cache.set_pages(
            [(change.group, self.slot, change.index, change.page) for change in self.memory.take_changes()]
        )

    def give_back(self) -> None:
        self.engine.call(lambda: self.engine.scheduler.give_back(self.slot, self.memory))
