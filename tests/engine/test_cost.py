"""The cost of steps: what it says of measured steps, and that budgets hold."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_nvfp4.engine.cost import USUAL, PromptBudget


def test_it_fits_what_was_measured() -> None:
    steps = {8: 3.00, 16: 4.30, 32: 6.50, 64: 9.58, 128: 13.59, 256: 20.58}
    for rows, measured in steps.items():
        assert USUAL.decodes(rows, 128 * rows) == pytest.approx(measured, rel=0.15 if rows < 32 else 0.06)
    prefill = USUAL.decodes(0, 0) + USUAL.untouched(0) + 2 * USUAL.prompt(0, 2048)
    assert 4096 / prefill == pytest.approx(69.2, rel=0.01)


@given(st.floats(0.0, 200.0), st.integers(0, 100_000))
def test_rows_within_a_time(milliseconds: float, start: int) -> None:
    rows = USUAL.rows_within(milliseconds, start)
    assert USUAL.prompt(start, rows) <= milliseconds * (1 + 1e-9)
    assert USUAL.prompt(start, rows + 2) > milliseconds


def test_the_budget_beside_answers() -> None:
    alone = USUAL.decodes(64, 64_000)
    budget = PromptBudget(4096, USUAL).beside(64, 64_000, 5.0)
    rows = budget.most(1000)
    assert alone + USUAL.untouched(64) + USUAL.prompt(1000, rows) == pytest.approx(5 * alone, rel=0.01)
    budget.spend(1000, rows)
    assert budget.most(0) <= 1 and budget.rows == 4096 - rows
    assert PromptBudget(4096, USUAL).beside(2000, 100, 1.0).most(0) == USUAL.least_prompt_rows
    assert PromptBudget(4096, USUAL).beside(0, 0, 1.0).most(0) == 4096, "nobody waits"
    assert PromptBudget(4096, None).beside(64, 0, 1.0).most(0) == 4096


def test_steps_are_as_large_as_what_they_are_filled_up_to() -> None:
    def budget() -> PromptBudget:
        return PromptBudget(4096 - 256, USUAL, sizes, 256).beside(256, 100_000, 2.25)

    sizes = (256, 512, 1024, 2048, 2560, 4096)
    free = PromptBudget(4096 - 256, USUAL).beside(256, 100_000, 2.25).most(0)
    assert 2048 < 256 + free < 2560
    one = budget()
    assert one.most(0) == 2048 - 256
    one.spend(0, 600)
    assert one.most(0) == 2048 - 856 and one.most(50_000) < 2048 - 856
    one.spend(0, 2048 - 856)
    assert one.most(0) == 0
    sizes = (4096,)
    assert budget().most(0) == free, "what fills none is better than nothing"
    assert budget().takes(0, free) and not PromptBudget(100, USUAL, (64,), 10).takes(0, 101)
