"""What a request asks of sampling, and the random numbers of its sequences; kernels/sample.py chooses the tokens.

A sequence's random numbers are known before its tokens, one for each, so a seed gives the same tokens whatever else is
in the batch, and the host can send a step's numbers before it has seen the tokens of the step before.
"""

import hashlib
import math
import numbers
import random
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from moe_nvfp4.errors import RequestError
from moe_nvfp4.json_schema import checked_schema
from moe_nvfp4.kernels.sample import SamplingRows

MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_LOGIT_BIASES = 1024
MAX_LOGPROBS = 1024  # bounds the size of a reply; the OpenAI API stops at 20
MAX_REGEX, MAX_GRAMMAR = 4096, 50_000  # characters
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


def _reject(field: str, value: object, expected: str) -> RequestError:
    return RequestError(f"SamplingParams.{field}: got {reprlib.repr(value)}; expected {expected}")


def _integer(field: str, value: object, low: int, high: int, expected: str) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
        raise _reject(field, value, expected)
    return int(value)


def _number(field: str, value: object, low: float, high: float, expected: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _reject(field, value, expected)
    try:
        number = float(value)
    except OverflowError:
        raise _reject(field, value, expected) from None
    if not (math.isfinite(number) and low <= number <= high):
        raise _reject(field, value, expected)
    return number


def _flag(field: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _reject(field, value, "True or False")
    return value


def _stop_strings(value: object) -> tuple[str, ...]:
    expected = f"a string or at most {MAX_STOP_STRINGS} of them, none empty"
    strings = (value,) if isinstance(value, str) else () if value is None else value
    if not isinstance(strings, (list, tuple)) or len(strings) > MAX_STOP_STRINGS:
        raise _reject("stop", value, expected)
    if not all(isinstance(string, str) and string for string in strings):
        raise _reject("stop", value, expected)
    return tuple(strings)


def _token_ids(value: object) -> tuple[int, ...]:
    expected = "a list of token ids, each an integer >= 0"
    if not isinstance(value, (list, tuple)):
        raise _reject("stop_token_ids", value, expected)
    return tuple(_integer("stop_token_ids", token_id, 0, INT64_MAX, expected) for token_id in value)


def _logit_bias(value: object) -> tuple[tuple[int, float], ...]:
    expected = f"at most {MAX_LOGIT_BIASES} token ids, each with a number from -100 to 100"
    pairs = tuple(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, (list, tuple)) or len(pairs) > MAX_LOGIT_BIASES:
        raise _reject("logit_bias", value, expected)
    checked = []
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise _reject("logit_bias", value, expected)
        token_id = _integer("logit_bias", pair[0], 0, INT64_MAX, expected)
        checked.append((token_id, _number("logit_bias", pair[1], -100.0, 100.0, expected)))
    if len({token_id for token_id, _ in checked}) != len(checked):
        raise _reject("logit_bias", value, expected + ", none twice")
    return tuple(checked)


def _text(field: str, value: object, most: int) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= most:
        raise _reject(field, value, f"None or a string of 1 to {most:,} characters")
    return value


class Constraint(NamedTuple):
    """What an answer's text must follow."""

    kind: Literal["json_schema", "regex", "grammar", "json_object"]
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """What one request asks for; every field is checked at construction and a bad one is a RequestError.

    temperature: 0 is greedy, and then top_k, top_p, min_p and seed have no effect.
    top_k: keep the k likeliest tokens; 0 is off.
    top_p: keep the smallest set of likeliest tokens whose mass reaches p, at least one; 1 is off.
    min_p: keep tokens with at least this fraction of the likeliest token's probability; 0 is off.
    seed: None draws one from the operating system.
    stop: a string or a sequence of strings; the text ends before the first that appears.
    n: how many independent choices to return; choice 0 is what n=1 gives.
    logprobs: None is off, 0 the chosen token only, k also the k likeliest tokens.
    repetition_penalty: above 1 makes tokens of prompt and answer less likely; 1 is off.
    presence_penalty, frequency_penalty: from -2 to 2, for tokens of the answer, once or each time; 0 is off.
    logit_bias: token id -> from -100 to 100, added to its logit.
    priority: smaller is served sooner; requests of one priority in the order they came.
    timeout: seconds after which an unfinished answer fails; None waits for ever.
    skip_special_tokens: leave special tokens, such as marks of tool calls in some models, out of the text.

    One of these at most; they need the extra `grammar`. The answer's text follows it unless max_new_tokens or a stop
    string cuts it.
    json_schema: a mapping or JSON text; a schema that cannot be enforced is refused.
    regex: a regular expression that the whole answer matches.
    grammar: EBNF as xgrammar reads it, with a rule named root.
    json_object: any JSON object.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # a mapping is taken too
    priority: int = 0
    timeout: float | None = None
    skip_special_tokens: bool = True
    json_schema: str | None = None  # a mapping is taken too
    regex: str | None = None
    grammar: str | None = None
    json_object: bool = False

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "max_new_tokens": _integer("max_new_tokens", self.max_new_tokens, 1, INT64_MAX, "an integer >= 1"),
            "temperature": _number(
                "temperature", self.temperature, 0.0, math.inf, "a finite number >= 0 (0 is greedy)"
            ),
            "top_k": _integer("top_k", self.top_k, 0, INT64_MAX, "an integer >= 0 (0 is off)"),
            # The smallest positive double as lower bound: 0 itself is outside.
            "top_p": _number("top_p", self.top_p, math.ulp(0.0), 1.0, "a number in (0, 1] (1 is off)"),
            "min_p": _number("min_p", self.min_p, 0.0, 1.0, "a number in [0, 1] (0 is off)"),
            "stop": _stop_strings(self.stop),
            "stop_token_ids": _token_ids(self.stop_token_ids),
            "ignore_eos": _flag("ignore_eos", self.ignore_eos),
            "skip_special_tokens": _flag("skip_special_tokens", self.skip_special_tokens),
            "n": _integer("n", self.n, 1, MAX_CHOICES, f"an integer from 1 to {MAX_CHOICES}"),
        }
        if self.seed is not None:
            checked["seed"] = _integer("seed", self.seed, INT64_MIN, INT64_MAX, "None or a 64-bit integer")
        if self.logprobs is not None:
            expected = f"None or an integer from 0 to {MAX_LOGPROBS}"
            checked["logprobs"] = _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS, expected)
        expected = "a number from 0.01 to 100 (1 is off)"
        checked["repetition_penalty"] = _number("repetition_penalty", self.repetition_penalty, 0.01, 100.0, expected)
        for name in ("presence_penalty", "frequency_penalty"):
            checked[name] = _number(name, getattr(self, name), -2.0, 2.0, "a number from -2 to 2 (0 is off)")
        checked["logit_bias"] = _logit_bias(self.logit_bias)
        checked["priority"] = _integer("priority", self.priority, INT64_MIN, INT64_MAX, "a 64-bit integer")
        if self.timeout is not None:
            expected = "None or a positive number of seconds"
            checked["timeout"] = _number("timeout", self.timeout, math.ulp(0.0), math.inf, expected)
        checked |= self._checked_constraints()
        for field, value in checked.items():  # normalised copies: lists to tuples, NumPy scalars to Python's
            object.__setattr__(self, field, value)

    def _checked_constraints(self) -> dict[str, Any]:
        checked: dict[str, Any] = {"json_object": _flag("json_object", self.json_object)}
        if self.json_schema is not None:
            checked["json_schema"] = checked_schema(self.json_schema)
        if self.regex is not None:
            checked["regex"] = _text("regex", self.regex, MAX_REGEX)
        if self.grammar is not None:
            checked["grammar"] = _text("grammar", self.grammar, MAX_GRAMMAR)
        given = [name for name, value in checked.items() if value]
        if len(given) > 1:
            raise RequestError(f"SamplingParams: got {' and '.join(sorted(given))}; expected one of them at most")
        if given and self.ignore_eos:
            raise RequestError(
                f"SamplingParams: ignore_eos with {given[0]}; its answer ends with that token. Leave it out"
            )
        return checked

    @property
    def constraint(self) -> Constraint | None:
        if self.json_object:
            return Constraint("json_object", "")
        if self.json_schema is not None:
            return Constraint("json_schema", self.json_schema)
        if self.regex is not None:
            return Constraint("regex", self.regex)
        return None if self.grammar is None else Constraint("grammar", self.grammar)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def changes_logits(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0) or bool(
            self.logit_bias
        )


class Sampler:
    """The random numbers of one sequence, which is choice `index` of its request."""

    def __init__(self, params: SamplingParams, index: int = 0) -> None:
        self.params = params
        if params.seed is None:
            self._stream = random.Random()
        else:
            # Hashed because random.Random(-1) and random.Random(1) are the same stream, and nearby
            # integers as seeds would make choice 1 of seed 7 equal choice 0 of seed 8.
            digest = hashlib.sha256(f"{params.seed}:{index}".encode()).digest()
            self._stream = random.Random(int.from_bytes(digest, "big"))

    def uniform(self) -> float:
        """The next token's random number, in [0, 1). A greedy sequence needs none and gets 0."""
        if self.params.greedy:
            return 0.0
        # 24 bits, which float32 holds exactly: rounding up could give 1.
        return math.floor(self._stream.random() * 2**24) / 2**24

    def skip(self, tokens: int) -> None:
        """Advance the stream past tokens that were already sampled, to resume a sequence elsewhere."""
        for _ in range(tokens):
            self.uniform()


def sampling_rows(samplers: Sequence[Sampler | None], device: torch.device) -> SamplingRows:
    """What one step's rows ask for, each with its next random number, in one copy; None is a row nobody reads."""
    params = [SamplingParams() if sampler is None else sampler.params for sampler in samplers]
    packed = torch.tensor(
        [
            [one.temperature for one in params],
            [0.0] * len(params),
            [one.top_p for one in params],
            [one.min_p for one in params],
            [0.0 if sampler is None else sampler.uniform() for sampler in samplers],
        ]
    )
    packed[1] = torch.tensor([min(one.top_k, 2**31 - 1) for one in params], dtype=torch.int32).view(torch.float32)
    if device.type == "cuda":
        packed = packed.pin_memory()
    return SamplingRows.views(packed.to(device, non_blocking=True))


def check_peak(peak: float) -> None:
    """Of a row of logits: they are broken when the largest is not finite, and then the token means nothing."""
    if math.isfinite(peak):
        return
    found = "NaN" if math.isnan(peak) else "+inf" if peak > 0 else "-inf for every token"
    raise FloatingPointError(f"logits: got {found}; expected a finite maximum (the forward pass overflowed)")
