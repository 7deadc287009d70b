"""From a request's fields to the engine's sampling, within the operator's limits."""

from typing import Any

from moe_nvfp4.launch.http_errors import ApiError
from moe_nvfp4.launch.http_schemas import ResponseFormat, SamplingRequest
from moe_nvfp4.launch.http_settings import ServerSettings
from moe_nvfp4.sampling import SamplingParams

# Temperature 1 is the API's default. A top_p of 0 asks for the likeliest token.
TINY_TOP_P = 1e-9


def sampling_params(request: SamplingRequest, settings: ServerSettings, **extra: Any) -> SamplingParams:
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    stop = [string for string in stop if string]  # some clients send an empty one for none
    at_most("n", request.n or 1, settings.max_choices)
    at_most("stop", len(stop), settings.max_stop_strings, "strings")
    at_most("stop", max(map(len, stop), default=0), settings.max_stop_characters, "characters in a string")
    fields: dict[str, Any] = {
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "top_k": max(0, request.top_k or 0),
        "top_p": 1.0 if request.top_p is None else max(request.top_p, TINY_TOP_P),
        "min_p": request.min_p or 0.0,
        "seed": request.seed,
        "stop": tuple(stop),
        "stop_token_ids": tuple(request.stop_token_ids or ()),
        "ignore_eos": bool(request.ignore_eos),
        "n": request.n or 1,
        "repetition_penalty": request.repetition_penalty or 1.0,
        "presence_penalty": request.presence_penalty or 0.0,
        "frequency_penalty": request.frequency_penalty or 0.0,
        "logit_bias": {int(token): bias for token, bias in (request.logit_bias or {}).items()},
        "timeout": settings.request_seconds,
    }
    if request.skip_special_tokens is not None:
        fields["skip_special_tokens"] = request.skip_special_tokens
    return SamplingParams(**fields | _constraint(request.response_format) | extra)


def _constraint(wanted: ResponseFormat | None) -> dict[str, Any]:
    if wanted is None or wanted.type == "text":
        return {}
    if wanted.json_schema is None:
        return {"json_object": True}
    return {"json_schema": wanted.json_schema.schema_}


def at_most(name: str, count: int, most: int, unit: str = "") -> None:
    if count > most:
        what = f" {unit}" if unit else ""
        raise ApiError(400, f"{name}: {count:,}{what}; at most {most:,} are allowed", param=name, code="too_many")
