"""Answers that follow schemas, patterns and grammars: of a random model at temperature 1, which knows none of them."""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

import moe_nvfp4
from moe_nvfp4 import MoERunner, SamplingParams, grammar
from moe_nvfp4.engine.invariants import check
from moe_nvfp4.errors import RequestError
from moe_nvfp4.grammar import Grammars, Matcher, TokenMasks, allowed_tokens
from moe_nvfp4.sampling import Constraint
from moe_nvfp4.synthesize import synthesize
from moe_nvfp4.tokenizer import Tokenizer

pytest.importorskip("xgrammar")

DEMO = Path(moe_nvfp4.__file__).parent / "demo"
EOS = 1023
PROMPTS = [[1, 2, 3], [40, 41, 42, 43, 44], [7], [9, 8], list(range(100, 190))]
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "on": {"type": "boolean"}},
    "required": ["x", "on"],
}
LIST = {"type": "array", "items": {"enum": ["red", "green", 3, None]}, "minItems": 1, "maxItems": 4}
SHORT = {"anyOf": [{"type": "string", "maxLength": 6}, {"const": {"a": [1, 2]}}, {"$ref": "#/$defs/point"}]} | {
    "$defs": {"point": POINT}
}
SCHEMAS: list[dict[str, Any]] = [POINT, LIST, SHORT]
PATTERNS = [r"[a-c]{2,5}-\d{3}", r"(yes|no)( sir)?", r"é+[x-z]?"]
SUMS = 'root ::= sum\nsum ::= number ("+" number)?\nnumber ::= [0-9] [0-9]? | "(" sum ")"'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("grammar") / "model"
    synthesize("nvidia/Qwen3-30B-A3B-NVFP4", out, tiny=True, seed=2, tokenizer=DEMO, vocab_size=1024)
    return out


def runner_of(folder: Path, **settings: Any) -> MoERunner:
    return MoERunner.from_pretrained(
        folder, **{"device": "cpu", "max_batch_size": 6, "max_seq_len": 256, "verbose": False} | settings
    )


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[MoERunner]:
    with runner_of(folder) as runner:
        yield runner


@pytest.fixture
def runner(shared: MoERunner) -> Iterator[MoERunner]:
    yield shared
    shared.engine.call(lambda: None)
    assert shared.engine.free_slots == 6, "a slot leaked"
    check(shared.engine.scheduler)


@pytest.fixture(scope="module")
def grammars() -> Iterator[Grammars]:
    tokenizer = Tokenizer.load(DEMO)
    assert tokenizer is not None
    made = Grammars(tokenizer, 1024 + 17, frozenset([EOS]))  # logits padded beyond the vocabulary
    yield made
    made.close()


def asked(seed: int, **more: Any) -> list[SamplingParams]:
    """One of each kind, at temperature 1."""
    kinds: list[dict[str, Any]] = [
        *({"json_schema": schema} for schema in SCHEMAS),
        *({"regex": pattern} for pattern in PATTERNS),
        {"grammar": SUMS},
        {"json_object": True},
    ]
    return [SamplingParams(**{"max_new_tokens": 90, "temperature": 1.0, "seed": seed} | kind | more) for kind in kinds]


def follows(text: str, params: SamplingParams) -> bool:
    if params.json_schema is not None:
        return jsonschema.Draft202012Validator(json.loads(params.json_schema)).is_valid(json.loads(text))
    if params.json_object:
        return isinstance(json.loads(text), dict)
    if params.regex is not None:
        return re.fullmatch(params.regex, text) is not None
    return re.fullmatch(r"[0-9()+]+", text) is not None and eval(re.sub(r"\b0+(?=\d)", "", text)) >= 0


def unconstrained(seed: int) -> list[SamplingParams]:
    return [
        SamplingParams(max_new_tokens=30, temperature=1.0, seed=seed, ignore_eos=True),
        SamplingParams(max_new_tokens=30, ignore_eos=True),
        SamplingParams(max_new_tokens=25, temperature=0.7, seed=seed, frequency_penalty=0.5, ignore_eos=True),
    ]


@pytest.mark.parametrize("seed", range(4))
def test_every_finished_answer_follows_and_others_do_not_change(runner: MoERunner, seed: int) -> None:
    bound, free = asked(seed), unconstrained(seed)
    params = [one for pair in zip(bound, free * 3, strict=False) for one in pair]
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(len(params))]
    together = runner.generate(prompts, params)
    finished = 0
    for prompt, one, generation in zip(prompts, params, together, strict=True):
        if one.constraint is None:
            assert generation.token_ids == runner.generate(prompt, one).token_ids
        elif generation.finish_reason == "stop":
            finished += 1
            assert follows(generation.text, one), (one.constraint, generation.text)
            assert generation.token_ids[-1] == EOS
    assert finished >= 6


def test_greedy_answers_follow(runner: MoERunner) -> None:
    params = asked(0, temperature=0.0)[:6]
    for one, generation in zip(params, runner.generate([PROMPTS[0]] * 6, params), strict=True):
        assert generation.finish_reason == "length" or follows(generation.text, one)
    assert runner.generate(PROMPTS[0], params[0]).finish_reason == "stop"


def test_what_is_cut_is_a_prefix(runner: MoERunner) -> None:
    for one in asked(5):
        whole = runner.generate(PROMPTS[1], one)
        limits = {"json_schema": one.json_schema, "regex": one.regex, "grammar": one.grammar}
        cut = SamplingParams(max_new_tokens=3, temperature=1.0, seed=5, json_object=one.json_object, **limits)
        assert runner.generate(PROMPTS[1], cut).token_ids == whole.token_ids[:3]


def test_many_choices_penalties_logprobs_and_stop_strings(runner: MoERunner) -> None:
    one = SamplingParams(
        regex=r"[ab]{8}", temperature=1.0, seed=1, n=4, logprobs=2, frequency_penalty=1.0, logit_bias={64: 5.0}
    )
    generation = runner.generate(PROMPTS[0], one)
    assert all(re.fullmatch(r"[ab]{8}", completion.text) for completion in generation.completions)
    assert len({completion.text for completion in generation.completions}) > 1
    logits = runner.logits([*PROMPTS[0], *generation.token_ids])
    expected = logits[len(PROMPTS[0]) - 1].log_softmax(0)
    assert generation.logprobs is not None
    assert generation.logprobs[0].logprob == pytest.approx(float(expected[generation.token_ids[0]]), abs=1e-4)
    stopped = runner.generate(PROMPTS[0], SamplingParams(regex="aaab+c", stop="b", temperature=1.0, seed=0))
    assert stopped.text == "aaa"


def test_answers_survive_losing_their_pages(folder: Path) -> None:
    long = [SamplingParams(regex="[a-z ]{300}", temperature=1.0, seed=seed, max_new_tokens=60) for seed in range(3)]
    params, prompts = unconstrained(3) + long, [list(range(100, 200))] * 6
    with runner_of(folder) as runner:
        expected = [runner.generate(p, one).token_ids for p, one in zip(prompts, params, strict=True)]
    with runner_of(folder, prefix_reuse=False) as tight:
        (pool,) = tight.engine.scheduler.memory.pools
        tight.engine.call(lambda: [pool.take() for _ in range(pool.count - 9)])
        preempt, lost = tight.engine.scheduler._preempt, list[bool]()

        def counting(sequence: Any) -> None:
            preempt(sequence)
            lost.append(sequence.stepwise)

        tight.engine.scheduler._preempt = counting  # type: ignore[method-assign]
        assert [g.token_ids for g in tight.generate(prompts, params)] == expected
        assert any(lost), "this test is about preemption"


def test_two_steps_in_flight(folder: Path) -> None:
    """As on a GPU, where the next step is launched before the tokens of the last one are known."""
    params = [one for pair in zip(asked(2)[:3], unconstrained(2), strict=True) for one in pair]
    with runner_of(folder) as runner:
        expected = [g.token_ids for g in runner.generate(PROMPTS[:1] * 6, params)]
        runner.engine._depth = 2
        assert [g.token_ids for g in runner.generate(PROMPTS[:1] * 6, params)] == expected


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("regex", "(a", "parenthesis is not closed"),
        ("regex", "(?=a)b", "Lookahead is not supported"),
        ("grammar", 'x ::= "a"', "root"),
        ("grammar", "root ::= x", '"x" is not defined'),
        ("json_schema", {"$ref": "#/$defs/none"}, "none"),
    ],
)
def test_what_cannot_be_compiled_is_refused_before_it_runs(
    runner: MoERunner, kind: str, text: Any, message: str
) -> None:
    with pytest.raises(RequestError, match=rf"SamplingParams\.{kind}: .*{message}"):
        runner.stream([1], SamplingParams(**{kind: text}))


def test_ends_and_special_tokens(grammars: Grammars) -> None:
    """Only eos, once it is complete; never a special token, nor an id beyond the vocabulary."""
    matcher = grammars.matcher(Constraint("regex", "a*"))
    allowed = allowed_tokens(Matcher.fill([matcher], 1041), 1041)[0]
    tokenizer = Tokenizer.load(DEMO)
    assert tokenizer is not None
    for token_id in allowed.nonzero().flatten().tolist():
        assert token_id == EOS or set(tokenizer.token_bytes(token_id)) == {ord("a")}
    assert allowed[EOS] and not allowed[1021] and not allowed[1024:].any()
    closed = grammars.matcher(Constraint("regex", "a"))
    assert closed.accept(tokenizer.encode("a")[0])
    assert allowed_tokens(Matcher.fill([closed], 1041), 1041)[0].nonzero().tolist() == [[EOS]]
    assert not closed.accept(tokenizer.encode("b")[0])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_masks_of_some_rows(grammars: Grammars, device: str) -> None:
    matchers = [grammars.matcher(Constraint("regex", pattern)) for pattern in ("a+", "b")]
    logits = torch.randn(4, 1041)
    changed = logits.clone().to(device)
    TokenMasks([3, 1], matchers).exclude(changed)
    changed = changed.cpu()
    assert torch.equal(changed[[0, 2]], logits[[0, 2]])
    for row, matcher in ((3, matchers[0]), (1, matchers[1])):
        allowed = allowed_tokens(Matcher.fill([matcher], 1041), 1041)[0]
        assert torch.equal(changed[row], torch.where(allowed, logits[row], -torch.inf))


def test_compiled_once_and_kept_within_bounds(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars.check(first := Constraint("regex", "[0-9]{4}"))
    kept = grammars._kept[first]
    assert grammars.keeps(first) and not grammars.keeps(Constraint("regex", "[0-9]{6}"))
    grammars.check(first)
    assert grammars._kept[first] is kept
    monkeypatch.setattr(grammar, "KEPT_BYTES", 1)
    grammars.check(second := Constraint("regex", "[0-9]{5}"))
    assert list(grammars._kept) == [second]
    assert grammars.matcher(first).accept(15)  # "0": compiled again, and kept
    assert list(grammars._kept) == [first]


def test_a_random_walk_stays_inside(grammars: Grammars) -> None:
    draw = random.Random(1)
    tokenizer = Tokenizer.load(DEMO)
    assert tokenizer is not None
    constraint = Constraint("json_schema", json.dumps(POINT))
    for _ in range(20):
        matcher, ids = grammars.matcher(constraint), list[int]()
        while EOS not in ids:
            allowed = allowed_tokens(Matcher.fill([matcher], 1041), 1041)[0].nonzero().flatten().tolist()
            ids.append(draw.choice(allowed))
            assert matcher.accept(ids[-1])
        assert jsonschema.Draft202012Validator(POINT).is_valid(json.loads(tokenizer.decode(ids)))


def test_without_the_library_or_a_tokenizer(runner: MoERunner, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.load(DEMO)
    assert tokenizer is not None
    monkeypatch.setitem(__import__("sys").modules, "xgrammar", None)
    with pytest.raises(RequestError, match=r"need xgrammar: pip install 'moe-nvfp4\[grammar\]'"):
        Grammars(tokenizer, 1024, frozenset([EOS])).check(Constraint("regex", "a"))
    monkeypatch.undo()
    with pytest.raises(RequestError, match="names no end-of-sequence token"):
        Grammars(tokenizer, 1024, frozenset()).check(Constraint("regex", "a"))
