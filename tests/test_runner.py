"""`MoERunner`: prompts, sampling, streams, limits. The model is tiny and random; its greedy answers are stable."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moe_nvfp4
from moe_nvfp4 import MoERunner, SamplingParams
from moe_nvfp4.engine.invariants import check
from moe_nvfp4.errors import CheckpointError, MemoryPlanError, RequestError
from moe_nvfp4.generation import Generation
from moe_nvfp4.synthesize import synthesize

NAME = "nvidia/Qwen3-30B-A3B-NVFP4"
DEMO = Path(moe_nvfp4.__file__).parent / "demo"
PROMPTS = [[1, 2, 3], [40, 41, 42, 43, 44], [7], [9, 8]]
TEN = SamplingParams(max_new_tokens=10, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runner") / "model"
    synthesize(NAME, out, tiny=True, seed=2, tokenizer=DEMO, vocab_size=1024)
    return out


@pytest.fixture
def runner(folder: Path) -> Iterator[MoERunner]:
    with MoERunner.from_pretrained(folder, device="cpu", max_batch_size=3, max_seq_len=64, verbose=False) as runner:
        yield runner
        runner.engine.call(lambda: None)  # orders given before have been carried out
        assert runner.engine.free_slots == 3, "a slot leaked"
        check(runner.engine.scheduler)
        assert all(pool.held == 0 for pool in runner.engine.scheduler.memory.pools), "a page leaked"


def greedy_by_logits(runner: MoERunner, prompt: list[int], count: int) -> tuple[int, ...]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(runner.logits(ids)[-1].argmax()))
    return tuple(ids[len(prompt) :])


def test_greedy_follows_the_largest_logit(runner: MoERunner) -> None:
    assert runner.generate(PROMPTS[0], TEN).token_ids == greedy_by_logits(runner, PROMPTS[0], 10)


def test_many_prompts_answer_as_each_alone(runner: MoERunner) -> None:
    """More prompts than places: they queue, join and leave, and nobody's answer changes."""
    sampled = SamplingParams(max_new_tokens=12, temperature=0.9, top_p=0.95, seed=4, ignore_eos=True, n=2)
    params = [TEN, sampled, SamplingParams(max_new_tokens=3), sampled]
    together = runner.generate(PROMPTS, params)
    alone = [runner.generate(prompt, one) for prompt, one in zip(PROMPTS, params, strict=True)]
    for one, other in zip(together, alone, strict=True):
        assert [c.token_ids for c in one.completions] == [c.token_ids for c in other.completions]
        assert [c.text for c in one.completions] == [c.text for c in other.completions]


def test_prefill_in_chunks_beside_decoding_changes_nothing(runner: MoERunner) -> None:
    prompts = [list(range(2, 40)), [5], list(range(50, 80))]
    whole = [g.token_ids for g in runner.generate(prompts, TEN)]
    runner.prefill_chunk = 4
    assert [g.token_ids for g in runner.generate(prompts, TEN)] == whole


def test_a_single_prompt_gives_one_result_and_a_list_a_list(runner: MoERunner) -> None:
    assert isinstance(runner.generate("Hello", TEN), Generation)
    assert isinstance(runner.generate([{"role": "user", "content": "Hello"}], TEN), Generation)
    assert [type(g) for g in runner.generate(["Hello", "you"], TEN)] == [Generation, Generation]
    assert [type(g) for g in runner.generate([[1, 2]], TEN)] == [Generation]


def test_chat_goes_through_the_template(runner: MoERunner) -> None:
    ids = runner.generate([{"role": "user", "content": "Hello"}], TEN).prompt_token_ids
    text = runner.tokenizer.decode(list(ids), skip_special_tokens=False)
    assert "<|im_start|>user" in text
    assert text.rstrip().endswith("assistant")


def test_seeds_reproduce_and_choices_differ(runner: MoERunner) -> None:
    params = SamplingParams(max_new_tokens=10, temperature=1.0, seed=11, n=3, ignore_eos=True)
    first, second = runner.generate("Hello", params), runner.generate("Hello", params)
    assert [c.token_ids for c in first.completions] == [c.token_ids for c in second.completions]
    assert len({c.token_ids for c in first.completions}) == 3


def test_stop_string_ends_the_text_before_it(runner: MoERunner) -> None:
    params = SamplingParams(max_new_tokens=30, ignore_eos=True)
    full = runner.generate("Hello", params).text
    stop = full[10:14]
    cut = runner.generate("Hello", SamplingParams(max_new_tokens=30, ignore_eos=True, stop=(stop,)))
    assert cut.text == full[: full.index(stop)]
    assert cut.finish_reason == "stop"
    assert len(cut.token_ids) < 30


def test_stop_ids_and_eos_end_without_their_text(runner: MoERunner) -> None:
    tokens = runner.generate("Hello", TEN).token_ids
    first = tokens.index(tokens[4])
    stopped = runner.generate("Hello", SamplingParams(max_new_tokens=10, ignore_eos=True, stop_token_ids=(tokens[4],)))
    assert (stopped.token_ids, stopped.finish_reason) == (tokens[: first + 1], "stop")
    assert stopped.text == runner.tokenizer.decode(list(tokens[:first]))
    runner.engine.eos_token_ids = frozenset({tokens[4]})
    assert runner.generate("Hello", SamplingParams(max_new_tokens=10)).token_ids == tokens[: first + 1]
    assert runner.generate("Hello", TEN).token_ids == tokens


def test_the_answer_ends_where_the_sequence_is_full(runner: MoERunner) -> None:
    result = runner.generate(list(range(1, 61)), SamplingParams(max_new_tokens=100, ignore_eos=True))
    # 60 prompt tokens and 4 more fill the 64 places; the last sampled token needs no place of its own.
    assert (len(result.token_ids), result.finish_reason) == (4, "length")


def test_logprobs_are_those_of_the_logits(runner: MoERunner) -> None:
    params = SamplingParams(max_new_tokens=4, ignore_eos=True, logprobs=2)
    result = runner.generate(PROMPTS[1], params)
    ids = list(PROMPTS[1])
    assert result.logprobs is not None
    for token in result.logprobs:
        expected = runner.logits(ids)[-1].double().log_softmax(0)
        assert token.logprob == pytest.approx(float(expected[token.token_id]), abs=1e-4)
        assert [i for i, _ in token.top] == expected.topk(2).indices.tolist()
        ids.append(token.token_id)
    assert runner.generate(PROMPTS[1], TEN).logprobs is None


def test_stream_adds_up_to_generate(runner: MoERunner) -> None:
    params = SamplingParams(max_new_tokens=12, temperature=0.8, seed=3, n=2, ignore_eos=True)
    expected = runner.generate(["Hello", "world"], params)
    texts: dict[tuple[int, int], str] = {}
    ids: dict[tuple[int, int], tuple[int, ...]] = {}
    for increment in runner.stream(["Hello", "world"], params):
        key = increment.prompt, increment.choice
        texts[key] = texts.get(key, "") + increment.text
        ids[key] = ids.get(key, ()) + increment.token_ids
        if increment.completion:
            assert increment.finish_reason == "length"
    for prompt in range(2):
        for choice in range(2):
            assert texts[prompt, choice] == expected[prompt].completions[choice].text
            assert ids[prompt, choice] == expected[prompt].completions[choice].token_ids


def test_closing_a_stream_frees_its_places(runner: MoERunner) -> None:
    stream = runner.stream([[1], [2], [3], [4], [5]], SamplingParams(max_new_tokens=50, ignore_eos=True))
    next(stream)
    assert runner.generate([1], TEN).token_ids == greedy_by_logits(runner, [1], 10), "others are served meanwhile"
    stream.close()
    assert runner.engine.call(lambda: runner.engine.free_slots) == 3
    untouched = runner.stream([1], TEN)  # never started, holds nothing
    untouched.close()


def test_two_streams_take_turns(runner: MoERunner) -> None:
    expected = [runner.generate(prompt, TEN).token_ids for prompt in PROMPTS[:2]]
    streams = [runner.stream(prompt, TEN) for prompt in PROMPTS[:2]]
    got: list[tuple[int, ...]] = [(), ()]
    for _ in range(10):
        for index, stream in enumerate(streams):
            got[index] += next(stream).token_ids
    assert got == expected
    assert all(next(stream, None) is None for stream in streams)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        ([[]], "empty"),
        ([1, 2, 1024], "ids 0 to 1023"),
        ([-1], "ids 0 to 1023"),
        ([True], "ids 0 to 1023"),
        ([1, 2.5], "ids 0 to 1023"),
        (list(range(64)), "max_seq_len is 64"),
        ("word " * 200, "max_seq_len is 64"),
        (17, "expected a string"),
        (None, "expected a string"),
        (b"bytes", "expected a string"),
        ([{"role": "user"}], "content"),
        ([[1, 2], [3, 5000]], r"prompts\[1\]"),
    ],
)
def test_bad_prompts_get_one_clear_error(runner: MoERunner, prompt: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        runner.generate(prompt, TEN)
    with pytest.raises(RequestError, match=message):
        runner.stream(prompt, TEN)


def test_bad_sampling_gets_one_clear_error(runner: MoERunner) -> None:
    with pytest.raises(RequestError, match="2 for 1 prompts"):
        runner.generate([1], [TEN, TEN])
    with pytest.raises(RequestError, match="SamplingParams"):
        runner.generate([1], {"temperature": 1})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cuda:77"}, "cuda"),
        ({"device": "tpu"}, "expected cpu"),
        ({"device": "meta"}, "expected cpu"),
        ({"dtype": "int8"}, "float32, bfloat16, float16"),
        ({"dtype": torch.int8}, "float32, bfloat16, float16"),
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"max_waiting": -1}, "max_waiting"),
        ({"max_seq_len": 1}, "max_seq_len"),
        ({"max_seq_len": 10**9}, "the model's context"),
    ],
)
def test_bad_settings_get_one_clear_error(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        MoERunner.from_pretrained(folder, **{"device": "cpu", "verbose": False, **settings})


def test_the_plan_is_exact_and_printed_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MoERunner.from_pretrained(folder, device="cpu", max_batch_size=2, max_seq_len=100) as runner:
        shown = capsys.readouterr().err
        assert runner.plan.experts == runner.experts.nbytes
        assert runner.plan.cache == runner.cache.nbytes
    for word in ("memory plan", "expert buffers", "dense weights", "cache", "workspace", "planned", "free"):
        assert word in shown


def test_a_plan_that_does_not_fit_is_refused_with_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_nvfp4.memory.available_bytes", lambda device: 1_000_000)
    with pytest.raises(MemoryPlanError, match=r"(?s)no room for one sequence of 4,096 tokens.*Lower max_seq_len"):
        MoERunner.prepare(folder, device="cpu", verbose=False)


def test_where_not_all_slots_can_be_long_pages_are_shared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for two sequences of full length, and eight slots: short ones run together, long ones in turn."""
    settings = {"device": "cpu", "max_batch_size": 8, "max_seq_len": 128, "verbose": False}
    prepared = MoERunner.prepare(folder, **settings)
    plan, spec = prepared.plan, prepared.config.cache_spec
    each = spec.page_bytes(prepared.cache_settings, [part.pages(prepared.cache_settings) for part in spec.attention])
    prepared.close()
    room = plan.total - 6 * each
    monkeypatch.setattr("moe_nvfp4.memory.available_bytes", lambda device: int(room / 0.97) + 1)
    with MoERunner.from_pretrained(folder, **settings) as runner:
        assert runner.plan.full_sequences == 2
        assert runner.plan.cache == runner.cache.nbytes
        prompts = [[i, i + 1, i + 2] for i in range(1, 9)]
        long = SamplingParams(max_new_tokens=125, ignore_eos=True)
        together = runner.generate(prompts, long)
        assert [len(result.token_ids) for result in together] == [125] * 8
        assert together[5].token_ids == runner.generate(prompts[5], long).token_ids


def test_without_a_tokenizer_token_ids_work(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in folder.iterdir():
        if "token" not in path.name and not path.name.endswith(".jinja"):
            (bare / path.name).symlink_to(path)
    config = json.loads((bare / "config.json").read_text())
    assert config["vocab_size"] == 1024
    with MoERunner.from_pretrained(bare, device="cpu", verbose=False) as runner:
        assert runner.tokenizer is None
        assert len(runner.generate([1, 2], TEN).token_ids) == 10
        with pytest.raises(RequestError, match="no tokenizer"):
            runner.generate("Hello", TEN)
        with pytest.raises(RequestError, match="no tokenizer"):
            runner.generate([1], SamplingParams(stop=("x",)))


def test_a_bad_scale_of_attention_is_found_before_the_experts_take_memory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight_scale"
    tensors[name].view(torch.uint8)[0, 0] = 0x7F
    save_file(tensors, copy / "model.safetensors")
    monkeypatch.setattr("moe_nvfp4.preparation.ExpertBuffers.load", lambda *_, **__: pytest.fail("experts were loaded"))
    with pytest.raises(CheckpointError, match=re.escape(name)):
        MoERunner.from_pretrained(copy, device="cpu", verbose=False)
