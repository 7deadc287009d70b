"""What the checkpoints of each architecture contain."""

from collections.abc import Mapping
from importlib import import_module

from moe_nvfp4.errors import CheckpointError
from moe_nvfp4.layouts.base import CacheGeometry, Config, ExpertBlock, Layout, Parameter, TensorSpec

__all__ = ["CacheGeometry", "Config", "ExpertBlock", "Layout", "Parameter", "TensorSpec", "layout"]

# model_type -> module of this package; the *_text types are the text part alone, with a flat config.
_MODULES = {
    "qwen3_moe": "qwen3_moe",
    "qwen3_5_moe": "qwen3_5_moe",
    "qwen3_5_moe_text": "qwen3_5_moe",
    "gemma4": "gemma4",
    "gemma4_text": "gemma4",
    "gemma4_unified": "gemma4",
    "gemma4_unified_text": "gemma4",
    "nemotron_h": "nemotron_h",
}


def layout(config: Config) -> Layout:
    """The layout that a config.json describes."""
    if not isinstance(config, Mapping):
        raise CheckpointError("config.json: top level: expected an object")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _MODULES:
        given = repr(model_type[:80]) if isinstance(model_type, str) else "nothing usable"
        raise CheckpointError(
            f"config.json: model_type: got {given}; expected one of {', '.join(_MODULES)}. "
            "Use a checkpoint of one of these architectures, or add a layout and a model for this one."
        )
    result: Layout = import_module(f"moe_nvfp4.layouts.{_MODULES[model_type]}").layout(config)
    return result
