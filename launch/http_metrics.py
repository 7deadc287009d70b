"""Metrics in the text form of Prometheus: counters, histograms, and figures that are read when somebody asks."""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

Labels = tuple[tuple[str, str], ...]
SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: its name, its kind, and the lines that hold its values: suffix of the name, labels, value."""

    name: str
    kind: str  # counter, gauge or histogram
    text: str
    samples: Sequence[tuple[str, Labels, float]]


def gauge(name: str, text: str, values: Iterable[tuple[Mapping[str, str], float]], kind: str = "gauge") -> Family:
    """A metric whose values are known at the moment."""
    return Family(name, kind, text, [("", _labels(labels), value) for labels, value in values])


@dataclass(slots=True)
class Count:
    """Of one set of labels."""

    value: float = 0

    def add(self, amount: float = 1) -> None:
        self.value += amount


class Counter:
    def __init__(self, name: str, text: str):
        self.name, self.text = name, text
        self._counts: dict[Labels, Count] = {}

    def labelled(self, **labels: str) -> Count:
        """For who counts often."""
        return self._counts.setdefault(_labels(labels), Count())

    def add(self, amount: float = 1, **labels: str) -> None:
        self.labelled(**labels).add(amount)

    def value(self, **labels: str) -> float:
        return self._counts.get(_labels(labels), Count()).value

    def families(self) -> Iterable[Family]:
        yield Family(self.name, "counter", self.text, [("", key, one.value) for key, one in self._counts.items()])


class Buckets:
    """Of one set of labels."""

    def __init__(self, bounds: Sequence[float]):
        self._bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self._bounds, value)] += 1
        self.sum += value


class Histogram:
    def __init__(self, name: str, text: str, bounds: Sequence[float] = SECONDS):
        self.name, self.text, self._bounds = name, text, tuple(bounds)
        self._buckets: dict[Labels, Buckets] = {}

    def labelled(self, **labels: str) -> Buckets:
        """For who observes often."""
        key = _labels(labels)
        if key not in self._buckets:
            self._buckets[key] = Buckets(self._bounds)
        return self._buckets[key]

    def observe(self, value: float, **labels: str) -> None:
        self.labelled(**labels).observe(value)

    def families(self) -> Iterable[Family]:
        samples: list[tuple[str, Labels, float]] = []
        for key, buckets in self._buckets.items():
            total = 0
            for bound, count in zip((*self._bounds, math.inf), buckets.counts, strict=True):
                total += count
                samples.append(("_bucket", (*key, ("le", _number(bound))), total))
            samples += [("_sum", key, buckets.sum), ("_count", key, total)]
        yield Family(self.name, "histogram", self.text, samples)


class Registry:
    """Open to others: `register` takes anything that yields families when it is called."""

    def __init__(self) -> None:
        self._collectors: list[Callable[[], Iterable[Family]]] = []

    def register(self, collector: Callable[[], Iterable[Family]]) -> None:
        self._collectors.append(collector)

    def counter(self, name: str, text: str) -> Counter:
        counter = Counter(name, text)
        self.register(counter.families)
        return counter

    def histogram(self, name: str, text: str, bounds: Sequence[float] = SECONDS) -> Histogram:
        histogram = Histogram(name, text, bounds)
        self.register(histogram.families)
        return histogram

    def render(self) -> str:
        """Families of one name are one family: Prometheus takes each name once."""
        merged: dict[str, Family] = {}
        for collector in self._collectors:
            for family in collector():
                before = merged.get(family.name)
                samples = [*before.samples, *family.samples] if before else family.samples
                merged[family.name] = Family(family.name, family.kind, family.text, samples)
        lines = []
        for family in merged.values():
            lines += [f"# HELP {family.name} {family.text}", f"# TYPE {family.name} {family.kind}"]
            lines += [f"{family.name}{suffix}{_braces(key)} {_number(value)}" for suffix, key, value in family.samples]
        return "\n".join(lines) + "\n"


def _labels(labels: Mapping[str, str]) -> Labels:
    return tuple(labels.items())


def _braces(labels: Labels) -> str:
    def escaped(value: str) -> str:
        return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    return "{" + ",".join(f'{name}="{escaped(value)}"' for name, value in labels) + "}" if labels else ""


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) else repr(float(value))
