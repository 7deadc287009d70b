"""How a model is to run: what `MoERunner.from_pretrained` takes beside the checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe_nvfp4.engine.scheduler import STRETCH
from moe_nvfp4.engine.step_buffers import buckets_up_to
from moe_nvfp4.errors import RequestError

DEFAULT_SEQ_LEN = 4096
MAX_BATCH_SIZE = 4096
KV_DTYPES = ("auto", "fp8")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunnerSettings:
    """What is wrong whatever the model raises RequestError at once.

    device          cpu, cuda or cuda:N; default: the GPU where there is one
    dtype           of activations and plain weights; default: bfloat16 on a GPU, float32 on a CPU
    max_batch_size  requests at once; in a group those of all ranks
    max_seq_len     tokens of a prompt and its answer; default: 4096, or the model's context if that is less
    kv_dtype        fp8 keeps keys and values as E4M3
    cuda_graphs     without them a GPU takes the same steps launch by launch
    buckets         batch sizes that get a graph, the largest of them max_batch_size; default: some sizes up to it
    prefix_reuse    what a prompt has in common with one before it is not computed again
    deterministic   the same request gives the same tokens and log-probabilities, to the last bit, whatever else runs
                    (see determinism.py); slower, and for one rank only
    max_waiting     requests that may wait, beyond max_batch_size
    stretch         a step of answers takes about so many times as long, at most, for the prompts beside it; math.inf
                    cuts no prompts, which gives the most tokens a second and the longest gaps between them
    warm_up         on a GPU: compile and capture at once what prompts of any length need, and not when the first comes
    count_experts   count the rows that each expert takes, for `expert_loads`; one launch more a layer
    spare_experts   replicas on each rank beyond an even share, whose places `Rebalancing` may use otherwise
    verbose         print the memory plan and what takes time
    """

    device: str | torch.device | None = None
    dtype: str | torch.dtype | None = None
    max_batch_size: int = 8
    max_seq_len: int | None = None
    kv_dtype: str = "auto"
    cuda_graphs: bool = True
    buckets: Sequence[int] | None = None
    prefix_reuse: bool = True
    deterministic: bool = False
    max_waiting: int = 4096
    stretch: float = STRETCH
    warm_up: bool = False
    count_experts: bool = False
    spare_experts: int = 0
    verbose: bool = True

    def __post_init__(self) -> None:
        if type(self.max_batch_size) is not int or not 1 <= self.max_batch_size <= MAX_BATCH_SIZE:
            raise RequestError(f"max_batch_size: got {self.max_batch_size!r}; expected 1 to {MAX_BATCH_SIZE}")
        if type(self.max_waiting) is not int or self.max_waiting < 0:
            raise RequestError(f"max_waiting: got {self.max_waiting!r}; expected a number of requests from 0")
        if not isinstance(self.stretch, int | float) or not self.stretch >= 1:
            raise RequestError(f"stretch: got {self.stretch!r:.40}; expected a number from 1, math.inf for no limit")
        if self.kv_dtype not in KV_DTYPES:
            raise RequestError(f"kv_dtype: got {self.kv_dtype!r:.40}; expected one of {', '.join(KV_DTYPES)}")
        if type(self.spare_experts) is not int or self.spare_experts < 0:
            raise RequestError(f"spare_experts: got {self.spare_experts!r}; expected a number of experts from 0")

    def chosen_device(self) -> torch.device:
        try:
            chosen = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except RuntimeError:
            raise RequestError(f"device {self.device!r}: expected cpu, cuda or cuda:N") from None
        if chosen.type == "cuda":
            if not torch.cuda.is_available():
                raise RequestError(
                    "device cuda: torch sees no GPU here; use device cpu, or install a CUDA build of torch"
                )
            count, index = torch.cuda.device_count(), chosen.index or 0
            if index >= count:
                raise RequestError(
                    f"device {chosen}: this machine has {count} GPUs; expected cuda:0 to cuda:{count - 1}"
                )
            return torch.device("cuda", index)
        if chosen.type != "cpu":
            raise RequestError(f"device {chosen}: expected cpu, cuda or cuda:N")
        return chosen

    def chosen_dtype(self, device: torch.device) -> torch.dtype:
        if self.dtype is None or self.dtype == "auto":
            return torch.bfloat16 if device.type == "cuda" else torch.float32
        chosen = DTYPES.get(self.dtype) if isinstance(self.dtype, str) else self.dtype
        if chosen is None or chosen not in DTYPES.values():
            raise RequestError(f"dtype {self.dtype}: expected one of {', '.join(DTYPES)}")
        return chosen

    def length_limit(self, context: int) -> int:
        """`context`: the model's."""
        if self.max_seq_len is None:
            return min(DEFAULT_SEQ_LEN, context)
        if type(self.max_seq_len) is not int or not 2 <= self.max_seq_len <= context:
            raise RequestError(f"max_seq_len: got {self.max_seq_len!r}; expected 2 to {context:,}, the model's context")
        return self.max_seq_len

    def chosen_buckets(self, slots: int) -> list[int]:
        """`slots`: of max_batch_size those of one rank."""
        if self.buckets is None:
            return buckets_up_to(slots)
        sizes = sorted(set(self.buckets))
        if not sizes or sizes[0] < 1 or sizes[-1] != slots:
            raise RequestError(f"buckets: got {list(self.buckets)}; expected batch sizes up to max_batch_size, {slots}")
        return sizes
