"""NVFP4 mixture-of-experts checkpoints on GPUs without FP4 tensor cores.

    from moe_nvfp4 import MoERunner, SamplingParams

Names are imported on first use, so that `moe_nvfp4.kernels.x` stays a leaf import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_nvfp4.async_runner import AsyncMoERunner
    from moe_nvfp4.checkpoint import Checkpoint
    from moe_nvfp4.errors import (
        CheckpointError,
        EngineError,
        MemoryPlanError,
        MoeNvfp4Error,
        QueueFullError,
        RequestError,
    )
    from moe_nvfp4.expert_buffers import ExpertBuffers
    from moe_nvfp4.runner import MoERunner
    from moe_nvfp4.sampling import SamplingParams
    from moe_nvfp4.settings import RunnerSettings

__version__ = "0.1.0"
__all__ = [
    "AsyncMoERunner",
    "Checkpoint",
    "CheckpointError",
    "EngineError",
    "ExpertBuffers",
    "MemoryPlanError",
    "MoERunner",
    "MoeNvfp4Error",
    "QueueFullError",
    "RequestError",
    "RunnerSettings",
    "SamplingParams",
]

_HOMES = {
    "AsyncMoERunner": "async_runner",
    "Checkpoint": "checkpoint",
    "CheckpointError": "errors",
    "EngineError": "errors",
    "ExpertBuffers": "expert_buffers",
    "MemoryPlanError": "errors",
    "MoERunner": "runner",
    "MoeNvfp4Error": "errors",
    "QueueFullError": "errors",
    "RequestError": "errors",
    "RunnerSettings": "settings",
    "SamplingParams": "sampling",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
