"""What all endpoints do with a request's increments: events while they come, or one answer at the end."""

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from fastapi import Request, Response

from moe_nvfp4.generation import Increment, TokenLogprob
from moe_nvfp4.launch.http_errors import ApiError, api_error, json_response
from moe_nvfp4.launch.http_guard import Record, record_of
from moe_nvfp4.launch.http_models import ServedModel
from moe_nvfp4.launch.http_schemas import SamplingRequest
from moe_nvfp4.launch.http_server import Server
from moe_nvfp4.launch.http_stream import ClientGone, EventStream, Relay, compact, event, while_connected
from moe_nvfp4.sampling import SamplingParams
from moe_nvfp4.tokenizer import Tokenizer

PATIENCE = 0.05  # seconds in which a refusal by the engine still becomes a status instead of an event


class Reply(ABC):
    """The answers to one request in the making. Subclasses have the forms of the API."""

    prefix: ClassVar[str]

    def __init__(self, model: str, prompts: Sequence[Sequence[int]]):
        self._id, self._created, self._model = f"{self.prefix}{secrets.token_hex(12)}", int(time.time()), model
        self.prompt_tokens, self.new_tokens = sum(map(len, prompts)), 0
        self.reused_tokens = self.reasoning_tokens = 0
        self.usage_wanted = False  # in a stream

    @abstractmethod
    def opening(self) -> list[dict[str, Any]]:
        """What a stream begins with, before any token."""

    @abstractmethod
    def push(self, increment: Increment) -> list[dict[str, Any]]:
        """What an increment adds to a stream."""

    @abstractmethod
    def event(self, data: dict[str, Any]) -> str:
        """One thing of `opening` or `push` as it is sent."""

    @abstractmethod
    def ending(self) -> str:
        """What a stream ends with when all answers are complete."""

    @abstractmethod
    def failure(self, error: ApiError) -> str:
        """What a stream ends with when they are not."""

    @abstractmethod
    def whole(self) -> dict[str, Any]:
        """All answers, complete."""

    def count(self, increment: Increment) -> None:
        self.new_tokens += len(increment.token_ids)
        if increment.completion is not None and increment.choice == 0:
            self.reused_tokens += increment.completion.timing.reused_tokens


class ChoicesReply(Reply):
    """Numbered choices, as completions and chat have them. A stream is chunks, with no choice or one."""

    whole_name: ClassVar[str]
    chunk_name: ClassVar[str]

    def __init__(self, model: str, prompts: Sequence[Sequence[int]]):
        super().__init__(model, prompts)
        self._head = f'data: {compact(self._envelope(self.chunk_name))[:-1]},"choices":['

    @abstractmethod
    def choices(self) -> list[dict[str, Any]]:
        """All answers, complete."""

    def event(self, data: dict[str, Any]) -> str:
        # With usage wanted, the API has the field in every chunk, and null in all but the last.
        no_usage = ',"usage":null' if self.usage_wanted else ""
        return f"{self._head}{compact(data)}]{no_usage}}}\n\n"

    def ending(self) -> str:
        usage = f'{self._head}],"usage":{compact(self._usage())}}}\n\n' if self.usage_wanted else ""
        return f"{usage}data: [DONE]\n\n"

    def failure(self, error: ApiError) -> str:
        return event(error.body)

    def whole(self) -> dict[str, Any]:
        return self._envelope(self.whole_name) | {"choices": self.choices(), "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.new_tokens,
            "total_tokens": self.prompt_tokens + self.new_tokens,
            "prompt_tokens_details": {"cached_tokens": self.reused_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }

    def _envelope(self, name: str) -> dict[str, Any]:
        return {"id": self._id, "object": name, "created": self._created, "model": self._model}


@dataclass(frozen=True, slots=True)
class Job:
    """A request that has been checked and encoded."""

    model: ServedModel
    prompts: list[list[int]]
    params: SamplingParams
    reply: Reply


async def answer(server: Server, request: Request, body: SamplingRequest, job: Job) -> Response:
    record, settings, model = record_of(request.scope), server.settings, job.model
    record.prompt_tokens = job.reply.prompt_tokens
    most = settings.stream_buffer * len(job.prompts) * job.params.n if body.stream else None
    relay = Relay(partial(model.follow, job.prompts, job.params), most)
    server.relays.add(relay)

    def over(outcome: str | None) -> None:
        server.relays.discard(relay)
        record.outcome = outcome or record.outcome
        record.new_tokens = job.reply.new_tokens

    try:
        if not body.stream:
            whole = await while_connected(request, relay, _collect(relay, job.reply))
            over(None)
            return json_response(whole)
        await relay.begun(PATIENCE)
    except ClientGone:
        over("cancelled")
        return Response(status_code=499)  # nobody reads it
    except BaseException as error:  # a cancelled task as well
        relay.close()
        over(None)
        if isinstance(error, Exception):
            raise api_error(error, model.retry_after) from error
        raise
    job.reply.usage_wanted = bool(body.stream_options and body.stream_options.include_usage)
    return EventStream(relay, _events(relay, job, record, settings.keep_alive), over)


async def _collect(relay: Relay, reply: Reply) -> dict[str, Any]:
    while increments := await relay.next():
        for increment in increments:
            reply.push(increment)
    return reply.whole()


async def _events(relay: Relay, job: Job, record: Record, keep_alive: float) -> AsyncGenerator[str, None]:
    """Ends as complete only if all answers are; else with an error. What has come since the last events were sent is
    sent together."""
    reply = job.reply
    for data in reply.opening():
        yield reply.event(data)
    while True:
        try:
            increments = await relay.next(keep_alive)
            if not increments:
                break
            found = [data for increment in increments for data in reply.push(increment)]
        except TimeoutError:
            yield ": waiting\n\n"
            continue
        except Exception as error:
            refusal: ApiError = api_error(error, job.model.retry_after)
            record.outcome = refusal.outcome
            yield reply.failure(refusal)
            return
        if found:
            yield "".join([reply.event(data) for data in found])
    yield reply.ending()


def token_logprob(tokenizer: Tokenizer | None, token_id: int, logprob: float) -> dict[str, Any]:
    """One token as the chat API shows it; without a tokenizer, by its id."""
    raw = tokenizer.token_bytes(token_id) if tokenizer else f"token_id:{token_id}".encode()
    return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}


def chat_logprobs(tokenizer: Tokenizer | None, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    content = [
        token_logprob(tokenizer, one.token_id, one.logprob)
        | {"top_logprobs": [token_logprob(tokenizer, *top) for top in one.top]}
        for one in logprobs
    ]
    return {"content": content, "refusal": None}
