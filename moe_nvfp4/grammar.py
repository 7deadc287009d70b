"""Answers that follow a JSON schema, a regular expression or a grammar: which tokens may come next.

Compiling is done by xgrammar (the extra `grammar`). It can take seconds, and a pattern can be built to take for ever.
So another process tries each new one first (grammar_pool.py), within a limit. What has been compiled is kept.

A special token is never part of an answer's text, so a grammar allows none, but for the end once it is complete.
"""

import importlib.util
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Final, NamedTuple

import torch

from moe_nvfp4.errors import RequestError
from moe_nvfp4.grammar_pool import WorkerPool
from moe_nvfp4.sampling import Constraint
from moe_nvfp4.tokenizer import Tokenizer

KEPT_BYTES: Final = 256 << 20  # of compiled grammars
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


class Compilers:
    """The library's, for one vocabulary: bytes of each token, none of a special one."""

    def __init__(self, vocabulary: Sequence[bytes], eos: Sequence[int]):
        import xgrammar

        self._library = xgrammar
        self._filler = xgrammar.BatchGrammarMatcher(max_threads=min(8, os.cpu_count() or 1))
        # Strings with a bound on their length take control characters as they are, which JSON does not.
        in_json = [b"" if CONTROL.search(token) else token for token in vocabulary]
        self._for_text, self._for_json = (
            xgrammar.GrammarCompiler(
                xgrammar.TokenizerInfo(tokens, vocab_size=len(tokens), stop_token_ids=list(eos)),
                max_threads=1,
                cache_enabled=False,
            )
            for tokens in (list(vocabulary), in_json)
        )

    def compile(self, constraint: Constraint) -> Any:
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

    def begin(self, compiled: Any) -> Matcher:
        return Matcher(self._library.GrammarMatcher(compiled), self._filler)


class Grammars:
    """Compiles for one vocabulary. Any thread may call."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: frozenset[int]):
        self._tokenizer, self._vocab_size, self._eos = tokenizer, vocab_size, sorted(eos_token_ids)
        self._lock, self._building = threading.Lock(), threading.Lock()
        self._kept: OrderedDict[Constraint, Any] = OrderedDict()  # the least recently used first
        self._running: dict[Constraint, Future[None]] = {}
        self._built: tuple[Compilers, WorkerPool] | None = None

    def check(self, constraint: Constraint) -> None:
        """Compiles it, if another process could do so in time."""
        with self._lock:
            if self._find(constraint) is not None:
                return
            job = self._running.get(constraint)
            if first := job is None:
                job = self._running[constraint] = Future()
        if first:
            self._check_for(constraint, job)
        job.result()

    def keeps(self, constraint: Constraint) -> bool:
        with self._lock:
            return constraint in self._kept

    def matcher(self, constraint: Constraint) -> Matcher:
        """At its beginning, of a grammar that was checked, here or at another rank: compiles it if it was not kept."""
        compilers, _ = self._build()
        with self._lock:
            compiled = self._find(constraint)
        if compiled is None:
            self._keep(constraint, compiled := compilers.compile(constraint))
        return compilers.begin(compiled)

    def close(self) -> None:
        """Ends the other processes. What is kept can still be followed."""
        with self._building:
            if self._built is not None:
                self._built[1].close()

    def _find(self, constraint: Constraint) -> Any:
        if constraint in self._kept:
            self._kept.move_to_end(constraint)
        return self._kept.get(constraint)

    def _keep(self, constraint: Constraint, compiled: Any) -> None:
        with self._lock:
            self._kept[constraint] = compiled
            while len(self._kept) > 1 and sum(one.memory_size_bytes for one in self._kept.values()) > KEPT_BYTES:
                self._kept.popitem(last=False)

    def _check_for(self, constraint: Constraint, job: Future[None]) -> None:
        """For all that wait for it."""
        try:
            compilers, pool = self._build()
            pool.try_out(constraint)
            self._keep(constraint, compilers.compile(constraint))
            job.set_result(None)
        except BaseException as error:
            job.set_exception(error)
        finally:
            with self._lock:
                del self._running[constraint]

    def _build(self) -> tuple[Compilers, WorkerPool]:
        """The vocabulary takes a second, once."""
        with self._building:
            if self._built is None:
                if importlib.util.find_spec("xgrammar") is None:
                    raise RequestError(
                        "json_schema, regex, grammar and json_object need xgrammar: pip install 'moe-nvfp4[grammar]'"
                    )
                if not self._eos:
                    raise RequestError(
                        "this checkpoint names no end-of-sequence token, which would end a grammar's answer"
                    )
                special = self._tokenizer.special_ids
                vocabulary = [
                    b"" if token_id in special else self._tokenizer.token_bytes(token_id)
                    for token_id in range(self._vocab_size)
                ]
                self._built = Compilers(vocabulary, self._eos), WorkerPool(vocabulary, self._eos)
            return self._built


def allowed_tokens(bits_RW: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """bool [R, V]"""
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=bits_RW.device)
    return ((bits_RW.view(torch.uint8)[:, :, None] & powers) != 0).flatten(1)[:, :vocab_size]
