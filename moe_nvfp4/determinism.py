"""The same request gives the same tokens and log-probabilities whatever else runs: how a runner sees to it.

Two things have to hold. A token is computed in the same piece of its sequence, after the same pieces: the scheduler's
part, see engine/chunks.py. And the bits of a row depend on its own sequence alone, not on the rows beside it, nor on
their number: of kernels that are asked for it (`batch_invariant`), or, where torch computes, because each sequence of a
step is computed by itself. Random numbers are each request's own in any case.
"""

from enum import Enum
from typing import Final

import torch

from moe_nvfp4.errors import RequestError

# Tokens of a prompt's pieces. Fixed, since prompts cut otherwise give other bits. As many as a step always has time for
# beside answers (engine/cost.py), and no more than torch computes at a time anywhere (preparation.STEP_ROWS).
CHUNK: Final = 512


class Determinism(Enum):
    OFF = 0
    KERNELS = 1  # kernels whose rows do not depend on each other
    APART = 2  # sequences one after the other

    def alike(self, logits: torch.Tensor) -> torch.Tensor:
        """What tokens are chosen from: float32, as it is for all rows of a step in which some row's logits are changed.
        Sums over logits have an order for each dtype, so none may depend on what others ask for."""
        return logits if self is Determinism.OFF else logits.float()


def determinism_of(wanted: bool, fast: bool, ranks: int) -> Determinism:
    """`fast`: kernels serve, and not torch."""
    if not wanted:
        return Determinism.OFF
    if ranks > 1:
        raise RequestError(
            f"deterministic: got a group of {ranks} ranks; expected one: the order in which ranks' shares are added up "
            "depends on the rows of a step. Use replicas of one GPU each, or leave it out."
        )
    return Determinism.KERNELS if fast else Determinism.APART
