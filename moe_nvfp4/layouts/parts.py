"""Groups of parameters that the architectures share."""

from collections.abc import Mapping

from moe_nvfp4.layouts.base import Config, Parameter, Values
from moe_nvfp4.layouts.fields import Fields

Parameters = dict[str, Parameter]


def text_fields(config: Config) -> tuple[Fields, Fields, str]:
    """(whole config, its text part, name prefix): files with towers nest both the config and the names."""
    fields = Fields(config)
    text = fields.section("text_config")
    return (fields, text, "model.language_model.") if text else (fields, fields, "model.")


def tied(fields: Fields, text: Fields, default: bool) -> bool:
    return fields.flag("tie_word_embeddings", text.flag("tie_word_embeddings", default))


def layer_types(text: Fields, kinds: tuple[str, str], interval: int) -> tuple[str, ...]:
    """`layer_types`, or every `interval`-th layer of the second kind where the config leaves them out."""
    if text.has("layer_types"):
        types = text.strings("layer_types", kinds)
        if text.has("num_hidden_layers") and text.layer_count() != len(types):
            raise text.error("num_hidden_layers", f"{len(types)}, the length of layer_types")
        return types
    ordinary, full = kinds
    return tuple(full if (index + 1) % interval == 0 else ordinary for index in range(text.layer_count()))


def embeddings(name: str, shape: tuple[int, int], *, tied: bool) -> Parameters:
    """The input embedding, and lm_head unless it is the same tensor."""
    if tied:
        return {name: Parameter(shape, values="linear")}
    return {name: Parameter(shape, values="embedding"), "lm_head.weight": Parameter(shape, linear=True)}


def linears(prefix: str, shapes: Mapping[str, tuple[int, int]]) -> Parameters:
    return {f"{prefix}{name}.weight": Parameter(shape, linear=True) for name, shape in shapes.items()}


def norms(prefix: str, size: int, *names: str, values: Values = "norm") -> Parameters:
    norm = Parameter((size,), values=values)
    return {f"{prefix}{name}.weight": norm for name in names}


def biases(prefix: str, sizes: Mapping[str, int]) -> Parameters:
    return {f"{prefix}{name}.bias": Parameter((size,), values="bias") for name, size in sizes.items()}


def attention(hidden: int, q_rows: int, kv_rows: int, o_columns: int) -> dict[str, tuple[int, int]]:
    return {
        "q_proj": (q_rows, hidden),
        "k_proj": (kv_rows, hidden),
        "v_proj": (kv_rows, hidden),
        "o_proj": (hidden, o_columns),
    }


def gated_mlp(hidden: int, inner: int) -> dict[str, tuple[int, int]]:
    return {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
