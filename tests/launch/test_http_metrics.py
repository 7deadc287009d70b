"""The text form of Prometheus, line by line."""

import math

from moe_nvfp4.launch.http_metrics import Registry, gauge


def test_counters_and_gauges() -> None:
    registry = Registry()
    counter = registry.counter("requests_total", "Requests.")
    counter.add(model="a", outcome="ok")
    counter.add(2, model="a", outcome="ok")
    counter.add(model='b"\\\n', outcome="ok")
    registry.register(lambda: [gauge("pages", "Pages.", [({"model": "a"}, 2.5), ({"model": "b"}, math.inf)])])
    registry.register(lambda: [gauge("pages", "Pages.", [({}, math.nan)])])
    assert registry.render().splitlines() == [
        "# HELP requests_total Requests.",
        "# TYPE requests_total counter",
        'requests_total{model="a",outcome="ok"} 3',
        'requests_total{model="b\\"\\\\\\n",outcome="ok"} 1',
        "# HELP pages Pages.",
        "# TYPE pages gauge",
        'pages{model="a"} 2.5',
        'pages{model="b"} +Inf',
        "pages NaN",
    ]


def test_histograms_add_up() -> None:
    registry = Registry()
    seconds = registry.histogram("seconds", "Seconds.", (0.1, 1))
    for value in (0.05, 0.1, 0.5, 7):
        seconds.observe(value, model="a")
    assert registry.render().splitlines() == [
        "# HELP seconds Seconds.",
        "# TYPE seconds histogram",
        'seconds_bucket{model="a",le="0.1"} 2',
        'seconds_bucket{model="a",le="1"} 3',
        'seconds_bucket{model="a",le="+Inf"} 4',
        'seconds_sum{model="a"} 7.65',
        'seconds_count{model="a"} 4',
    ]
