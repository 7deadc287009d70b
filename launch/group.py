"""`GroupRunner`: a model on several ranks, with the frontend of one. The driver needs no GPU and no checkpoint."""

import tempfile
import threading
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from moe_nvfp4.errors import EngineError, RequestError
from moe_nvfp4.expert_loads import ExpertLoads
from moe_nvfp4.frontend import Frontend
from moe_nvfp4.grammar import Grammars
from moe_nvfp4.launch.group_balance import Rebalanced, rebalance_workers
from moe_nvfp4.launch.group_engine import GroupEngine
from moe_nvfp4.launch.group_workers import GroupSettings, connect
from moe_nvfp4.launch.worker import Profile
from moe_nvfp4.prompts import PromptEncoder
from moe_nvfp4.tokenizer import Tokenizer


class GroupRunner(Frontend):
    """`generate` and `stream` as `MoERunner` has them, over a group of ranks. Takes its settings, and GroupSettings."""

    engine: GroupEngine

    def __init__(self, model: str | Path, settings: GroupSettings, **model_settings: Any):
        verbose = bool(model_settings.get("verbose", True))
        self._connected = connect(settings.device, verbose)
        self._rebalances = threading.Lock()
        self.engine = GroupEngine(str(model), model_settings, settings, verbose)
        profile = self.engine.profile
        self.max_seq_len, self.eos_token_ids = profile.max_seq_len, profile.eos_token_ids
        self.load_seconds = self.engine.load_seconds
        if model_settings.get("count_experts"):
            self.expert_loads = ExpertLoads(self._expert_rows, profile.experts)
        tokenizer, vocabulary = _tokenizer(profile), profile.vocab_size
        self.prompts = PromptEncoder(
            tokenizer,
            vocabulary,
            profile.max_seq_len,
            profile.context_length,
            profile.media_tokens,
            Grammars(tokenizer, vocabulary, profile.eos_token_ids) if tokenizer else None,
        )

    def rebalance(self, max_moves: int | None = None) -> Rebalanced:
        """Moves experts by the rows that were counted since the last time, while requests are served. `max_moves`:
        experts that ranks may read for a layer. For models loaded with count_experts, and best with spare_experts."""
        if self.expert_loads is None:
            raise RequestError("rebalance: rows are not counted; load with count_experts=True")
        with self._rebalances:
            return rebalance_workers(self.engine.workers, self.expert_loads.take(), max_moves)

    def _expert_rows(self) -> dict[int, list[int]]:
        try:
            rows: dict[int, list[int]] = ray.get(self.engine.workers.leader.expert_rows.remote())
        except RayError as error:
            raise EngineError(f"a rank has failed, and the group will be built again: {error}") from error
        return rows

    def close(self) -> None:
        super().close()
        self.prompts.close()
        if self._connected:
            ray.shutdown()


def _tokenizer(profile: Profile) -> Tokenizer | None:
    if not profile.tokenizer_files:
        return None
    with tempfile.TemporaryDirectory() as folder:
        for name, data in profile.tokenizer_files.items():
            (Path(folder) / name).write_bytes(data)
        return Tokenizer.load(Path(folder))
