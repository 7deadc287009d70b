"""Text to token ids and back, with the tokenizer and the chat template that lie beside a checkpoint."""

import inspect
import json
import re
import reprlib
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from moe_nvfp4.errors import CheckpointError, RequestError

CONFIG_FILE = "tokenizer_config.json"
# Each set of files holds a vocabulary on its own.
VOCABULARIES = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("tokenizer.model",),
    ("tiktoken.model",),
    ("vocab.txt",),
)
JSON_FILES = ("tokenizer.json", CONFIG_FILE, "special_tokens_map.json", "added_tokens.json", "vocab.json")


class Tokenizer:
    """A transformers tokenizer, read from a local folder; code that a checkpoint brings is never run."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer | None":
        """The tokenizer in `folder`, or None if none of its files is there."""
        folder = Path(folder)
        vocabulary = next((names for names in VOCABULARIES if _has_files(folder, names)), None)
        if vocabulary is None and not (folder / CONFIG_FILE).is_file():
            return None
        if vocabulary is None:
            # transformers builds some classes without a vocabulary and then encodes all text to nothing.
            raise CheckpointError(
                f"{folder / CONFIG_FILE}: got a tokenizer config without a vocabulary; expected "
                "tokenizer.json beside it. Download that file from the same checkpoint, or remove the config "
                "to work with token ids only"
            )
        from transformers import AutoTokenizer  # seconds to import, and token ids need none of it

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # a damaged file can raise anything, in Rust as in Python
            name, reason = _diagnose(folder, vocabulary, error)
            raise CheckpointError(
                f"{folder / name}: the tokenizer cannot be read: {reason}. Download the tokenizer files of "
                "this checkpoint again, or remove them to work with token ids only"
            ) from error
        return cls(tokenizer)

    @property
    def eos_token_id(self) -> int | None:
        token_id: int | None = self._tokenizer.eos_token_id
        return token_id

    @property
    def vocab_size(self) -> int:
        """Tokens that can be decoded, added ones included; a model's logits are often padded beyond it."""
        return len(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with the special tokens that this tokenizer adds by default."""
        _check_text("prompt", text)
        return list(self._tokenizer.encode(text, verbose=False))

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_arguments: Mapping[str, Any] | None = None,
        begun: str = "",
    ) -> list[int]:
        """Token ids of a conversation in the model's chat template, up to where the assistant speaks, and what it has
        `begun` to say, special tokens included.

        Content is a string or a list of text parts as in the OpenAI API; parts are joined by newlines.
        `template_arguments` are variables that the template knows, such as enable_thinking.

        A special token comes from the template only. Where its text stands in messages, tools or arguments, it is
        encoded as text, so nobody can write another role's turn into a message.
        """
        conversation = _checked_messages(messages)
        _check_tools(tools)
        arguments = dict(template_arguments or {})
        own = {"messages", *inspect.signature(self._tokenizer.apply_chat_template).parameters}
        if taken := sorted(own & arguments.keys()):
            raise RequestError(f"template arguments: {taken[0]!r} is set by the caller's other arguments; leave it out")
        if not self._tokenizer.chat_template:
            raise RequestError(
                "messages: this checkpoint has no chat template; send a plain prompt instead, or put the "
                "model's chat_template.jinja into the checkpoint folder"
            )
        split = secrets.token_hex(16)  # a mark that nobody can have written
        try:
            text = self._tokenizer.apply_chat_template(
                self._split_special(conversation, split),
                tools=None if tools is None else self._split_special([dict(tool) for tool in tools], split),
                add_generation_prompt=True,
                tokenize=False,
                **self._split_special(arguments, split),
            )
        except Exception as error:  # templates reject with their own error types, or trip over missing keys
            reason = f"{type(error).__name__}: {error}".replace(split, "")
            raise RequestError(
                f"messages: the chat template rejected the conversation: {reason}. "
                "Check the roles, their order and the fields of each message against the model's card"
            ) from error
        _check_text("messages", text)
        pieces = [
            self._tokenizer.encode(piece, add_special_tokens=False, verbose=False)
            for piece in (text + begun).split(split)
        ]
        return [int(token_id) for piece in pieces for token_id in piece]

    def _split_special(self, value: Any, split: str) -> Any:
        """The value with `split` behind the first character of each special token in its strings."""
        if isinstance(value, str):
            return self._special.sub(lambda found: found[0] + split, value) if self._special else value
        if isinstance(value, Mapping):
            return {self._split_special(key, split): self._split_special(part, split) for key, part in value.items()}
        return [self._split_special(part, split) for part in value] if _is_list(value) else value

    @cached_property
    def _special(self) -> re.Pattern[str] | None:
        """The first character of any special token; tokens that overlap are all found."""
        tokens = {token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special}
        tokens |= set(self._tokenizer.all_special_tokens)
        return re.compile(f"(?=(?:{'|'.join(map(re.escape, sorted(tokens)))})).", re.DOTALL) if tokens else None

    @property
    def chat_template(self) -> str:
        """The template that `encode_chat` uses without tools; "" if there is none."""
        template = self._tokenizer.chat_template
        return template if isinstance(template, str) else str(template or "")

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for; a byte-level token may be part of a character. b"" beyond the vocabulary."""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            return b""
        if token_id in self._added:
            return str(token).encode()
        if self._is_byte_level:
            return bytes(BYTES_OF[character] for character in token if character in BYTES_OF)
        if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
            return bytes.fromhex(byte[1])
        return str(token).replace("\u2581", " ").encode()

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are never part of an answer's text."""
        added = self._tokenizer.added_tokens_decoder.items()
        return frozenset(self._tokenizer.all_special_ids) | {token_id for token_id, token in added if token.special}

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._tokenizer.added_tokens_decoder)

    @cached_property
    def _is_byte_level(self) -> bool:
        return "ByteLevel" in repr(getattr(getattr(self._tokenizer, "backend_tokenizer", None), "decoder", None))

    def pieces(self, skip_special_tokens: bool) -> Mapping[int, str] | None:
        """Texts of single tokens, if the text of several is theirs in a row wherever they hold whole characters; None
        if the decoder looks at a token's neighbours, as one that strips the first space does."""
        return self._pieces[skip_special_tokens] if self._adds_up else None

    @cached_property
    def _pieces(self) -> "tuple[Pieces, Pieces]":
        return Pieces(self, False), Pieces(self, True)

    @cached_property
    def _adds_up(self) -> bool:
        decoder = getattr(getattr(self._tokenizer, "backend_tokenizer", None), "decoder", None)
        if decoder is None:
            return False
        found = json.loads(decoder.__getstate__())
        kinds = [part["type"] for part in found.get("decoders", [found])]
        return kinds in (["ByteLevel"], ["Replace", "ByteFallback", "Fuse"])

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; ids beyond the vocabulary give nothing."""
        # Clean-up would delete spaces that the model wrote (before "." or "n't"), and differ when streamed.
        text: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text


class Pieces(dict[int, str]):
    """Text of each token by itself, decoded when it is first asked for."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool):
        super().__init__()
        self._tokenizer, self._skip = tokenizer, skip_special_tokens

    def __missing__(self, token_id: int) -> str:
        text = self[token_id] = self._tokenizer.decode([token_id], self._skip)
        return text


def _byte_alphabet() -> dict[str, int]:
    """Byte-level vocabularies write a byte as a printable character: itself, or the next free one from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


BYTES_OF = _byte_alphabet()


def _has_files(folder: Path, names: Sequence[str]) -> bool:
    return all((folder / name).is_file() for name in names)


def _diagnose(folder: Path, vocabulary: Sequence[str], error: Exception) -> tuple[str, str]:
    """The file that is to blame, as far as can be told, and why."""
    for path in (folder / name for name in JSON_FILES):
        try:
            if path.is_file() and not isinstance(json.loads(path.read_bytes()), dict):
                return path.name, "got JSON that is not an object"
        except (ValueError, RecursionError, OSError) as broken:
            return path.name, f"got damaged JSON ({broken})"
    try:
        (folder / "chat_template.jinja").read_text("utf-8")
    except FileNotFoundError:
        pass
    except (ValueError, OSError) as broken:
        return "chat_template.jinja", str(broken)
    if "trust_remote_code" in str(error):
        return CONFIG_FILE, "it needs code that the checkpoint brings, which is never run"
    return vocabulary[0], f"{type(error).__name__}: {error}".rstrip(".")


def _check_text(where: str, text: object) -> None:
    if not isinstance(text, str):
        raise RequestError(f"{where}: got {reprlib.repr(text)}; expected a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{where}: got a lone surrogate at character {error.start}; expected text that UTF-8 can encode. "
            "Decode the text with errors='replace' first"
        ) from None


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _checked_messages(messages: object) -> list[dict[str, Any]]:
    if not isinstance(messages, Sequence) or not _is_list(messages) or not messages:
        raise RequestError(
            f"messages: got {reprlib.repr(messages)}; expected a non-empty list such as "
            '[{"role": "user", "content": "Hello"}]'
        )
    return [_checked_message(f"messages[{index}]", message) for index, message in enumerate(messages)]


def _checked_message(where: str, message: object) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where}: got {reprlib.repr(message)}; expected a mapping with role and content")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise RequestError(f'{where}.role: got {reprlib.repr(role)}; expected a string such as "user"')
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""  # the OpenAI API allows an assistant message of tool calls alone
    elif isinstance(content, Sequence) and _is_list(content):
        content = "\n".join(_part_text(f"{where}.content[{i}]", part) for i, part in enumerate(content))
    _check_text(f"{where}.content", content)
    return {**message, "content": content}


def _part_text(where: str, part: object) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise RequestError(f'{where}: got {reprlib.repr(part)}; expected {{"type": "text", "text": ...}}')


def _check_tools(tools: object) -> None:
    if tools is None:
        return
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RequestError(f"tools: got {reprlib.repr(tools)}; expected a list of JSON-schema mappings")
