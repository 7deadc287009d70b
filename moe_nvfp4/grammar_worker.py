"""The process that tries grammars out for grammar_pool.py: a pattern can be built to take for ever, or all memory.

It reads the vocabulary, then one grammar a line, and says of each why it is refused, if it is. A grammar that has been
compiled here compiles elsewhere as well, in the same time: to send what was compiled takes longer (xgrammar 0.2.8, a
schema that compiles in 1.7 s: 5 s to write 86 MB of JSON, 1.5 s to read them).

xgrammar imports torch and transformers, some seconds; the process ends when its input does.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

from moe_nvfp4.errors import RequestError
from moe_nvfp4.grammar import Compilers, Matcher, allowed_tokens
from moe_nvfp4.sampling import Constraint

TRIED_STEPS: Final = 64
TRIED_SECONDS: Final = 0.02  # of the processor for a step; a usual one takes some 10 µs
TOO_LARGE: Final = "SamplingParams.{}: it takes too much memory to compile; make it simpler"
LATE_SECONDS: Final = 2.0  # after which the process ends itself, if nobody else has ended it


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the parent, which may go on for a while
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what a library prints is no answer
    opening = json.loads(sys.stdin.buffer.readline())
    vocabulary = [sys.stdin.buffer.read(size) for size in opening["sizes"]]
    trial = Trial(vocabulary, opening["eos"])
    answers.write("{}\n")
    while line := sys.stdin.buffer.readline():
        job = json.loads(line)
        limit_memory(job["bytes"])
        signal.setitimer(
            signal.ITIMER_REAL, job["seconds"] + LATE_SECONDS
        )  # its signal ends also a loop in the library
        refused = trial.refusal(Constraint(job["kind"], job["text"]))
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(json.dumps({"refused": refused}) + "\n")


class Trial:
    def __init__(self, vocabulary: Sequence[bytes], eos: Sequence[int]):
        self._compilers, self._vocab_size, self._eos = Compilers(vocabulary, eos), len(vocabulary), eos

    def refusal(self, constraint: Constraint) -> str | None:
        try:
            self._follow(constraint, self._compilers.compile(constraint))
        except RequestError as error:
            return TOO_LARGE.format(constraint.kind) if "bad_alloc" in str(error) else str(error)
        except MemoryError:
            return TOO_LARGE.format(constraint.kind)
        return None

    def _follow(self, constraint: Constraint, compiled: Any) -> None:
        """For some tokens, another choice at each: some patterns are quick to compile and slow to follow, and those
        would hold up everybody's steps."""
        matcher = self._compilers.begin(compiled)
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


def limit_memory(more: int) -> None:
    """From here on so many bytes more of address space, on Linux. What goes beyond ends the process."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            held = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + more, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
    main()
