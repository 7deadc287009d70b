"""What a checkpoint of an architecture contains, before quantisation and independent of its dialect.

A layout is data: it serves the reader's accounting, the memory plan, the writer and the doctor. Names are
those of the published files, with the prefix each family uses; the reader normalises both sides before it
compares them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Config = Mapping[str, Any]  # a config.json

# How synthetic checkpoints fill a parameter, so that activations keep a sane size.
Values = Literal[
    "linear",  # std 1/sqrt(fan_in)
    "embedding",  # std 1; a tied embedding is "linear", being the output projection too
    "norm",  # around 1
    "offset_norm",  # around 0: the model multiplies by 1 + weight
    "unscaled_norm",  # around size ** -0.25: q and k norms of a model whose scores have no 1/sqrt(size)
    "bias",  # small, around 0
    "decay",  # log of a positive rate: A_log
    "step",  # dt_bias
    "scalar",  # around 1: layer_scalar, per_expert_scale, router.scale, D
]


class TensorSpec(NamedTuple):
    dtype: str  # safetensors name: BF16, F32, U8, F8_E4M3
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor of the plain model. `linear` marks nn.Linear weights, which a checkpoint may quantise."""

    shape: tuple[int, ...]
    linear: bool = False
    dtype: str = "BF16"
    values: Values = "linear"


@dataclass(frozen=True, slots=True)
class ExpertBlock:
    """The routed experts of one layer: `{prefix}{expert}.{projection}.weight`, each [out, in]."""

    layer: int
    prefix: str
    count: int
    projections: Mapping[str, tuple[int, int]]

    def names(self) -> Iterator[tuple[int, str, str]]:
        """(expert, projection, module name) of every expert linear."""
        for expert in range(self.count):
            for projection in self.projections:
                yield expert, projection, f"{self.prefix}{expert}.{projection}"


@dataclass(frozen=True, slots=True)
class CacheGeometry:
    """What a sequence keeps between tokens. KV elements are counted per token, state bytes per sequence."""

    kv_elements_per_token: int  # K and V of all layers that keep every token
    window: int = 0  # tokens kept by sliding-window layers
    window_kv_elements_per_token: int = 0  # K and V of those layers
    state_bytes: int = 0  # recurrent and convolution states

    def bytes(self, tokens: int, itemsize: int) -> int:
        """What one sequence of `tokens` tokens keeps."""
        windowed = min(tokens, self.window) * self.window_kv_elements_per_token
        return (tokens * self.kv_elements_per_token + windowed) * itemsize + self.state_bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """Text parameters and experts, and the parts a text-only runner knowingly ignores (towers, MTP)."""

    model_type: str
    parameters: Mapping[str, Parameter]  # full tensor name -> parameter, experts excluded
    experts: tuple[ExpertBlock, ...]
    cache: CacheGeometry
    ignored: Mapping[str, Parameter] = field(default_factory=dict)  # full tensor name -> parameter
    mtp: Mapping[str, Parameter] = field(default_factory=dict)  # kept apart: some exports drop them
