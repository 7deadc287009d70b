"""What an operator sets for the HTTP server: limits, times and keys."""

from dataclasses import dataclass, field

from moe_nvfp4.errors import RequestError


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """Times are in seconds.

    api_keys: with any, requests to /v1 need one of them as a bearer token.
    max_body_bytes, body_seconds: a request body beyond them is refused before it is parsed.
    request_seconds: an answer that takes longer, waiting included, fails.
    stream_buffer: increments that wait for a slow reader; with more, its request is cancelled.
    drain_seconds: how long running requests may go on after SIGTERM.
    ready_interval: /ready wants a token decoded within it; in an idle server it decodes one.
    keep_alive: a stream that has nothing to send sends a comment so often.
    """

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    max_body_bytes: int = 8 * 2**20
    body_seconds: float = 30.0
    max_prompts: int = 128
    max_choices: int = 16
    max_stop_strings: int = 16
    max_stop_characters: int = 1024
    max_tools: int = 128
    request_seconds: float = 1800.0
    stream_buffer: int = 2048
    drain_seconds: float = 30.0
    ready_interval: float = 10.0
    keep_alive: float = 15.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if name != "api_keys" and not value > 0:
                raise RequestError(f"ServerSettings.{name}: got {value!r}; expected a positive number")
        if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in self.api_keys):
            raise RequestError("api keys: one is empty or has spaces or unusual characters; write printable ASCII")
