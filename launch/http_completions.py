"""/v1/completions: texts or token ids are continued as they are."""

from collections.abc import Sequence
from typing import Any

from fastapi import Request, Response

from moe_nvfp4.generation import Increment, TokenLogprob
from moe_nvfp4.launch.http_errors import ApiError
from moe_nvfp4.launch.http_guard import record_of
from moe_nvfp4.launch.http_models import ServedModel
from moe_nvfp4.launch.http_reply import ChoicesReply, Job, answer, token_logprob
from moe_nvfp4.launch.http_sampling import at_most, sampling_params
from moe_nvfp4.launch.http_schemas import CompletionRequest
from moe_nvfp4.launch.http_server import Server
from moe_nvfp4.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16  # of the API


async def complete(server: Server, request: Request, body: CompletionRequest) -> Response:
    model = server.model(body.model)
    record_of(request.scope).model = model.name
    texts = _prompts(body, server.settings.max_prompts)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ApiError(400, "best_of: only the n answers are computed; leave it out, or set it to n", param="best_of")
    if body.echo and body.logprobs is not None:
        raise ApiError(400, "echo: log probabilities of the prompt are not computed; leave out one of both")
    params = sampling_params(
        body,
        server.settings,
        max_new_tokens=body.max_tokens or DEFAULT_MAX_TOKENS,
        logprobs=body.logprobs,
    )

    def encode() -> list[list[int]]:
        ids = [_ids(model, text) for text in texts]
        model.check(ids, params, "prompt")
        return ids

    prompts = await model.encode(params, encode)
    reply = CompletionReply(model, prompts, params.n, token_ids=bool(body.return_token_ids))
    if body.echo:
        reply.echo = [text if isinstance(text, str) else _text(model, text) for text in texts]
    return await answer(server, request, body, Job(model, prompts, params, reply))


def _prompts(body: CompletionRequest, most: int) -> list[str | list[int]]:
    """A list of texts or of lists of ids."""
    if not body.prompt:
        raise ApiError(400, "prompt: empty; send a text or token ids", param="prompt")
    if isinstance(body.prompt, str):
        return [body.prompt]
    ids = [item for item in body.prompt if isinstance(item, int)]
    if ids:
        return [ids]
    several = [item for item in body.prompt if not isinstance(item, int)]
    at_most("prompt", len(several), most, "prompts")
    return several


def _ids(model: ServedModel, text: str | list[int]) -> list[int]:
    if not isinstance(text, str):
        return text
    if model.tokenizer is None:
        raise ApiError(400, "prompt: this model has no tokenizer; send token ids", param="prompt")
    return model.tokenizer.encode(text)


def _text(model: ServedModel, ids: Sequence[int]) -> str:
    return model.tokenizer.decode(ids, skip_special_tokens=False) if model.tokenizer else ""


class CompletionReply(ChoicesReply):
    prefix, whole_name, chunk_name = "cmpl-", "text_completion", "text_completion"

    def __init__(self, model: ServedModel, prompts: Sequence[Sequence[int]], n: int, *, token_ids: bool):
        super().__init__(model.name, prompts)
        self._tokenizer, self._n = model.tokenizer, n
        self.echo = [""] * len(prompts)
        count = n * len(prompts)
        self._texts = [""] * count
        self._token_ids: list[list[int]] | None = [[] for _ in range(count)] if token_ids else None
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in range(count)]
        self._offsets = [0] * count
        self._finish: list[str | None] = [None] * count

    def opening(self) -> list[dict[str, Any]]:
        echoes = [text for text in self.echo for _ in range(self._n)]
        return [self._choice(index, text, None, None, []) for index, text in enumerate(echoes) if text]

    def push(self, increment: Increment) -> list[dict[str, Any]]:
        self.count(increment)
        index = increment.prompt * self._n + increment.choice
        self._texts[index] += increment.text
        self._finish[index] = increment.finish_reason
        self._logprobs[index] += increment.logprobs
        if self._token_ids is not None:
            self._token_ids[index] += increment.token_ids
        elif not increment.text and not increment.logprobs and not increment.finish_reason:
            return []  # an unfinished character
        logprobs = self._shown(index, increment.logprobs)
        return [self._choice(index, increment.text, increment.finish_reason, logprobs, increment.token_ids)]

    def choices(self) -> list[dict[str, Any]]:
        self._offsets = [0] * len(self._offsets)
        ids = self._token_ids or [[]] * len(self._texts)
        return [
            self._choice(index, self.echo[index // self._n] + text, finish, self._shown(index, logprobs), ids[index])
            for index, (text, finish, logprobs) in enumerate(
                zip(self._texts, self._finish, self._logprobs, strict=True)
            )
        ]

    def _choice(
        self, index: int, text: str, finish: str | None, logprobs: dict[str, Any] | None, token_ids: Sequence[int]
    ) -> dict[str, Any]:
        choice = {"index": index, "text": text, "finish_reason": finish, "logprobs": logprobs}
        return choice if self._token_ids is None else choice | {"token_ids": list(token_ids)}

    def _shown(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not logprobs:
            return None
        shown, self._offsets[index] = completion_logprobs(self._tokenizer, logprobs, self._offsets[index])
        return shown


def completion_logprobs(
    tokenizer: Tokenizer | None, logprobs: Sequence[TokenLogprob], offset: int
) -> tuple[dict[str, Any], int]:
    """The API's lists, and the offset after them. Tokens that are parts of characters count one each."""
    shown: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for one in logprobs:
        token = token_logprob(tokenizer, one.token_id, one.logprob)["token"]
        top: dict[str, float] = {}
        for token_id, logprob in one.top:
            top.setdefault(token_logprob(tokenizer, token_id, logprob)["token"], logprob)
        for name, value in zip(shown, (token, one.logprob, top, offset), strict=True):
            shown[name].append(value)
        offset += len(token)
    return shown, offset
