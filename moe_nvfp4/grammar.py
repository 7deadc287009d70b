"""Answers that follow a JSON schema, a regular expression or a grammar: which tokens may come next.

Compiling is done by xgrammar (the extra `grammar`), in a thread of its own: it can take seconds, and a pattern can be
built to take for ever. Whoever asks waits for COMPILE_SECONDS at most. What has been compiled is kept. A few steps are
tried at once, since some patterns are quick to compile and slow to follow, and those would hold up everybody's steps.

A special token is never part of an answer's text, so a grammar allows none, but for the end once it is complete.
"""

import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotInTime
from typing import Any, Final, NamedTuple

import torch

from moe_nvfp4.errors import RequestError
from moe_nvfp4.sampling import Constraint
from moe_nvfp4.tokenizer import Tokenizer

COMPILE_SECONDS: Final = 10.0
COMPILED_AT_ONCE: Final = 2
KEPT_BYTES: Final = 256 << 20  # of compiled grammars
TRIED_STEPS: Final = 64
TRIED_SECONDS: Final = 0.02  # of the processor for a step; a usual one takes some 10 µs
CONTROL: Final = re.compile(rb"[\x00-\x09\x0b-\x1f]")  # all but the end of a line
WHITESPACE: Final = 64  # characters in a row, in JSON: without a bound a weak model writes nothing else


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, state: Any, filler: Any):
        self._state, self._filler = state, filler

    def accept(self, token_id: int) -> bool:
        return bool(self._state.accept_token(token_id))

    @staticmethod
    def fill(matchers: "Sequence[Matcher]", vocab_size: int) -> torch.Tensor:
        """int32 [R, W] on the CPU: bit t % 32 of word t // 32 says whether token t may come next in a row."""
        bits_RW = torch.zeros(len(matchers), -(-vocab_size // 32), dtype=torch.int32)
        if len(matchers) == 1:
            matchers[0]._state.fill_next_token_bitmask(bits_RW)
        else:
            matchers[0]._filler.batch_fill_next_token_bitmask([one._state for one in matchers], bits_RW)
        return bits_RW


class TokenMasks(NamedTuple):
    """Rows of a step that follow a grammar."""

    rows: list[int]
    matchers: list[Matcher]

    def exclude(self, logits_BV: torch.Tensor) -> None:
        """-inf in place of what may not come next. The masks are made here, on the host, while a device computes."""
        bits_RW, rows_R = Matcher.fill(self.matchers, logits_BV.shape[1]), torch.tensor(self.rows)
        if logits_BV.is_cuda:
            bits_RW, rows_R = (part.pin_memory().to(logits_BV.device, non_blocking=True) for part in (bits_RW, rows_R))
        barred_RV = ~allowed_tokens(bits_RW, logits_BV.shape[1])
        logits_BV.index_copy_(0, rows_R, logits_BV[rows_R].masked_fill_(barred_RV, -torch.inf))


class Grammars:
    """Compiles for one vocabulary. Any thread may call."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: frozenset[int]):
        self._tokenizer, self._vocab_size, self._eos = tokenizer, vocab_size, sorted(eos_token_ids)
        self._lock, self._building = threading.Lock(), threading.Lock()
        self._kept: OrderedDict[Constraint, Any] = OrderedDict()  # the least recently used first
        self._running: dict[Constraint, Future[Any]] = {}
        self._library: Any = None
        self._filler: Any = None  # fills the masks of many at once
        self._for_text: Any = None
        self._for_json: Any = None

    def check(self, constraint: Constraint) -> None:
        """Compiles it, if it can be done in time."""
        self._build()
        with self._lock:
            if self._find(constraint) is not None:
                return
            job = self._running.get(constraint)
            if job is None:
                if len(self._running) >= COMPILED_AT_ONCE:
                    raise RequestError(f"SamplingParams.{constraint.kind}: too many grammars are being compiled; retry")
                job = self._running[constraint] = Future()
                threading.Thread(target=self._compile_for, args=(constraint, job), daemon=True).start()
        try:
            job.result(COMPILE_SECONDS)
        except NotInTime:
            raise RequestError(
                f"SamplingParams.{constraint.kind}: not compiled within {COMPILE_SECONDS:g} s; make it simpler"
            ) from None

    def matcher(self, constraint: Constraint) -> Matcher:
        """At its beginning. Compiles what `check` has not compiled, or what was not kept, whatever time it takes."""
        self._build()
        with self._lock:
            compiled = self._find(constraint)
        if compiled is None:
            self._keep(constraint, compiled := self._compile(constraint))
        return self._begin(compiled)

    def _begin(self, compiled: Any) -> Matcher:
        return Matcher(self._library.GrammarMatcher(compiled), self._filler)

    def _find(self, constraint: Constraint) -> Any:
        if constraint in self._kept:
            self._kept.move_to_end(constraint)
        return self._kept.get(constraint)

    def _keep(self, constraint: Constraint, compiled: Any) -> None:
        with self._lock:
            self._kept[constraint] = compiled
            while len(self._kept) > 1 and sum(one.memory_size_bytes for one in self._kept.values()) > KEPT_BYTES:
                self._kept.popitem(last=False)

    def _compile_for(self, constraint: Constraint, job: Future[Any]) -> None:
        try:
            compiled = self._compile(constraint)
            self._try(constraint, compiled)
            self._keep(constraint, compiled)
            job.set_result(None)
        except BaseException as error:
            job.set_exception(error)
        finally:
            with self._lock:
                del self._running[constraint]

    def _compile(self, constraint: Constraint) -> Any:
        try:
            match constraint.kind:
                case "json_schema":
                    return self._for_json.compile_json_schema(constraint.text, max_whitespace_cnt=WHITESPACE)
                case "json_object":
                    # The library's own JSON grammar bounds no whitespace.
                    return self._for_json.compile_json_schema('{"type": "object"}', max_whitespace_cnt=WHITESPACE)
                case "regex":
                    return self._for_text.compile_regex(constraint.text)
                case "grammar":
                    return self._for_text.compile_grammar(constraint.text)
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1].split("Check failed: ")[-1].split(".cc:")[-1]
            raise RequestError(f"SamplingParams.{constraint.kind}: {reason.split(': ', 1)[-1]:.300}") from None

    def _try(self, constraint: Constraint, compiled: Any) -> None:
        """Follows it for some tokens, another choice at each."""
        matcher = self._begin(compiled)
        for step in range(TRIED_STEPS):
            began = time.thread_time()
            allowed = allowed_tokens(Matcher.fill([matcher], self._vocab_size), self._vocab_size)[0].nonzero()
            if len(allowed) == 0:
                raise RequestError(
                    f"SamplingParams.{constraint.kind}: after {step} tokens no token of this model's vocabulary fits"
                )
            token_id = int(allowed[step * 7919 % len(allowed)])
            matcher.accept(token_id)
            if time.thread_time() - began > TRIED_SECONDS:
                raise RequestError(
                    f"SamplingParams.{constraint.kind}: a token takes longer than {1000 * TRIED_SECONDS:g} ms to "
                    "check; make it simpler (nested or long repetitions are the usual cause)"
                )
            if token_id in self._eos:
                return

    def _build(self) -> None:
        """The vocabulary takes a second, once."""
        with self._building:
            if self._for_json is not None:
                return
            try:
                import xgrammar
            except ImportError:
                raise RequestError(
                    "json_schema, regex, grammar and json_object need xgrammar: pip install 'moe-nvfp4[grammar]'"
                ) from None
            if not self._eos:
                raise RequestError("this checkpoint names no end-of-sequence token, which would end a grammar's answer")
            special = self._tokenizer.special_ids
            vocabulary = [
                b"" if token_id in special else self._tokenizer.token_bytes(token_id)
                for token_id in range(self._vocab_size)
            ]
            # Strings with a bound on their length take control characters as they are, which JSON does not.
            in_json = [b"" if CONTROL.search(token) else token for token in vocabulary]
            self._filler = xgrammar.BatchGrammarMatcher(max_threads=min(8, os.cpu_count() or 1))
            self._library = xgrammar
            self._for_text, self._for_json = (
                xgrammar.GrammarCompiler(
                    xgrammar.TokenizerInfo(tokens, vocab_size=self._vocab_size, stop_token_ids=self._eos),
                    max_threads=1,
                    cache_enabled=False,
                )
                for tokens in (vocabulary, in_json)
            )


def allowed_tokens(bits_RW: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """bool [R, V]"""
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=bits_RW.device)
    return ((bits_RW.view(torch.uint8)[:, :, None] & powers) != 0).flatten(1)[:, :vocab_size]
