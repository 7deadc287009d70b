"""schemathesis asks what the app's own OpenAPI document allows, and what it does not: no answer is a 500."""

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from serving import Serving, demo_runner, serving

from moe_nvfp4.launch.http_app import create_app

EXAMPLES = 60  # for each endpoint
SCHEMA = schemathesis.openapi.from_dict(create_app({}).openapi())


@pytest.fixture(scope="module")
def served() -> Iterator[Serving]:
    # Answers to requests that happen to be right are long without a limit.
    with demo_runner(max_seq_len=64, max_batch_size=32) as runner, serving({"demo": runner}) as one:
        yield one


@SCHEMA.parametrize()
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
def test_no_server_error(case: schemathesis.Case, served: Serving) -> None:
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "demo"  # else nearly all end at an unknown model
    response = case.call(base_url=served.url)
    case.validate_response(response, checks=[not_a_server_error])
