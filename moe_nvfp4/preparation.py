"""Everything that can be checked before memory is taken: checkpoint, settings, memory plan, requests."""

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moe_nvfp4.cache import CacheSettings
from moe_nvfp4.checkpoint import Checkpoint
from moe_nvfp4.dense_weights import load_dense, read_dense_scales
from moe_nvfp4.determinism import CHUNK, Determinism, determinism_of
from moe_nvfp4.engine.penalties import BYTES_PER_TOKEN, ROWS_AT_ONCE, WORKSPACE_PER_TOKEN
from moe_nvfp4.engine.prompt_buffers import row_buckets
from moe_nvfp4.errors import CheckpointError, RequestError
from moe_nvfp4.expert_buffers import ExpertBuffers, num_experts
from moe_nvfp4.grammar import Grammars
from moe_nvfp4.kernels.fragments import fits_in_place
from moe_nvfp4.kernels.linear import in_fragments
from moe_nvfp4.layouts import Config
from moe_nvfp4.memory import MemoryPlan, plan_memory
from moe_nvfp4.models import Model, ModelConfig, Parts, build_model, model_config
from moe_nvfp4.parallel import ALONE, Ranks
from moe_nvfp4.prompts import PromptEncoder
from moe_nvfp4.routing.placement import Placement
from moe_nvfp4.settings import RunnerSettings
from moe_nvfp4.sharding import Cut, cuts, shard
from moe_nvfp4.survey import Survey, survey_checkpoint
from moe_nvfp4.tokenizer import Tokenizer

# New tokens of one step. On a GPU experts are near their best rate from some thousand rows on; torch's attention, which
# serves elsewhere, holds scores of all heads, rows and positions.
STEP_ROWS, FAST_STEP_ROWS = 512, 4096
MAX_SNAPSHOTS = 16  # of recurrent states, 68 MB each for Qwen3.6-35B
GRAPH_BYTES = 15 << 20  # of the graph of one number of rows, at most; 40 layers are 900 kernels


class Preparation:
    """A checkpoint that can be loaded on a device as planned. `load_model` then takes the memory.

    With `ranks` it is one rank's part of a group, in which all ranks prepare, load and step together. `placement` says
    which rank has which experts of each layer (default: even, a shared expert on all of them).
    """

    def __init__(
        self,
        path_or_hub_id: str | Path,
        settings: RunnerSettings,
        ranks: Ranks = ALONE,
        placement: Placement | None = None,
    ):
        self.started = time.perf_counter()
        self.settings, self.ranks = settings, ranks
        self.device = settings.chosen_device()
        self.dtype = settings.chosen_dtype(self.device)
        self._checkpoint = checkpoint = Checkpoint.open(path_or_hub_id)
        self.folder = checkpoint.folder
        try:
            self.config = config = model_config(checkpoint.config)
            limit = settings.length_limit(config.context_length)
            slots = ranks.sequences(settings.max_batch_size)
            self.buckets = settings.chosen_buckets(slots)
            found = survey_checkpoint(checkpoint)
            found.require_complete(str(checkpoint.folder))
            self.found = found.with_shared_experts(config.shared_experts())
            self._cuts: dict[str, Cut] = {}
            self._share_heads_out(config)
            self.fast = self._has_kernels()
            self.determinism = determinism_of(settings.deterministic, self.fast, self.ranks.size)
            self.cuda_graphs, self.warm_up = settings.cuda_graphs and self.fast, settings.warm_up and self.fast
            self.step_rows = FAST_STEP_ROWS if self.fast else STEP_ROWS
            if self.ranks.splits_rows:  # experts see the rows of all ranks
                self.step_rows = max(STEP_ROWS, self.step_rows // self.ranks.size)
            if settings.deterministic:  # a chunk is not cut to make room for answers
                self.step_rows = max(self.step_rows, slots + CHUNK)
            # Steps with prompts of up to so many rows are filled up to a size that has graphs.
            self.fill_rows = self.step_rows if self.fast else 0
            tokenizer = Tokenizer.load(checkpoint.folder)
            media = _media_tokens(checkpoint.config)
            self.eos_token_ids = _eos_token_ids(checkpoint, tokenizer)
            grammars = Grammars(tokenizer, config.vocab_size, self.eos_token_ids) if tokenizer else None
            self.prompts = PromptEncoder(tokenizer, config.vocab_size, limit, config.context_length, media, grammars)
            self.placement = self._place(placement, config)
            self.cache_settings = CacheSettings(
                slots=slots,
                max_seq_len=limit,
                chunk=self._chunk(),
                dtype=self.dtype,
                fp8=settings.kv_dtype == "fp8",
                scales=_kv_scales(checkpoint, found) if settings.kv_dtype == "fp8" else {},
                batch_invariant=self.determinism is Determinism.KERNELS,
            )
            self.plan = self._plan(self.config)
        except BaseException:
            checkpoint.close()
            raise

    def _share_heads_out(self, config: ModelConfig) -> None:
        ranks = self.ranks
        if ranks.attention not in ("auto", "tensor") or ranks.size == 1:
            return
        try:
            sharded = config.sharded(ranks.size)
            kept = cuts(self.found.dense, config.cache_spec, ranks.size, ranks.rank)
        except RequestError:
            if ranks.attention == "tensor":
                raise
            self.ranks = ranks.with_attention("replicated")
        else:
            self.ranks, self.config, self._cuts = ranks.with_attention("tensor"), sharded, kept

    def _has_kernels(self) -> bool:
        """Where experts' sizes fit no kernel (none published), torch serves, which a graph cannot hold."""
        shapes = [shape for block in self.found.layout.experts for shape in block.projections.values()]
        fits = all(fits_in_place(*shape) for shape in shapes)
        return self.device.type == "cuda" and self.dtype == torch.bfloat16 and fits

    def _chunk(self) -> int:
        """Most rows of one sequence in a step. Where layers see a window, every slot's ring holds so many more."""
        if self.determinism is not Determinism.OFF:
            return CHUNK
        windows = [spec.window for spec in self.config.cache_spec.attention if spec.window]
        return min(self.step_rows, max(512, *windows)) if windows else self.step_rows

    def _place(self, placement: Placement | None, config: ModelConfig) -> Placement:
        layers, count, size = sorted(self.found.experts), num_experts(self.found.layout), self.ranks.size
        spare = self.settings.spare_experts
        if placement is None:
            everywhere = range(config.num_experts, count)  # a shared expert, which every row takes
            return self.ranks.placement(layers, count, everywhere=everywhere, spare=spare)
        if (
            placement.num_experts != count
            or sorted(placement.slots) != layers
            or (layers and placement.num_ranks != size)
        ):
            raise RequestError(
                f"placement: {placement.num_experts} experts in {len(placement.slots)} layers over "
                f"{placement.num_ranks} ranks; this checkpoint and group need {count} experts (shared ones that are "
                f"loaded as routed experts included) in {len(layers)} layers over {size} ranks"
            )
        return placement.with_replicas(spare)

    def _plan(self, config: ModelConfig) -> MemoryPlan:
        rows, slots = max(self.step_rows, self.cache_settings.slots), self.cache_settings.slots
        if self.ranks.splits_rows:
            rows *= self.ranks.size
        logits = 2 * slots * config.vocab_size * 4  # as the model gives them, and to be changed
        penalties = (slots + 1) * config.vocab_size * BYTES_PER_TOKEN
        penalties += min(slots, ROWS_AT_ONCE) * config.vocab_size * WORKSPACE_PER_TOKEN
        scratch = config.workspace_bytes(rows, self.dtype.itemsize)
        if self.fill_rows:  # graphs have memory of their own, and what they are captured of runs beside them first
            scratch *= 2
        if self.cuda_graphs:
            scratch += (len(self.buckets) + len(row_buckets(self.fill_rows))) * GRAPH_BYTES
        plan = plan_memory(
            self.found,
            self.placement,
            self.ranks.rank,
            device=self.device,
            cache=config.cache_spec,
            settings=self.cache_settings,
            snapshots=min(slots, MAX_SNAPSHOTS) if self.settings.prefix_reuse and config.cache_spec.delta else 0,
            workspace=scratch + logits + penalties,
            cuts=self._cuts,
            agree=self.ranks.least,  # all ranks plan the same steps
        )
        if self.settings.verbose:
            print(f"memory plan of {self._checkpoint.folder.name}, {self.dtype}:\n{plan.table()}", file=sys.stderr)
        plan.require_fit()
        return plan

    def load_model(self) -> tuple[Model, ExpertBuffers]:
        """Allocates and fills the buffers, and closes the checkpoint."""
        progress = None if self.settings.verbose else False
        with self._checkpoint as checkpoint:
            scales = read_dense_scales(checkpoint, self.found)  # a bad one is found before the experts take memory
            experts = ExpertBuffers.load(
                checkpoint,
                self.found,
                device=self.device,
                placement=self.placement,
                rank=self.ranks.rank,
                fragments=self.fast,
                count_rows=self.settings.count_experts,
                progress=progress,
            )
            weights = load_dense(
                checkpoint,
                self.found,
                device=self.device,
                dtype=self.dtype,
                scales=scales,
                fragments=self.fast and not self._cuts,
                progress=progress,
            )
            if self._cuts:
                shard(weights, self._cuts)
                weights = {name: in_fragments(weight) if self.fast else weight for name, weight in weights.items()}
            collectives = self.ranks.collectives if self.ranks.splits_heads else None
            parts = Parts(
                weights=weights,
                experts=experts,
                dispatcher=self.ranks.dispatcher(experts.tables),
                dtype=self.dtype,
                fast=self.fast,
                batch_invariant=self.determinism is Determinism.KERNELS,
                sum_over_ranks=None if collectives is None else collectives.all_reduce,
            )
            return build_model(checkpoint.config, self.config, parts), experts

    def close(self) -> None:
        self._checkpoint.close()


def _kv_scales(checkpoint: Checkpoint, found: Survey) -> dict[int, tuple[float, float]]:
    """Of K and V, by layer; 1 where the checkpoint has none."""
    scales = {}
    for module, infos in found.kv_scales.items():
        numbers = [part for part in module.split(".") if part.isdecimal()]
        pair = [1.0 if info is None else float(checkpoint.tensor(info.name).float().reshape(-1)[0]) for info in infos]
        if not all(0 < value < math.inf for value in pair):
            raise CheckpointError(f"{module}: k and v scales {pair}; expected positive ones. Use kv_dtype auto.")
        scales[int(numbers[0])] = (pair[0], pair[1])
    return scales


def _media_tokens(config: Config) -> dict[int, str]:
    """Ids that stand for images, video and audio in the config of a model with towers."""
    ids = {kind: config.get(f"{kind}_token_id") for kind in ("image", "video", "audio")}
    return {token: kind for kind, token in ids.items() if type(token) is int}


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
