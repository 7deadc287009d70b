"""The dashboard asks only for metrics and labels that the server has."""

import json
import re
from pathlib import Path

import httpx
import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")
from serving import demo_runner, serving

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"


def test_every_metric_exists() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [variable["query"] for variable in dashboard["templating"]["list"]]
    with demo_runner() as runner, serving({"demo": runner}) as server:
        body = {"model": "demo", "prompt": "Once", "max_tokens": 3}
        assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 200
        text = httpx.get(f"{server.url}/metrics").text
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    labels = {
        name: set(re.findall(r'(\w+)="', labels)) for name, labels in re.findall(r"^(\w+)\{(.*)\}", text, re.MULTILINE)
    }
    assert len(lines) > 20
    asked = {name for query in queries for name in re.findall(r"moe_nvfp4_\w+", query)}
    assert len(asked) > 8
    assert asked <= labels.keys()
    for query in queries:
        by = {label for group in re.findall(r"by \((\w+)\)", query) for label in [group]} - {"replica"}  # Ray Serve's
        for name in re.findall(r"moe_nvfp4_\w+", query):
            assert by | {"model"} <= labels[name], query


def test_panels_do_not_overlap() -> None:
    places = [panel["gridPos"] for panel in json.loads(DASHBOARD.read_text())["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
