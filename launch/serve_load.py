"""What `bench serve` asks for: how long prompts and answers are, what is in them, and when they come.

`sharegpt` draws lengths from lognormal distributions with the means that the vLLM paper gives for ShareGPT's chats, 161
tokens in and 338 out (Kwon et al. 2023, figure 11); their widths and bounds are ours. `log-uniform` is the trace of
`bench serve-offline`.
"""

import math
import random
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from moe_nvfp4.errors import RequestError
from moe_nvfp4.launch.bench_serve_offline import Trace

Lengths = Literal["sharegpt", "log-uniform"]
MEANS = 161.3, 338.0  # tokens of a prompt, of an answer
WIDTHS = 1.2, 0.9  # sigma of the logarithm
MOST = 1024  # of either

# Short common words: about a token each in any vocabulary, so a text of n of them has about n tokens.
WORDS = "the of and to in is it you that he was for on are with as his they be at one have this from or had by"


@dataclass(frozen=True, slots=True)
class Load:
    requests: int = 200  # at each rate
    lengths: Lengths = "sharegpt"
    prompt: tuple[int, int] = (128, 4096)  # shortest and longest; of log-uniform only
    answer: tuple[int, int] = (16, 512)
    vocab: int | None = None  # prompts are token ids below it; None: text, whose tokens the server counts
    ignore_eos: bool = True
    seed: int = 0
    leaving: float = 0.0  # share of clients that leave before their answer is complete

    def check(self) -> None:
        if self.lengths == "log-uniform":
            self._trace().check()
        if self.requests < 1:
            raise RequestError(f"--requests: got {self.requests}; expected at least 1")
        if not 0 <= self.leaving <= 1:
            raise RequestError(f"--leaving: got {self.leaving}; expected a share from 0 to 1")
        if self.vocab is not None and self.vocab < 1:
            raise RequestError(f"--vocab: got {self.vocab}; expected at least 1")

    def arrivals(self, rate: float) -> list[float]:
        """Seconds from the start, of a Poisson process with `rate` requests a second."""
        draw = random.Random(f"{self.seed} {rate}")
        return list(accumulate(draw.expovariate(rate) for _ in range(self.requests)))

    def bodies(self, model: str, chat: bool, rate: float) -> list[dict[str, Any]]:
        """Requests in OpenAI's form, streaming. Lengths are the same at each rate, contents are not: a server may
        remember prompts."""
        draw = random.Random(f"{self.seed} {rate}")
        return [self._body(model, chat, draw, *lengths) for lengths in self._lengths()]

    def patience(self, rate: float) -> list[int | None]:
        """Of each client, after how many pieces of its answer it leaves; None: it stays."""
        draw = random.Random(f"leaving {self.seed} {rate}")
        return [draw.randrange(answer) if draw.random() < self.leaving else None for _, answer in self._lengths()]

    def _lengths(self) -> list[tuple[int, int]]:
        if self.lengths == "log-uniform":
            return self._trace().lengths()
        draw = random.Random(self.seed)
        # The mean of a lognormal distribution is exp(mu + sigma² / 2).
        places = [(math.log(mean) - width**2 / 2, width) for mean, width in zip(MEANS, WIDTHS, strict=True)]
        return [
            (_lognormal(draw, *places[0], least=4), _lognormal(draw, *places[1], least=2)) for _ in range(self.requests)
        ]

    def _trace(self) -> Trace:
        return Trace(self.requests, self.prompt, self.answer, seed=self.seed)

    def _body(self, model: str, chat: bool, draw: random.Random, prompt: int, answer: int) -> dict[str, Any]:
        body: dict[str, Any] = {"model": model, "max_tokens": answer, "temperature": 0.0, "stream": True}
        body["stream_options"] = {"include_usage": True}
        if self.ignore_eos:
            body["ignore_eos"] = True
        if self.vocab:  # the model may have no tokenizer, and its answers no text
            return body | {"prompt": draw.choices(range(self.vocab), k=prompt), "return_token_ids": True}
        text = " ".join(draw.choices(WORDS.split(), k=prompt))
        return body | ({"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text})


def _lognormal(draw: random.Random, mu: float, sigma: float, least: int) -> int:
    return max(least, min(MOST, round(draw.lognormvariate(mu, sigma))))
