"""Token ids to text while they arrive, and the search for stop strings in that text."""

from collections.abc import Mapping
from typing import Protocol

REPLACEMENT = "\ufffd"
# A UTF-8 character has at most 4 bytes and a token at least one, so an unfinished character spans at most
# 3 tokens, and the last 4 tokens always hold the start of the last character.
MAX_UNFINISHED = 3
WINDOW = 4


class Decoder(Protocol):
    def decode(self, ids: list[int], skip_special_tokens: bool = True, /) -> str: ...


class IncrementalDetokenizer:
    """Turns one sequence's tokens into text that never has to be taken back.

    What `push` and `finish` return adds up to `decode` of all the tokens, cut before the first stop string.
    First means the earliest start: where an earlier but still unfinished stop string overlaps a finished one,
    `stopped` waits for the next characters. Exact for byte-level tokenizers; with a byte-fallback one
    (SentencePiece), invalid UTF-8 may show fewer replacement characters than `decode` gives.

    `pieces`: texts of single tokens, of a tokenizer whose texts add up. A token of whole characters after another
    such is then looked up: decoding windows of tokens takes 15 times as long.
    """

    def __init__(
        self,
        tokenizer: Decoder,
        stop: tuple[str, ...] = (),
        *,
        skip_special_tokens: bool = True,
        pieces: Mapping[int, str] | None = None,
    ) -> None:
        self.stopped: str | None = None
        self._tokenizer, self._skip, self._pieces = tokenizer, skip_special_tokens, pieces
        self._search = _StopSearch(stop)
        self._window: list[int] = []  # the last tokens: some already shown as context, then the new ones
        self._shown = ""  # the part of decode(window) that was passed on
        self._text = ""  # decode(window)
        self._unfinished = 0  # tokens in the window whose text is not settled

    def push(self, token_id: int) -> str:
        """The text that is safe to show after this token; "" once a stop string was found."""
        if self.stopped is not None:
            return ""
        if self._pieces is None or self._unfinished or REPLACEMENT in (text := self._pieces[token_id]):
            text = self._settle(token_id)
        elif self._window:
            self._window, self._text, self._shown = [], "", ""
        return self._cut(text, last=False) if text else ""

    def finish(self) -> str:
        """What was held back; call once, after the last token."""
        if self.stopped is not None:
            return ""
        rest = self._text[len(self._shown) :]
        self._window, self._text, self._shown = [], "", ""
        return self._cut(rest, last=True)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, self._skip)

    def _cut(self, text: str, last: bool) -> str:
        text, self.stopped = self._search.push(text, last)
        return text

    def _settle(self, token_id: int) -> str:
        window = [*self._window, token_id]
        text = self._decode(window)
        if text == self._text and (text or len(window) > WINDOW) and not self._decode([token_id]):
            return ""  # a token without text, such as a skipped special one: not part of any character
        self._window = window
        self._unfinished += 1
        if not text.endswith(REPLACEMENT):
            return self._advance(text, text, self._unfinished)
        if self._unfinished <= MAX_UNFINISHED:
            self._text = text
            return ""
        # No valid character is this long. Only the last replacement can still become a character.
        return self._advance(text, text[:-1], WINDOW)

    def _advance(self, text: str, settled: str, keep: int) -> str:
        """Pass on `settled` beyond what was shown, and keep the last tokens as context for the next."""
        if settled.startswith(self._shown):
            new = settled[len(self._shown) :]
        else:  # a byte-fallback decoder took back valid text because of an invalid byte after it
            tail = text[len(settled) :]
            new = self._decode(self._window[-self._unfinished :]).removesuffix(tail)
        # Nothing shown yet: some decoders strip the first space, so the very first tokens stay as context.
        self._window = self._window[-(min(keep, WINDOW) if text else WINDOW) :]
        self._text = self._decode(self._window)
        self._shown = self._text
        self._unfinished = 0
        if len(settled) < len(text):
            self._shown = self._text.removesuffix(REPLACEMENT)
            self._unfinished = MAX_UNFINISHED
        return new


class _StopSearch:
    """Finds the stop string with the earliest start (the longest of those) in text that comes in pieces.

    One Knuth-Morris-Pratt automaton per stop string, so that the work per character does not depend on the
    lengths of the strings.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._failure = [_failure_table(string) for string in stop]
        self._matched = [0] * len(stop)  # how many characters of each stop string end the text so far
        self._held = ""
        self._seen = 0
        self._best: tuple[int, int] | None = None  # start and minus length of the best finished match
        self._best_string: str | None = None

    def push(self, text: str, last: bool) -> tuple[str, str | None]:
        """The text that can be shown, and the stop string if the search is over."""
        if not self._stop:
            return text, None
        held_from = self._seen - len(self._held)
        self._held += text
        for character in text:
            self._seen += 1
            for index in range(len(self._stop)):
                self._step(index, character)
        alive = self._seen if last else self._seen - max(self._matched)
        start, found = alive, None
        if self._best is not None and self._best[0] <= alive:
            start, found = self._best[0], self._best_string
        shown, self._held = self._held[: start - held_from], self._held[start - held_from :]
        return shown, found

    def _step(self, index: int, character: str) -> None:
        string, failure, matched = self._stop[index], self._failure[index], self._matched[index]
        while matched and string[matched] != character:
            matched = failure[matched]
        if string[matched] == character:
            matched += 1
        if matched == len(string):
            match = (self._seen - matched, -matched)
            if self._best is None or match < self._best:
                self._best, self._best_string = match, string
            matched = failure[matched]
        self._matched[index] = matched


def _failure_table(string: str) -> list[int]:
    """For each prefix length, the length of its longest proper prefix that is also its suffix."""
    table = [0] * (len(string) + 1)
    length = 0
    for position in range(1, len(string)):
        while length and string[position] != string[length]:
            length = table[length]
        length += string[position] == string[length]
        table[position + 1] = length
    return table
