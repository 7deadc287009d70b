import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

import moe_nvfp4.detokenize
from moe_nvfp4.detokenize import Decoder, IncrementalDetokenizer
from moe_nvfp4.tokenizer import Tokenizer

SPECIAL = 1022
loaded = Tokenizer.load(Path(moe_nvfp4.detokenize.__file__).parent / "demo")
assert loaded is not None
DEMO = loaded


class Bytes:
    """Byte-level: each token is a few raw bytes; b"" stands for a skipped special token."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self.tokens = tokens

    def decode(self, ids: list[int], skip_special_tokens: bool = True, /) -> str:
        return _lossy(b"".join(self.tokens[token_id] for token_id in ids))


def _lossy(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")


class ByteFallback:
    """SentencePiece-like: a run of byte tokens is text, or one U+FFFD per byte; one leading space goes."""

    def __init__(self, tokens: Sequence[str | int]) -> None:
        self.tokens = tokens

    def decode(self, ids: list[int], skip_special_tokens: bool = True, /) -> str:
        text, run = "", b""
        for token_id in [*ids, None]:
            token = "" if token_id is None else self.tokens[token_id]
            if isinstance(token, int):
                run += bytes([token])
                continue
            try:
                text += run.decode("utf-8")
            except UnicodeDecodeError:
                text += "\ufffd" * len(run)
            text, run = text + token, b""
        return text.removeprefix(" ")


def cut(text: str, stop: tuple[str, ...]) -> str:
    return text[: min((at for at in (text.find(string) for string in stop) if at >= 0), default=len(text))]


def check(tokenizer: Decoder, ids: list[int], stop: tuple[str, ...] = ()) -> IncrementalDetokenizer:
    """Everything that must hold for any ids: the sum, and that what was shown is never more than it; with texts of
    single tokens and without."""
    if isinstance(tokenizer, Bytes):
        check_once(tokenizer, ids, stop, {token_id: tokenizer.decode([token_id]) for token_id in ids})
    elif isinstance(tokenizer, Tokenizer):
        check_once(tokenizer, ids, stop, tokenizer.pieces(True))
    return check_once(tokenizer, ids, stop, None)


def check_once(
    tokenizer: Decoder, ids: list[int], stop: tuple[str, ...], pieces: Mapping[int, str] | None
) -> IncrementalDetokenizer:
    detokenizer = IncrementalDetokenizer(tokenizer, stop, pieces=pieces)
    expected = cut(tokenizer.decode(ids), stop)
    shown = ""
    for count, token_id in enumerate(ids):
        shown += detokenizer.push(token_id)
        assert expected.startswith(shown), f"took back text after {count + 1} tokens"
    shown += detokenizer.finish()
    assert shown == expected
    assert (detokenizer.stopped is not None) == any(string in tokenizer.decode(ids) for string in stop)
    assert detokenizer.stopped is None or tokenizer.decode(ids).startswith(detokenizer.stopped, len(expected))
    return detokenizer


TEXT = st.text(st.sampled_from("ab \n\u00e9\u20ac\U0001f600\u0301"), max_size=12)
STOPS = st.lists(st.text(st.sampled_from("ab\u00e9\u20ac\U0001f600"), min_size=1, max_size=4), max_size=4).map(tuple)


@given(st.text(max_size=40), st.lists(st.text(min_size=1, max_size=3), max_size=3).map(tuple))
@settings(max_examples=150, deadline=None)
def test_any_text(text: str, stop: tuple[str, ...]) -> None:
    check(DEMO, DEMO.encode(text), stop)


@given(TEXT, TEXT, STOPS)
@settings(max_examples=200, deadline=None)
def test_stop_strings_in_text(before: str, after: str, stop: tuple[str, ...]) -> None:
    check(DEMO, DEMO.encode(before + "".join(stop[:1]) + after), stop)


@given(st.lists(st.integers(0, 1100), max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_ids(ids: list[int]) -> None:
    check(DEMO, ids)


@given(st.lists(st.integers(90, 260) | st.sampled_from([SPECIAL, 5000]), max_size=60), STOPS)
@settings(max_examples=200, deadline=None)
def test_mostly_broken_bytes(ids: list[int], stop: tuple[str, ...]) -> None:
    check(DEMO, ids, stop)


# Pieces that straddle characters, which merges over runs of emoji do make.
STRADDLING = [
    *(b"", b"a", b"ab", b"\xf0", b"\x9f", b"\x98", b"\x80", b"\xe2\x82", b"\xac", b"\xf0\x9f\x98"),
    *(b"\x80\xf0\x9f", b"\x98\x80\xf0\x9f", b"\xef\xbf\xbd", b"\xc3\xa9", b"\xac\xe2\x82", b"\xed\xa0"),
]
PIECES = st.lists(st.binary(max_size=5) | st.sampled_from(STRADDLING), max_size=30)


@given(PIECES, STOPS)
@example([b"\xf0\x9f", *[b"\x98\x80\xf0\x9f"] * 12, b"\x98\x80"], ())
@example([b"\xf0\x9f", b"", b"", b"", b"", b"", b"", b"\x98", b"\x80"], ())
@example([b"a", b"\xf0\x9f", *[b""] * 9, b"\x98\x80"], ("a\U0001f600",))
@example([b"ab", b"\xf0", b"a"], ("b\ufffd",))
@settings(max_examples=600, deadline=None)
def test_any_byte_tokens(pieces: list[bytes], stop: tuple[str, ...]) -> None:
    check(Bytes(pieces), list(range(len(pieces))), stop)


@given(
    st.lists(st.sampled_from(["", " ", " a", "b", "\u00e9", "\U0001f600", "\u20ac\u20ac"]), max_size=20),
    STOPS,
)
@example(["", " ", "", "", " a"], ())
@example([" ", "", "", "", "", "", "", " a"], ())
@settings(max_examples=300, deadline=None)
def test_byte_fallback(words: list[str], stop: tuple[str, ...]) -> None:
    tokens: list[str | int] = []
    for word in words:
        tokens.extend([word] if word.isascii() else word.encode())
    check(ByteFallback(tokens), list(range(len(tokens))), stop)


@pytest.mark.parametrize(
    ("decoder", "adds_up"),
    [
        (decoders.ByteLevel(), True),
        (decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]), True),
        (
            decoders.Sequence(
                [
                    decoders.Replace("\u2581", " "),
                    decoders.ByteFallback(),
                    decoders.Fuse(),
                    decoders.Strip(" ", 1, 0),
                ]
            ),
            False,
        ),
        (decoders.Metaspace(), False),
        (decoders.WordPiece(), False),
        (None, False),
    ],
)
def test_which_texts_of_tokens_add_up(decoder: Any, adds_up: bool) -> None:
    vocabulary = {"\u2581a": 0, "b": 1, "<0xC3>": 2, "<0xA9>": 3, "<0x0A>": 4, "\u2581": 5}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    if decoder is not None:
        backend.decoder = decoder
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert (tokenizer.pieces(True) is not None) == adds_up
    if adds_up and "ByteFallback" in repr(decoder):
        for ids in product(range(6), repeat=4):
            if "\ufffd" not in tokenizer.decode(ids):
                check_once(tokenizer, list(ids), (), tokenizer.pieces(True))


@given(st.lists(st.integers(0x7E, 0xFF) | st.sampled_from(["a", " ", ""]), max_size=40))
@settings(max_examples=200, deadline=None)
def test_broken_byte_fallback_loses_no_letters(tokens: list[str | int]) -> None:
    tokenizer = ByteFallback(["x", *tokens])
    detokenizer = IncrementalDetokenizer(tokenizer)
    shown = "".join(detokenizer.push(token_id) for token_id in range(len(tokens) + 1)) + detokenizer.finish()
    assert [c for c in shown if c in "xa"] == [c for c in tokenizer.decode(list(range(len(tokens) + 1))) if c in "xa"]


@given(
    st.lists(st.text(st.sampled_from("ab"), min_size=1, max_size=3), max_size=15),
    st.lists(st.text(st.sampled_from("ab"), min_size=1, max_size=6), max_size=4).map(tuple),
)
@settings(max_examples=600, deadline=None)
def test_overlapping_stop_strings(words: list[str], stop: tuple[str, ...]) -> None:
    check(Bytes([word.encode() for word in words]), list(range(len(words))), stop)


def run(words: list[str], stop: tuple[str, ...]) -> tuple[list[str], str, str | None]:
    detokenizer = IncrementalDetokenizer(Bytes([word.encode() for word in words]), stop)
    pushed = [detokenizer.push(token_id) for token_id in range(len(words))]
    return pushed, detokenizer.finish(), detokenizer.stopped


def test_holds_back_only_what_could_be_a_stop_string() -> None:
    assert run(["x<", "/", "y", "</", "s>", "z"], ("</s>",)) == (["x", "", "</y", "", "", ""], "", "</s>")
    assert run(["ab<", "/"], ("</s>",)) == (["ab", ""], "</", None)


def test_longest_of_equal_starts_and_earliest_of_all() -> None:
    assert run(["xabc"], ("ab", "abc", "b")) == (["x"], "", "abc")
    assert run(["xab", "c"], ("ab", "abc")) == (["x", ""], "", "ab")
    assert run(["<end>"], ("end", "<end>")) == ([""], "", "<end>")
    # "end" is complete first, but "<end>" starts earlier: wait one token rather than show "<".
    assert run(["<", "end", ">"], ("end", "<end>")) == (["", "", ""], "", "<end>")
    assert run(["<", "end", "s"], ("end", "<end>")) == (["", "", "<"], "", "end")
    assert run(["<", "end"], ("end", "<end>")) == (["", ""], "<", "end")


def test_replacement_character_as_stop_string() -> None:
    detokenizer = IncrementalDetokenizer(Bytes([b"a", b"\xff", b"b"]), ("\ufffd",))
    assert [detokenizer.push(token_id) for token_id in range(3)] == ["a", "", ""]
    assert (detokenizer.stopped, detokenizer.finish()) == ("\ufffd", "")


def test_character_appears_with_its_last_byte() -> None:
    tokenizer = Bytes([bytes([byte]) for byte in "a\U0001f600\u00e9".encode()])
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert [detokenizer.push(token_id) for token_id in range(7)] == [
        "a",
        "",
        "",
        "",
        "\U0001f600",
        "",
        "\u00e9",
    ]
    assert detokenizer.finish() == ""


def test_unfinished_character_is_flushed() -> None:
    detokenizer = IncrementalDetokenizer(Bytes([b"a", b"\xf0\x9f"]))
    assert [detokenizer.push(0), detokenizer.push(1), detokenizer.finish()] == ["a", "", "\ufffd"]


def test_endless_garbage_keeps_flowing() -> None:
    detokenizer = IncrementalDetokenizer(Bytes([b"\xff"]))
    pushed = [detokenizer.push(0) for _ in range(100)]
    assert len("".join(pushed)) >= 99
    assert len("".join(pushed) + detokenizer.finish()) == 100


@pytest.mark.parametrize("token", [b"word", b"\xff", b"", b"\x98\x80\xf0\x9f", b"\xf0"])
def test_work_per_token_is_bounded(token: bytes) -> None:
    longest = 0

    class Counting(Bytes):
        def decode(self, ids: list[int], skip_special_tokens: bool = True, /) -> str:
            nonlocal longest
            longest = max(longest, len(ids))
            return super().decode(ids)

    detokenizer = IncrementalDetokenizer(Counting([token]), ("never this",))
    for _ in range(1000):
        detokenizer.push(0)
    assert longest <= 9


def test_long_stop_strings_cost_nothing_extra() -> None:
    words = ["a" * 50] * 400
    stop = tuple("a" * 50_000 + str(index) for index in range(16))
    start = time.perf_counter()
    assert "".join(run(words, stop)[0]) == ""
    # 320,000 automaton steps take some 0.1 s; comparing every suffix would take minutes.
    assert time.perf_counter() - start < 10


def test_special_tokens_can_be_kept() -> None:
    ids = [*DEMO.encode("a"), SPECIAL, *DEMO.encode("b é")]
    for skip, expected in ((True, "ab é"), (False, "a<|im_start|>b é")) * 2:
        detokenizer = IncrementalDetokenizer(DEMO, skip_special_tokens=skip, pieces=DEMO.pieces(skip))
        assert "".join([*map(detokenizer.push, ids), detokenizer.finish()]) == expected
