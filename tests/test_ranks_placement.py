"""Any placement gives the same tokens: uneven, with replicas, with a rank that has no expert, and replaced while
requests are served. What cannot be is refused, with one clear error at every rank."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from model_checks import tiny_model
from ranks import RankPool, answers_of, answers_while_experts_move, one_thread, plan_of, prepare, refusal

from moe_nvfp4.checkpoint import Checkpoint
from moe_nvfp4.errors import RequestError
from moe_nvfp4.parallel import AttentionMode, Ranks
from moe_nvfp4.routing.placement import Placement, Slots
from moe_nvfp4.sampling import SamplingParams

NAMES = {"qwen3.6": "nvidia/Qwen3.6-35B-A3B-NVFP4", "gemma": "RedHatAI/gemma-4-26B-A4B-it-NVFP4"}
LAYERS = {"qwen3.6": 4, "gemma": 6}
PARAMS = SamplingParams(max_new_tokens=10, ignore_eos=True)
PROMPTS = [[(5 * i + j * j) % 500 for j in range(length)] for i, length in enumerate((20, 3, 9, 14))]

# Of eight experts, and in Qwen3.6 a shared one that is loaded as the ninth.
UNEVEN: Slots = ((0, 1, 2, 3, 4, 5, 8), (7, 6))
REPLICAS: Slots = ((3, 0, 1, 2, 8, 6), (4, 5, 6, 8, 7, 3, 0))
ALL_ON_ONE: Slots = ((), (8, 7, 6, 5, 4, 3, 2, 1, 0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("placement")
    return {key: tiny_model(name, root / key) for key, name in NAMES.items()}


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> dict[str, list]:
    return one_thread(lambda: {key: answers_of(folder, None, PROMPTS, PARAMS)[0] for key, folder in folders.items()})


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    pool = RankPool(2, tmp_path_factory.mktemp("pool"))
    yield pool
    pool.close()


def placement(model: str, *slots: Slots) -> Placement:
    """Layers take the slots in turn; Gemma has no ninth expert."""
    count = 9 if model == "qwen3.6" else 8
    kept = [tuple(tuple(e for e in held if e < count) for held in one) for one in slots]
    return Placement(count, {layer: kept[layer % len(kept)] for layer in range(LAYERS[model])})


@pytest.mark.parametrize("attention", ["replicated", "tensor", "data"])
@pytest.mark.parametrize("model", NAMES)
def test_any_placement(pool: RankPool, folders: dict, alone: dict, model: str, attention: str) -> None:
    given = placement(model, UNEVEN, REPLICAS, ALL_ON_ONE)
    for theirs, _, _ in pool.run(answers_of, folders[model], attention, PROMPTS, PARAMS, placement=given):
        assert theirs == alone[model]


@pytest.mark.parametrize("attention", ["replicated", "data"])
@pytest.mark.parametrize("model", NAMES)
def test_experts_move_while_requests_are_served(
    pool: RankPool, folders: dict, alone: dict, model: str, attention: str
) -> None:
    start = placement(model, REPLICAS, ((0, 1, 2, 3, 8, 7), (4, 5, 6, 7, 8, 0, 1)))
    placements = [
        placement(model, ((0, 1, 2, 3, 8, 7), (4, 5, 6, 8, 7)), REPLICAS),
        placement(model, ((7, 6, 5, 8), (0, 1, 2, 3, 4, 8, 7))),
        start,
    ]
    results = pool.run(
        answers_while_experts_move, folders[model], attention, placements, PROMPTS, PARAMS, placement=start
    )
    rows = sum(map(len, PROMPTS)) + len(PROMPTS) * (PARAMS.max_new_tokens - 1)
    for tokens, counts in results:
        assert tokens == alone[model]
        assert counts == results[0][1], "ranks count the same"
        assert len(counts) == 4 and all(set(one) == set(range(LAYERS[model])) for one in counts)
        for layer in range(LAYERS[model]):
            assert sum(sum(one[layer]) for one in counts) == rows * (3 if model == "qwen3.6" else 2)
            if model == "qwen3.6":
                assert sum(one[layer][8] for one in counts) == rows, "every row takes the shared expert"


def test_spare_experts_are_replicas(pool: RankPool, folders: dict, alone: dict) -> None:
    for theirs, _, _ in pool.run(answers_of, folders["gemma"], "replicated", PROMPTS, PARAMS, spare_experts=2):
        assert theirs == alone["gemma"]


def test_a_rank_plans_its_own_experts(pool: RankPool, folders: dict) -> None:
    plans = pool.run(plan_of, folders["gemma"], "replicated", [10**9] * 2)
    with Checkpoint.open(folders["gemma"]) as checkpoint:
        in_all = sum(info.nbytes for name, info in checkpoint.tensors.items() if ".experts." in name)
    assert 0.4 < plans[0].experts / in_all < 0.51
    tensor = pool.run(plan_of, folders["gemma"], "tensor", [10**9] * 2)
    assert tensor[1].dense < plans[1].dense == tensor[1].whole_dense
    assert tensor[1].cache < plans[1].cache


@pytest.mark.parametrize("attention", ["replicated", "tensor", "data"])
def test_all_ranks_plan_with_as_many_pages(pool: RankPool, folders: dict, attention: str) -> None:
    many, _ = pool.run(plan_of, folders["gemma"], attention, [10**9, 10**9])
    few, same = pool.run(plan_of, folders["gemma"], attention, [10**9, many.total])
    assert few.pages == same.pages and 0 < sum(few.pages) < sum(many.pages)
    first, second = pool.run(plan_of, folders["gemma"], attention, [10**9, few.experts])
    assert first == "another rank has no room for one sequence of 256 tokens; its own message says more"
    assert "cpu: " in second and "there is no room for one sequence of 256 tokens" in second


def test_what_is_refused(pool: RankPool, folders: dict) -> None:
    def refused(attention: str, **settings: object) -> str:
        first, second = pool.run(refusal, folders["qwen3.6"], attention, **settings)
        assert first == second
        return first

    assert "attention: got 'split'; expected one of auto, replicated, tensor, data" in refused("split")
    assert "spare_experts: got -1" in refused("data", spare_experts=-1)
    four = Placement.even(range(4), 9, 4)
    assert "over 4 ranks; this checkpoint and group need 9 experts" in refused("replicated", placement=four)
    assert "8 experts in 4 layers" in refused("replicated", placement=Placement.even(range(4), 8, 2))
    assert "buckets: got [8]; expected batch sizes up to max_batch_size, 4" in refused("data", buckets=[8])


@pytest.mark.parametrize(
    ("size", "attention", "message"),
    [
        (3, "tensor", "4 attention heads cannot be shared out evenly over 3 ranks; use a divisor of 4"),
        (9, "data", "9 ranks for 8 experts; expected a rank for each at most"),
    ],
)
def test_ranks_that_do_not_fit_the_model(folders: dict, size: int, attention: AttentionMode, message: str) -> None:
    """Before anything is loaded, so one rank alone can tell."""
    with pytest.raises(RequestError, match=message):
        prepare(folders["qwen3.6"], Ranks(0, size, attention, torch.device("cpu"), None, None))


@pytest.mark.parametrize(
    ("key", "size", "mode"), [("qwen3.6", 2, "tensor"), ("gemma", 4, "tensor"), ("qwen3.6", 3, "replicated")]
)
def test_heads_are_shared_out_where_they_can_be(folders: dict, size: int, key: str, mode: str) -> None:
    for rank in range(size):
        ranks = Ranks(rank, size, "auto", torch.device("cpu"), None, None)
        with closing(prepare(folders[key], ranks)) as prepared:
            assert prepared.ranks == ranks.with_attention(mode)
            with closing(prepare(folders[key], prepared.ranks)) as said:
                assert said.plan.dense == prepared.plan.dense and said.config == prepared.config
