"""Slots, pages and rings: every place that a sequence still needs is its own."""

import pytest
import torch

from moe_nvfp4.cache import PAGE, AttentionSpec, CacheSettings, CacheSpec, DeltaSpec, SequenceCache
from moe_nvfp4.kernels.rows import CHUNK

SPEC = CacheSpec(
    (AttentionSpec((1, 3), kv_heads=2, head_dim=16), AttentionSpec((0, 2), kv_heads=1, head_dim=32, window=100)),
    DeltaSpec((4, 5), channels=48, kernel=4, value_heads=4, key_dim=8, value_dim=8),
)


def settings(**changes: object) -> CacheSettings:
    values = {"slots": 3, "max_seq_len": 1000, "chunk": 50, "dtype": torch.float32, **changes}
    return CacheSettings(**values)


@pytest.fixture
def cache() -> SequenceCache:
    return SequenceCache(SPEC, settings(), torch.device("cpu"))


def places(cache: SequenceCache, layer: int, slot: int, positions: range) -> list[tuple[int, int]]:
    table = cache.kv[layer].table[slot].tolist()
    return [(table[position // PAGE], position % PAGE) for position in positions]


def test_slots_share_no_place(cache: SequenceCache) -> None:
    for layer in cache.kv:
        taken = [set(places(cache, layer, slot, range(1000))) for slot in range(4)]
        assert sum(map(len, taken)) == len(set.union(*taken))
        assert max(page for page, _ in set.union(*taken)) < cache.kv[layer].keys.shape[0]


@pytest.mark.parametrize("start", [0, 1, 63, 64, 65, 500, 949])
def test_a_ring_keeps_the_window_of_every_row_of_a_step(cache: SequenceCache, start: int) -> None:
    """From the oldest place that the step's first row sees to its last row, no place is used twice."""
    needed = places(cache, 0, 1, range(max(0, start - 99), start + 50))
    assert len(set(needed)) == len(needed)


def test_without_a_window_every_token_is_kept(cache: SequenceCache) -> None:
    assert len(set(places(cache, 1, 0, range(1000)))) == 1000


def test_a_ring_is_not_longer_than_the_sequence() -> None:
    short = settings(max_seq_len=PAGE)
    assert [spec.pages(short) for spec in SPEC.attention] == [1, 1]


@pytest.mark.parametrize("changes", [{}, {"fp8": True}, {"dtype": torch.bfloat16, "slots": 7, "max_seq_len": 65}])
def test_the_plan_is_exact(changes: dict) -> None:
    chosen = settings(**changes)
    pages = [chosen.slots * spec.pages(chosen) + 1 for spec in SPEC.attention]  # one spare
    planned = SPEC.page_bytes(chosen, pages) + (chosen.slots + 1) * SPEC.state_bytes(chosen)
    assert SequenceCache(SPEC, chosen, torch.device("cpu")).nbytes == planned


def test_scales_go_by_layer() -> None:
    cache = SequenceCache(SPEC, settings(fp8=True, scales={3: (0.5, 0.25)}), torch.device("cpu"))
    assert [(kv.k_scale, kv.v_scale) for _, kv in sorted(cache.kv.items())] == [(1, 1), (1, 1), (1, 1), (0.5, 0.25)]
    assert all(kv.is_fp8 for kv in cache.kv.values())


def test_shared_pages_belong_to_whom_the_tables_say() -> None:
    cache = SequenceCache(SPEC, settings(), torch.device("cpu"), shared_pages=[7, 5], snapshots=2)
    assert [table.unique().tolist() for table in cache.tables] == [[7], [5]]  # the spare page of each group
    cache.set_pages([(0, 1, 0, 3), (0, 2, 15, 4), (1, 0, 1, 2), (0, 1, 1, 6)])
    assert cache.tables[0][1, :2].tolist() == [3, 6]
    assert cache.tables[0][2, 15] == 4
    assert cache.tables[1][0, :3].tolist() == [5, 2, 5]
    assert cache.kv[3].table is cache.tables[0]
    assert cache.kv[0].keys.shape[0] == 6
    assert cache.first_snapshot == 4


def test_delta_nets_come_by_the_ends_of_pages() -> None:
    """Else a step could not keep the states there: see engine/chunks.py."""
    assert PAGE == CHUNK


def test_states_are_copied_whole() -> None:
    cache = SequenceCache(SPEC, settings(), torch.device("cpu"), shared_pages=[7, 5], snapshots=2)
    for state in cache.states.values():
        for part in state:
            part.copy_(torch.randint(1000, part.shape))
    cache.copy_states(1, cache.first_snapshot + 1)
    for state in cache.states.values():
        for part in state:
            assert torch.equal(part[1], part[-1])
            assert not torch.equal(part[0], part[-1])
