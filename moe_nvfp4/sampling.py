"""How the next token is chosen from a row of logits.

The filters run in the order temperature, top_k, top_p, min_p, each on the distribution that the one before
it left. What remains is drawn from by inverse CDF in ascending token id, with one `random.random()` per
token, so a seed gives the same tokens whatever else is in the batch.
"""

import hashlib
import math
import numbers
import random
import reprlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_nvfp4.errors import RequestError

MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 1024  # bounds the size of a reply; the OpenAI API stops at 20
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
            "n": _integer("n", self.n, 1, MAX_CHOICES, f"an integer from 1 to {MAX_CHOICES}"),
        }
        if self.seed is not None:
            checked["seed"] = _integer("seed", self.seed, INT64_MIN, INT64_MAX, "None or a 64-bit integer")
        if self.logprobs is not None:
            expected = f"None or an integer from 0 to {MAX_LOGPROBS}"
            checked["logprobs"] = _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS, expected)
        for field, value in checked.items():  # normalised copies: lists to tuples, NumPy scalars to Python's
            object.__setattr__(self, field, value)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


class Sampled(NamedTuple):
    """One chosen token; the log-probabilities are None unless asked for."""

    token_id: int
    logprob: float | None
    top_logprobs: list[tuple[int, float]] | None


class Sampler:
    """Chooses the tokens of one sequence, which is choice `index` of its request."""

    def __init__(self, params: SamplingParams, index: int = 0) -> None:
        self.params = params
        if params.seed is None:
            self._stream = random.Random()
        else:
            # Hashed because random.Random(-1) and random.Random(1) are the same stream, and nearby
            # integers as seeds would make choice 1 of seed 7 equal choice 0 of seed 8.
            digest = hashlib.sha256(f"{params.seed}:{index}".encode()).digest()
            self._stream = random.Random(int.from_bytes(digest, "big"))

    def skip(self, tokens: int) -> None:
        """Advance the stream past tokens that were already sampled, to resume a sequence elsewhere."""
        if not self.params.greedy:
            for _ in range(tokens):
                self._stream.random()

    def sample(self, logits: Tensor) -> Sampled:
        """The next token from `logits` [V]; equal logits of a greedy request go to the lowest id.

        Log-probabilities are log_softmax of the logits as given, before temperature and filters. Tokens of
        probability 0 are left out of the alternatives. -inf excludes a token; NaN, +inf, and nothing but
        -inf raise FloatingPointError, because they mean that the model has gone wrong.
        """
        assert logits.dim() == 1 and logits.numel() > 0, f"expected logits [V], got {tuple(logits.shape)}"
        peak, best = logits.max(dim=0)  # documented to return the first of equal maxima, and NaN if any
        _check_peak(float(peak))
        token_id = int(best) if self.params.greedy else self._draw(logits.double() - peak.double())
        if self.params.logprobs is None:
            return Sampled(token_id, None, None)
        logprobs_V = torch.log_softmax(logits.double(), dim=0)
        return Sampled(token_id, float(logprobs_V[token_id]), _alternatives(logprobs_V, self.params.logprobs))

    def _draw(self, shifted_V: Tensor) -> int:
        """`shifted_V`: logits minus their maximum, so that no temperature can overflow them."""
        ids, probs = _filtered(shifted_V, self.params)
        cdf = probs.cumsum(0)
        target = cdf[-1] * self._stream.random()
        # right=True steps over tokens of probability 0. The product can round up to the total, past the
        # end; the second search is the last token with any probability.
        position = torch.searchsorted(cdf, target, right=True)
        last = torch.searchsorted(cdf, cdf[-1])
        return int(ids[torch.minimum(position, last)])


def _check_peak(peak: float) -> None:
    if math.isfinite(peak):
        return
    found = "NaN" if math.isnan(peak) else "+inf" if peak > 0 else "-inf for every token"
    raise FloatingPointError(f"logits: got {found}; expected a finite maximum (the forward pass overflowed)")


def _top(values: Tensor, k: int) -> Tensor:
    """Indices of the k largest values, largest first, the lowest index first among equals."""
    if k < values.numel():
        # topk does not say which of several equal values it keeps; its k-th value is certain.
        indices = (values >= torch.topk(values, k).values[-1]).nonzero().flatten()
    else:
        indices = torch.arange(values.numel(), device=values.device)
    order = torch.argsort(values[indices], descending=True, stable=True)
    return indices[order[:k]]


def _filtered(shifted_V: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The token ids that pass top_k, top_p and min_p, ascending, and their probabilities."""
    probs_V = torch.softmax(shifted_V / params.temperature, dim=0)
    if params.top_k == 0 and params.top_p == 1.0:
        ids = torch.arange(probs_V.numel(), device=probs_V.device)
    else:
        # Ranked by logits: a high temperature rounds different ones to the same probability.
        ids = _top(shifted_V, min(params.top_k or shifted_V.numel(), shifted_V.numel()))
    probs = probs_V[ids]
    if params.top_p < 1.0:
        mass = probs.cumsum(0)
        kept = int((mass < params.top_p * mass[-1]).sum()) + 1
        ids, probs = ids[:kept], probs[:kept]
    if params.min_p > 0.0:
        kept_mask = probs >= params.min_p * probs.max()
        ids, probs = ids[kept_mask], probs[kept_mask]
    ids, order = ids.sort()
    return ids, probs[order]


def _alternatives(logprobs_V: Tensor, k: int) -> list[tuple[int, float]]:
    if k == 0:
        return []
    ids = _top(logprobs_V, min(k, logprobs_V.numel()))
    pairs = zip(ids.tolist(), logprobs_V[ids].tolist(), strict=True)
    return [(token_id, logprob) for token_id, logprob in pairs if logprob > -math.inf]
