"""Everything that can be checked before memory is taken: checkpoint, settings, memory plan, requests."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moe_nvfp4.checkpoint import Checkpoint
from moe_nvfp4.dense_weights import load_dense, read_dense_scales
from moe_nvfp4.errors import CheckpointError, RequestError
from moe_nvfp4.expert_buffers import ExpertBuffers, num_experts
from moe_nvfp4.memory import MemoryPlan, plan_memory
from moe_nvfp4.models import Model, ModelConfig, build_model, model_config
from moe_nvfp4.prompts import PromptEncoder
from moe_nvfp4.routing.dispatch import LocalDispatcher
from moe_nvfp4.routing.placement import Placement
from moe_nvfp4.survey import survey_checkpoint
from moe_nvfp4.tokenizer import Tokenizer

PREFILL_CHUNK = 512  # new tokens of one step: bounds the attention scores of a long prompt
DEFAULT_SEQ_LEN = 4096
MAX_BATCH_SIZE = 4096
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Preparation:
    """A checkpoint that can be loaded on a device as planned. `load_model` then takes the memory."""

    def __init__(
        self,
        path_or_hub_id: str | Path,
        *,
        device: str | torch.device | None,
        dtype: str | torch.dtype | None,
        max_batch_size: int,
        max_seq_len: int | None,
        verbose: bool,
    ):
        self.started = time.perf_counter()
        self.device, self.verbose = _device(device), verbose
        self.dtype = _dtype(dtype, self.device)
        self._checkpoint = checkpoint = Checkpoint.open(path_or_hub_id)
        try:
            config = model_config(checkpoint.config)
            limit = _limits(max_batch_size, max_seq_len, config.context_length)
            self._found = survey_checkpoint(checkpoint)
            self._found.require_complete(str(checkpoint.folder))
            tokenizer = Tokenizer.load(checkpoint.folder)
            self.prompts = PromptEncoder(tokenizer, config.vocab_size, limit, config.context_length)
            self.eos_token_ids = _eos_token_ids(checkpoint, tokenizer)
            self._placement = Placement.even(self._found.experts, num_experts(self._found.layout))
            self.plan = self._plan(config, max_batch_size, limit)
        except BaseException:
            checkpoint.close()
            raise

    def _plan(self, config: ModelConfig, max_batch_size: int, max_seq_len: int) -> MemoryPlan:
        rows = max(PREFILL_CHUNK, max_batch_size)
        plan = plan_memory(
            self._found,
            self._placement,
            0,
            device=self.device,
            dtype=self.dtype,
            workspace=config.workspace_bytes(rows, max_batch_size, max_seq_len, self.dtype.itemsize),
            max_batch_size=max_batch_size,
            max_seq_len=max_seq_len,
        )
        if self.verbose:
            print(f"memory plan of {self._checkpoint.folder.name}, {self.dtype}:\n{plan.table()}", file=sys.stderr)
        plan.require_fit()
        return plan

    def load_model(self) -> Model:
        """Allocates and fills the buffers, and closes the checkpoint."""
        progress = None if self.verbose else False
        with self._checkpoint as checkpoint:
            scales = read_dense_scales(checkpoint, self._found)  # a bad one is found before the experts take memory
            experts = ExpertBuffers.load(
                checkpoint,
                self._found,
                device=self.device,
                placement=self._placement,
                fragments=self.device.type == "cuda" and self.dtype == torch.bfloat16,
                progress=progress,
            )
            weights = load_dense(
                checkpoint, self._found, device=self.device, dtype=self.dtype, scales=scales, progress=progress
            )
            dispatcher = LocalDispatcher(self._placement, self.device)
            return build_model(checkpoint.config, weights, experts, dispatcher, self.dtype)

    def close(self) -> None:
        self._checkpoint.close()


def _device(device: str | torch.device | None) -> torch.device:
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise RequestError(f"device {device!r}: expected cpu, cuda or cuda:N") from None
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise RequestError("device cuda: torch sees no GPU here; use device cpu, or install a CUDA build of torch")
        count, index = torch.cuda.device_count(), chosen.index or 0
        if index >= count:
            raise RequestError(f"device {chosen}: this machine has {count} GPUs; expected cuda:0 to cuda:{count - 1}")
        return torch.device("cuda", index)
    if chosen.type != "cpu":
        raise RequestError(f"device {chosen}: expected cpu, cuda or cuda:N")
    return chosen


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None or dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPES.values():
        raise RequestError(f"dtype {dtype}: expected one of {', '.join(DTYPES)}")
    return chosen


def _limits(max_batch_size: int, max_seq_len: int | None, context: int) -> int:
    if type(max_batch_size) is not int or not 1 <= max_batch_size <= MAX_BATCH_SIZE:
        raise RequestError(f"max_batch_size: got {max_batch_size!r}; expected 1 to {MAX_BATCH_SIZE}")
    if max_seq_len is None:
        return min(DEFAULT_SEQ_LEN, context)
    if type(max_seq_len) is not int or not 2 <= max_seq_len <= context:
        raise RequestError(f"max_seq_len: got {max_seq_len!r}; expected 2 to {context:,}, the model's context")
    return max_seq_len


def _eos_token_ids(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> frozenset[int]:
    """From generation_config.json, else config.json, else the tokenizer; one id or a list."""
    text_config = checkpoint.config.get("text_config")
    holders = (
        checkpoint.generation_config,
        checkpoint.config,
        text_config if isinstance(text_config, dict) else {},
        {"eos_token_id": tokenizer.eos_token_id if tokenizer else None},
    )
    stated = [holder["eos_token_id"] for holder in holders if holder.get("eos_token_id") is not None]
    value: Any = stated[0] if stated else []
    ids = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise CheckpointError(f"{checkpoint.folder}: eos_token_id {value!r:.80}; expected a token id or a list of them")
    return frozenset(ids)
