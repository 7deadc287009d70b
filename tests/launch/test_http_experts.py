"""/v1/experts and its metric against the rows that the tokens of requests must have sent."""

from collections.abc import Iterator

import httpx
import pytest
from serving import Serving, demo_runner, serving, until

from moe_nvfp4 import expert_loads


@pytest.fixture(scope="module")
def served() -> Iterator[Serving]:
    with (
        demo_runner(count_experts=True, prefix_reuse=False) as counted,
        demo_runner() as plain,
        serving({"counted": counted, "plain": plain}, api_keys=("secret",)) as one,
    ):
        yield one


def get(served: Serving, query: str, key: str = "secret") -> httpx.Response:
    return httpx.get(f"{served.url}/v1/experts{query}", headers={"Authorization": f"Bearer {key}"})


def test_rows_add_up(served: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_loads, "READ_EVERY", 0.0)
    runner = served.runners["counted"]
    before = get(served, "?model=counted").json()["layers"]
    body = {"model": "counted", "prompt": [5, 6, 7, 8, 9], "max_tokens": 4, "ignore_eos": True}
    for _ in range(2):
        answer = httpx.post(f"{served.url}/v1/completions", json=body, headers={"Authorization": "Bearer secret"})
        assert answer.status_code == 200
    found = get(served, "?model=counted").json()
    assert (found["object"], found["model"]) == ("experts", "counted")
    assert [layer["layer"] for layer in found["layers"]] == list(runner.experts.layers)
    for old, new in zip(before, found["layers"], strict=True):
        assert len(new["counts"]) == runner.config.num_experts
        # The last of four tokens is not computed.
        assert sum(new["counts"]) - sum(old["counts"]) == 2 * 8 * runner.config.experts_per_token
    first = found["layers"][0]
    even = sum(first["counts"]) / len(first["counts"]) / max(first["counts"])
    until(lambda: served.value("moe_nvfp4_expert_balance", model="counted", layer=str(first["layer"])) == even)
    assert served.value("moe_nvfp4_expert_balance", model="plain") == 0


@pytest.mark.parametrize(
    ("query", "key", "status", "code"),
    [
        ("?model=plain", "secret", 404, "experts_not_counted"),
        ("?model=other", "secret", 404, "model_not_found"),
        ("", "secret", 400, "invalid_value"),
        ("?model=counted", "wrong", 401, "invalid_api_key"),
    ],
)
def test_refusals(served: Serving, query: str, key: str, status: int, code: str) -> None:
    answer = get(served, query, key)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
