"""Typed access to a config.json, which is untrusted: every number has a type and a range."""

from collections.abc import Collection, Mapping
from typing import Any

from moe_nvfp4.errors import CheckpointError

# Larger than any real size, small enough that products of a few sizes stay meaningful.
MAX_SIZE = 2**31 - 1
# A layout holds some tens of entries per layer; the caps keep an absurd config from eating memory.
MAX_LAYERS = 1024
MAX_EXPERTS = 4096


class Fields:
    """One JSON object of a config.json. null counts as absent, as in transformers."""

    def __init__(self, values: object, path: str = "") -> None:
        if not isinstance(values, Mapping):
            raise CheckpointError(f"config.json: {path or 'top level'}: got {_short(values)}; expected an object")
        self._values: Mapping[str, Any] = values
        self._path = path

    def error(self, name: str, expected: str) -> CheckpointError:
        value = self._values.get(name)
        got = "nothing" if value is None else _short(value)
        where = f"{self._path}.{name}" if self._path else name
        return CheckpointError(f"config.json: {where}: got {got}; expected {expected}")

    def has(self, name: str) -> bool:
        return self._values.get(name) is not None

    def integer(self, *names: str, default: int | None = None, low: int = 1, high: int = MAX_SIZE) -> int:
        """The first of several spellings that is present."""
        name = next((name for name in names if self.has(name)), names[0])
        value = self._values.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.error(name, f"an integer from {low} to {high}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite positive number."""
        value = self._values.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self.error(name, "a positive number")
        return float(value)

    def text(self, *names: str, default: str) -> str:
        name = next((name for name in names if self.has(name)), names[0])
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(name, "a string")
        return value

    def layer_count(self) -> int:
        return self.integer("num_hidden_layers", high=MAX_LAYERS)

    def expert_count(self, *names: str) -> int:
        return self.integer(*names, high=MAX_EXPERTS)

    def check_top_k(self, name: str, experts: int) -> None:
        self.integer(name, high=experts)

    def head_counts(self, queries: str, keys: str) -> tuple[int, int]:
        """Two head counts of which the first is a multiple of the second."""
        query_heads, key_heads = self.integer(queries), self.integer(keys)
        if query_heads % key_heads:
            raise self.error(keys, f"a divisor of {queries} ({query_heads})")
        return query_heads, key_heads

    def flag(self, name: str, default: bool) -> bool:
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def require_unset(self, *names: str) -> None:
        """Options that would add tensors or change the maths in ways this package does not implement."""
        for name in names:
            if self._values.get(name):
                raise self.error(name, "absent, false, 0 or null (the option is not supported)")

    def strings(self, name: str, allowed: Collection[str]) -> tuple[str, ...]:
        """A list of at most MAX_LAYERS known strings, or one string read letter by letter."""
        value = self._values.get(name)
        expected = f"1 to {MAX_LAYERS} entries out of {', '.join(sorted(allowed))}"
        if not isinstance(value, list | tuple | str) or not 1 <= len(value) <= MAX_LAYERS:
            raise self.error(name, expected)
        entries = tuple(entry for entry in value if isinstance(entry, str) and entry in allowed)
        if len(entries) != len(value):
            raise self.error(name, expected)
        return entries

    def indices(self, name: str, count: int) -> frozenset[int]:
        """A possibly absent list of layer indices."""
        value = self._values.get(name) or ()
        expected = f"a list of at most {count} layer indices below {count}"
        if not isinstance(value, list | tuple) or len(value) > count:
            raise self.error(name, expected)
        valid = [x for x in value if isinstance(x, int) and not isinstance(x, bool) and 0 <= x < count]
        if len(valid) != len(value):
            raise self.error(name, expected)
        return frozenset(valid)

    def section(self, name: str) -> "Fields | None":
        if not self.has(name):
            return None
        return Fields(self._values[name], f"{self._path}.{name}" if self._path else name)


def _short(value: object) -> str:
    # Only the head of a container is shown: repr of a huge untrusted list would be built in full.
    if isinstance(value, Mapping | list | tuple):
        return f"{'an object' if isinstance(value, Mapping) else 'a list'} of {len(value)} entries"
    if isinstance(value, str):
        return repr(value if len(value) <= 80 else value[:77] + "...")
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    return str(value).lower() if isinstance(value, bool) else repr(value)
