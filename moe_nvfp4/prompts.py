"""From what a user passes to checked token ids: strings, chat messages, or ids, one prompt or many."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_nvfp4.errors import RequestError
from moe_nvfp4.grammar import Grammars, Matcher
from moe_nvfp4.sampling import SamplingParams
from moe_nvfp4.tokenizer import Tokenizer

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]


@dataclass(frozen=True, slots=True)
class Requests:
    """Encoded prompts, each with its sampling; `many` tells a list of one from a single prompt."""

    many: bool
    token_ids: list[list[int]]
    sampling: list[SamplingParams]


@dataclass(frozen=True, slots=True)
class PromptEncoder:
    """Knows what a model can take, so requests can be refused before its weights are loaded."""

    tokenizer: Tokenizer | None
    vocab_size: int
    max_seq_len: int
    context_length: int
    media_tokens: Mapping[int, str] = field(default_factory=dict)  # placeholders: id -> image, video, audio
    grammars: Grammars | None = None  # None: without a tokenizer

    def encode(self, prompts: Any, sampling: Any) -> Requests:
        many = _is_many(prompts)
        items = list(prompts) if many else [prompts]
        params = list(sampling) if isinstance(sampling, Sequence) else [sampling or SamplingParams()] * len(items)
        if len(params) != len(items):
            raise RequestError(f"sampling: {len(params)} for {len(items)} prompts; expected one, or one for each")
        for one in params:
            self._check_sampling(one)
        wheres = [f"prompts[{index}]" if many else "prompt" for index in range(len(items))]
        ids = [self.check(self._ids(item, where), where) for item, where in zip(items, wheres, strict=True)]
        for prompt_ids, where in zip(ids, wheres, strict=True):
            if media := self.media_tokens.keys() & set(prompt_ids):
                raise RequestError(
                    f"{where}: token {min(media)} is a placeholder for {self.media_tokens[min(media)]}; this model "
                    "runs text only. Leave images, video and audio out."
                )
        return Requests(many, ids, params)

    def _check_sampling(self, sampling: Any) -> None:
        if not isinstance(sampling, SamplingParams):
            raise RequestError(f"sampling: got {type(sampling).__name__}; expected SamplingParams")
        if beyond := [token for token, _ in sampling.logit_bias if token >= self.vocab_size]:
            raise RequestError(f"SamplingParams.logit_bias: token {beyond[0]}; expected ids 0 to {self.vocab_size - 1}")
        if sampling.stop and self.tokenizer is None:
            raise RequestError("SamplingParams.stop: this checkpoint has no tokenizer; use stop_token_ids")
        if sampling.constraint is not None:
            if self.grammars is None:
                raise RequestError(f"SamplingParams.{sampling.constraint.kind}: this checkpoint has no tokenizer")
            self.grammars.check(sampling.constraint)

    def compiles(self, sampling: SamplingParams) -> bool:
        """Whether `encode` has to compile a grammar first, which may take seconds."""
        constraint = sampling.constraint
        return constraint is not None and self.grammars is not None and not self.grammars.keeps(constraint)

    def matcher(self, sampling: SamplingParams) -> Matcher | None:
        """Of an answer that has been checked."""
        constraint = sampling.constraint
        return None if constraint is None or self.grammars is None else self.grammars.matcher(constraint)

    def close(self) -> None:
        if self.grammars is not None:
            self.grammars.close()

    def _ids(self, prompt: Any, where: str) -> list[int]:
        if not isinstance(prompt, str | Sequence) or isinstance(prompt, bytes):
            raise RequestError(
                f"{where}: got {type(prompt).__name__}; expected a string, chat messages, or a list of token ids"
            )
        if not isinstance(prompt, str) and not _is_chat(prompt):
            return list(prompt)
        if not isinstance(prompt, str):
            _require_text(prompt, where)
        if self.tokenizer is None:
            raise RequestError(f"{where}: this checkpoint has no tokenizer; pass a list of token ids")
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else self.tokenizer.encode_chat(prompt)

    def check(self, ids: list[int], where: str, *, answer: bool = True) -> list[int]:
        """The ids, if the model can take them and, with `answer`, say at least one token more."""
        if not ids:
            raise RequestError(f"{where}: empty; expected at least one token")
        for position, token in enumerate(ids):
            if type(token) is not int or not 0 <= token < self.vocab_size:
                raise RequestError(
                    f"{where}: token {token!r:.40} at position {position}; expected ids 0 to {self.vocab_size - 1}"
                )
        if len(ids) + answer > self.max_seq_len:
            raise RequestError(
                f"{where}: {len(ids):,} tokens{' and one for the answer' if answer else ''}; max_seq_len is "
                f"{self.max_seq_len:,}. Shorten it, or load with a larger max_seq_len (the model's context is "
                f"{self.context_length:,})."
            )
        return ids


def _require_text(messages: Sequence[Any], where: str) -> None:
    """Contents in parts, as vision models take them, may hold text only."""
    for number, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list | tuple) else ():
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            if kind != "text":
                raise RequestError(
                    f"{where}: message {number} has a part of type {kind!r:.40}; this model runs text only. "
                    "Leave images, video and audio out."
                )


def _is_chat(prompt: Sequence[Any]) -> bool:
    return len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _is_many(prompts: Any) -> bool:
    """True for a list of prompts; a string, a list of ids and a list of messages are one prompt."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
        return False
    return isinstance(prompts[0], str | Sequence)
