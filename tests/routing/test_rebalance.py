"""rebalance against exact solutions, the lower bound and a plain greedy; plans of moves against ranks that serve."""

from collections.abc import Sequence
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moe_nvfp4.launch.bench_balance import plain_greedy, zipf_loads
from moe_nvfp4.routing.placement import Placement, Slots
from moe_nvfp4.routing.rebalance import TOLERANCE, WORTH, lower_bound, rank_loads, rebalance
from moe_nvfp4.routing.rebalance_moves import plan_moves


def reads(old: Slots, new: Slots) -> int:
    return sum(len(set(held) - set(had)) for held, had in zip(new, old, strict=True))


def exact_peak(loads: Sequence[float], room: Sequence[int], speeds: Sequence[float]) -> float:
    """Every set of experts on every rank."""
    experts = range(len(loads))
    sets = [[held for count in range(slots + 1) for held in combinations(experts, count)] for slots in room]
    best = float("inf")
    for slots in product(*sets):
        if len({expert for held in slots for expert in held}) == len(loads):
            best = min(best, max(rank_loads(loads, slots, speeds)))
    return best


@st.composite
def cases(draw: st.DrawFn) -> tuple[NDArray[np.float64], Placement, list[int], list[float]]:
    """Loads, a placement with replicas, room that may be more or less than it takes, speeds."""
    experts, ranks = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    loads = np.array(draw(st.lists(st.integers(0, 1000), min_size=experts, max_size=experts)), dtype=np.float64)
    homes = draw(st.lists(st.sets(st.integers(0, ranks - 1), min_size=1), min_size=experts, max_size=experts))
    held: list[list[int]] = [[] for _ in range(ranks)]
    for expert in draw(st.permutations(range(experts))):
        for rank in homes[expert]:
            held[rank].append(expert)
    room = draw(st.lists(st.integers(0, experts), min_size=ranks, max_size=ranks))
    if sum(room) < experts or draw(st.booleans()):
        room = [len(one) for one in held]
    speeds = draw(st.lists(st.sampled_from((1.0, 1.5, 3.0)), min_size=ranks, max_size=ranks))
    return loads, Placement(experts, {7: tuple(map(tuple, held))}), room, speeds


@given(cases(), st.none() | st.integers(0, 4))
def test_what_always_holds(
    case: tuple[NDArray[np.float64], Placement, list[int], list[float]], max_moves: int | None
) -> None:
    loads, present, room, speeds = case
    old = present.slots[7]
    found = rebalance({7: loads}, present, slots_per_rank=room, speeds=speeds, max_moves=max_moves)
    assert found == rebalance({7: loads}, present, slots_per_rank=room, speeds=speeds, max_moves=max_moves)
    new = found.slots[7]
    assert all(len(held) <= slots for held, slots in zip(new, room, strict=True))
    peak, bound = max(rank_loads(loads, new, speeds)), lower_bound(loads, room, speeds)
    assert peak >= bound * (1 - 1e-9)
    if all(len(held) <= slots for held, slots in zip(old, room, strict=True)):
        before = max(rank_loads(loads, old, speeds))
        assert peak <= max(bound * (1 + TOLERANCE), before * (1 + WORTH)) * (1 + 1e-9)
        assert max_moves is None or reads(old, new) <= max_moves
    for held, had in zip(new, old, strict=True):
        for slot, expert in enumerate(had):
            assert expert not in held or slot >= len(held) or held[slot] == expert, "what stays keeps its slot"


def test_against_exact_solutions() -> None:
    """Tiny cases, where one expert is a large part of a rank, are the hard ones."""
    random = np.random.default_rng(1)
    gaps = []
    for number in range(60):
        ranks = int(random.integers(2, 4))
        experts = int(random.integers(ranks, 6))
        room = [-(-experts // ranks) + int(random.integers(0, 2)) for _ in range(ranks)]
        loads = np.round(1 + 100 * random.random(experts) ** 2)
        speeds = random.choice([1.0, 1.5, 2.0], ranks).tolist() if number % 2 else [1.0] * ranks
        found = rebalance({0: loads}, Placement.even([0], experts, ranks), slots_per_rank=room, speeds=speeds)
        peak, exact = max(rank_loads(loads, found.slots[0], speeds)), exact_peak(loads.tolist(), room, speeds)
        assert lower_bound(loads, room, speeds) <= exact * (1 + 1e-9) <= peak * (1 + 2e-9)
        gaps.append(peak / exact)
    assert max(gaps) < 1.2 and np.mean(gaps) < 1.02, (max(gaps), np.mean(gaps))


@pytest.mark.parametrize(
    ("experts", "ranks", "spare"), [(128, 8, 0), (128, 8, 2), (256, 4, 1), (128, 64, 1), (512, 64, 2)]
)
@pytest.mark.parametrize("exponent", [0.0, 0.4, 0.8, 1.2])
def test_the_bound_is_reached(experts: int, ranks: int, spare: int, exponent: float) -> None:
    (loads,) = zipf_loads(1, experts, exponent, seed=3)
    present = Placement.even([0], experts, ranks)
    room = [experts // ranks + spare] * ranks
    new = rebalance({0: loads}, present, slots_per_rank=room).slots[0]
    peak = max(rank_loads(loads, new))
    hard = experts == 128 and ranks == 64 and exponent > 1  # the largest expert needs a quarter of all spare slots
    assert peak <= lower_bound(loads, room) * (1.08 if hard else 1.03)
    assert peak <= max(rank_loads(loads, plain_greedy(loads, room[0], ranks))) * (1 + TOLERANCE)
    if peak < max(rank_loads(loads, present.slots[0])) * 0.98:
        fewer = rebalance({0: loads}, present, slots_per_rank=room, max_moves=8).slots[0]
        assert reads(present.slots[0], fewer) <= 8
        assert max(rank_loads(loads, fewer)) < max(rank_loads(loads, present.slots[0]))


def test_a_balanced_placement_stays() -> None:
    present = Placement(6, {0: ((0, 5, 2), (1, 4, 3)), 3: ((2, 1, 0), (3, 4, 5))})
    loads = {0: [60, 50, 40, 48, 50, 50], 3: [0] * 6}
    assert rebalance(loads, present) == present


def test_few_experts_move_when_few_must() -> None:
    """64 ranks of 8 experts, all alike but for a rank with twice the load and one with none: four trades are enough."""
    loads = np.full(512, 100.0)
    loads[:8] = 200.0
    loads[8:16] = 0.0
    present = Placement.even([0], 512, 64)
    new = rebalance({0: loads}, present, slots_per_rank=[9] * 64)
    assert max(rank_loads(loads, new.slots[0])) <= 100 * 8 * (1 + TOLERANCE)
    assert reads(present.slots[0], new.slots[0]) <= 10


def test_a_fast_rank_gets_more() -> None:
    loads = np.full(60, 10.0)
    new = rebalance({0: loads}, Placement.even([0], 60, 3), slots_per_rank=[40, 40, 40], speeds=[1, 1, 2])
    assert rank_loads(loads, new.slots[0], [1, 1, 2]) == pytest.approx([150] * 3, rel=2 * TOLERANCE)


def test_a_rank_that_is_gone_keeps_nothing() -> None:
    (loads,) = zipf_loads(1, 32, 0.8, seed=5)
    present = Placement.even([0], 32, 4)
    new = rebalance({0: loads}, present, slots_per_rank=[12, 0, 12, 12], max_moves=0).slots[0]
    assert new[1] == () and reads(present.slots[0], new) == 8, "what lost its place is read, nothing else"
    free = rebalance({0: loads}, present, slots_per_rank=[12, 0, 12, 12]).slots[0]
    assert max(rank_loads(loads, free)) <= lower_bound(loads, [12, 0, 12, 12]) * (1 + 2 * TOLERANCE)


def test_experts_that_stay_everywhere() -> None:
    """A shared expert, which every row takes, is a routed one more."""
    loads = np.append(zipf_loads(1, 16, 1.0, seed=2)[0], 1e6)
    present = Placement.even([0], 17, 4, everywhere=[16])
    new = rebalance({0: loads}, present, everywhere=[16], slots_per_rank=[7] * 4).slots[0]
    assert all(16 in held for held in new)
    assert max(rank_loads(loads, new)) <= loads.sum() / 4 * (1 + TOLERANCE)


@pytest.mark.parametrize(
    ("loads", "options", "message"),
    [
        ({}, {}, "no loads of layer 0"),
        ({0: [1, 2, 3]}, {}, r"shape \(3,\); expected \(4,\)"),
        ({0: [1, 2, 3, -1]}, {}, "layer 0 are negative"),
        ({0: [1, 2, 3, float("nan")]}, {}, "negative or infinite"),
        ({0: [1] * 4}, {"slots_per_rank": [4]}, "0 or more for each of 2 ranks"),
        ({0: [1] * 4}, {"slots_per_rank": [3, 0]}, "3 slots for 4 experts"),
        ({0: [1] * 4}, {"slots_per_rank": [1, 9], "everywhere": [0, 1]}, "2 experts are to be everywhere"),
        ({0: [1] * 4}, {"speeds": [1, 0]}, "a positive number for each of 2 ranks"),
        ({0: [1] * 4}, {"max_moves": -1}, "max_moves is -1"),
        ({0: [1] * 4}, {"tolerance": -0.1}, "tolerance is -0.1"),
    ],
)
def test_what_is_refused(loads: dict[int, list[float]], options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rebalance(loads, Placement.even([0], 4, 2), **options)  # type: ignore[arg-type]


@st.composite
def two_placements(draw: st.DrawFn) -> tuple[Placement, Placement]:
    experts, ranks = draw(st.integers(1, 7)), draw(st.integers(1, 4))

    def one() -> Placement:
        layers = {}
        for layer in (2, 5):
            held = [list(draw(st.permutations(range(experts))))[: draw(st.integers(0, experts))] for _ in range(ranks)]
            held[0] += [e for e in range(experts) if e not in held[0]]
            layers[layer] = tuple(map(tuple, held))
        return Placement(experts, layers)

    return one(), one()


@settings(max_examples=150)
@given(two_placements())
def test_slots_are_reused_safely(placements: tuple[Placement, Placement]) -> None:
    """The memory of ranks, change by change: what is served is there at every moment, at the end all that is new."""
    old, new = placements
    memory = {
        (layer, rank): dict(enumerate(old.local(layer, rank))) for layer in old.slots for rank in range(old.num_ranks)
    }
    for plan in plan_moves(old, new):
        for read in plan.reads:
            if read.slot_is_free:
                assert read.slot >= len(old.local(plan.layer, read.rank))
                memory[plan.layer, read.rank][read.slot] = read.expert
        for rank in range(old.num_ranks):
            served = old.local(plan.layer, rank)
            assert [memory[plan.layer, rank][slot] for slot in range(len(served))] == list(served)
        for copy in plan.copies:
            slots = memory[plan.layer, copy.rank]
            slots[copy.target] = slots[copy.source]
        for read in plan.reads:
            memory[plan.layer, read.rank][read.slot] = read.expert
        waiting = [read.rank for read in plan.reads if not read.slot_is_free]
        assert plan.waiting == max((waiting.count(rank) for rank in range(old.num_ranks)), default=0)
    for (layer, rank), slots in memory.items():
        held = new.local(layer, rank)
        assert [slots[slot] for slot in range(len(held))] == list(held)


def test_copies_in_a_circle_cost_one_read() -> None:
    old, new = (Placement(3, {0: (held,)}) for held in ((0, 1, 2), (2, 0, 1)))
    (plan,) = plan_moves(old, new)
    assert len(plan.copies) == 2 and len(plan.reads) == 1


def test_the_layer_that_gains_most_comes_first() -> None:
    old = Placement(4, dict.fromkeys((0, 1, 2), ((0, 1), (2, 3))))
    new = Placement(4, {0: ((0, 2), (1, 3)), 1: ((0, 3), (2, 1)), 2: ((0, 1), (2, 3))})
    assert [plan.layer for plan in plan_moves(old, new, gains={0: 1.0, 1: 2.0, 2: 9.0})] == [1, 0]
    with pytest.raises(ValueError, match="same layers, experts and ranks"):
        plan_moves(old, Placement.even([0], 4, 2))
