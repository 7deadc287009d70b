"""Splits an answer that arrives in pieces into reasoning, content and tool calls. Nothing given out is taken back."""

from dataclasses import dataclass
from typing import Literal

from moe_nvfp4.generation import Increment
from moe_nvfp4.launch.http_dialects import Call, Dialect, Schemas

Kind = Literal["reasoning", "content"]


@dataclass(frozen=True, slots=True)
class Text:
    kind: Kind
    text: str


Part = Text | Call


class AnswerParser:
    """A call is given out when it is whole, and only if it is well formed and names a tool of the request; else its
    text is content. Reasoning loses the white space around it, content the white space before a call.

    `tools` None: no calls are looked for. `thinking`: the prompt has opened the reasoning already. `begun`: text of
    the answer that the prompt held already. `closing`: what its grammar left out at its end. Calls beyond `most_calls`
    are left out.
    """

    def __init__(
        self,
        dialect: Dialect,
        tools: Schemas | None,
        *,
        thinking: bool = False,
        begun: str = "",
        closing: str = "",
        most_calls: int | None = None,
    ):
        self._dialect, self._tools = dialect, tools if dialect.call else None
        self._state: Literal["reasoning", "content", "call"] = "reasoning" if thinking else "content"
        self._may_think = dialect.think is not None and not thinking
        self._held = ""  # may be the beginning of a mark
        self._space = ""  # white space that is dropped if a mark follows
        self._at_start = thinking
        self.calls, self._most_calls, self._closing = 0, most_calls, closing
        if begun:
            self.push(begun)

    @property
    def thinking(self) -> bool:
        return self._state == "reasoning"

    def read(self, increment: Increment) -> list[Part]:
        parts = self.push(increment.text)
        if increment.finish_reason:
            parts += self.finish(stopped=increment.finish_reason == "stop")
        return parts

    def push(self, text: str) -> list[Part]:
        self._held += text
        parts: list[Part] = []
        while self._advance(parts):
            pass
        return parts

    def finish(self, *, stopped: bool) -> list[Part]:
        """What was held back. `stopped`: the model ended the answer, so a call may lack its closing mark."""
        parts = self.push(self._closing) if stopped else []
        rest, self._held = self._held, ""
        if self._state == "call":
            self._end_call(rest, "", parts, complete=stopped)
        else:
            self._give(rest, parts)
        if self._space and self._state == "content" and not self.calls:
            parts.append(Text("content", self._space))
        return parts

    def _advance(self, parts: list[Part]) -> bool:
        """Takes the held text up to the next mark; False when there is none in it."""
        marks = self._marks()
        place, mark = min(((at, mark) for mark in marks if (at := self._held.find(mark)) >= 0), default=(-1, ""))
        if mark:
            before, self._held = self._held[:place], self._held[place + len(mark) :]
            self._pass(before, mark, parts)
            return True
        if self._state != "call":
            keep = max((_overlap(self._held, mark) for mark in marks), default=0)
            cut = len(self._held) - keep
            text, self._held = self._held[:cut], self._held[cut:]
            self._give(text, parts)
        return False

    def _marks(self) -> list[str]:
        """That end the present state."""
        think, call = self._dialect.think, self._dialect.call
        if self._state == "reasoning" and think:
            return [think[1]]
        if self._state == "call" and call:
            return [call.marks[1]]
        marks = [think[0]] if self._may_think and think else []
        return [*marks, call.marks[0]] if self._tools is not None and call else marks

    def _pass(self, before: str, mark: str, parts: list[Part]) -> None:
        if self._state == "call":
            self._end_call(before, mark, parts, complete=True)
            return
        self._give(before, parts)
        think = self._dialect.think
        if self._state == "reasoning":
            self._state, self._at_start, self._space = "content", True, ""
        elif think and mark == think[0] and self._may_think:
            self._state, self._may_think, self._at_start, self._space = "reasoning", False, True, ""
        elif think and mark == think[0]:  # content came before it: it is text
            self._give(mark, parts)
        else:
            self._state = "call"

    def _give(self, text: str, parts: list[Part]) -> None:
        if self._at_start:
            text = text.lstrip()
        if not text:
            return
        self._at_start = False
        kind: Kind = "reasoning" if self._state == "reasoning" else "content"
        if kind == "content" and not text.isspace():
            self._may_think = False
        if kind == "content" and self._tools is None:
            parts.append(Text(kind, text))
            return
        text = self._space + text
        bare = text.rstrip()
        self._space = text[len(bare) :]
        if bare:
            parts.append(Text(kind, bare))

    def _end_call(self, body: str, closing: str, parts: list[Part], *, complete: bool) -> None:
        self._state = "content"
        call = self._dialect.call
        assert call is not None and self._tools is not None
        found = call.read(body, self._tools) if complete else None
        if found is None:
            self._give(call.marks[0] + body + closing, parts)
            return
        self._space = ""
        self.calls += 1
        if self._most_calls is None or self.calls <= self._most_calls:
            parts.append(found)


def _overlap(text: str, mark: str) -> int:
    """How many characters of the mark's beginning end the text."""
    return next((size for size in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:size])), 0)
