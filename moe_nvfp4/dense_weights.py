"""Everything but the routed experts: allocated once, filled by the same stream, packed weights stay packed."""

from collections.abc import Mapping

import torch

from moe_nvfp4.checkpoint import Checkpoint
from moe_nvfp4.kernels.linear import DenseWeight, in_fragments
from moe_nvfp4.kernels.nvfp4 import BLOCK, FP8Tensor, NVFP4Tensor
from moe_nvfp4.progress import Progress
from moe_nvfp4.scales import check_block_scales, fp8_scale, global_multiplier
from moe_nvfp4.streaming import DEFAULT_READERS, Transfer, stream
from moe_nvfp4.survey import Survey
from moe_nvfp4.weight_source import WeightSource

DenseWeights = dict[str, DenseWeight]  # normalised parameter name -> weight
DenseScales = Mapping[str, torch.Tensor | None]  # the same -> global scale or FP8 scale


def load_dense(
    checkpoint: Checkpoint,
    found: Survey,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    scales: DenseScales | None = None,
    fragments: bool = False,
    readers: int = DEFAULT_READERS,
    progress: bool | None = None,
) -> DenseWeights:
    """Plain weights take `dtype`, except that float32 stays float32; NVFP4 and FP8 stay as they are.

    `scales` are those of `read_dense_scales`, for callers that take other memory first. `fragments`, on a GPU,
    re-orders NVFP4 in place for the tensor-core kernels.
    """
    scales = scales or read_dense_scales(checkpoint, found, readers=readers)
    weights: dict[str, DenseWeight] = {}
    transfers: list[Transfer] = []
    for name, source in found.dense.items():
        weights[name], filled = _allocate(source, scales[name], device, dtype)
        transfers += filled
    with Progress("dense  ", sum(t.source.nbytes for t in transfers), enabled=progress) as bar:
        stream(checkpoint.files, transfers, readers=readers, progress=bar)
    return {name: in_fragments(weight) for name, weight in weights.items()} if fragments else weights


def read_dense_scales(checkpoint: Checkpoint, found: Survey, *, readers: int = DEFAULT_READERS) -> DenseScales:
    """Checks every scale of the dense weights, and keeps the small ones; no weight is read or allocated."""
    found.require_complete(str(checkpoint.folder))
    check_block_scales(checkpoint, found.dense.values(), readers)
    return {name: _scale(checkpoint, source) for name, source in found.dense.items()}


def kept_dtype(source: WeightSource, dtype: torch.dtype) -> torch.dtype:
    """In memory, for a plain weight."""
    return torch.float32 if source.weight.dtype == "F32" else dtype


def dense_bytes(source: WeightSource, dtype: torch.dtype) -> int:
    """Bytes that `load_dense` allocates for one weight."""
    count = torch.Size(source.shape).numel()
    if source.format == "plain":
        return count * kept_dtype(source, dtype).itemsize
    if source.format == "nvfp4":
        return count // 2 + count // BLOCK + 4
    assert source.scale is not None
    return count + 4 * torch.Size(source.scale.shape).numel()


def _scale(checkpoint: Checkpoint, source: WeightSource) -> torch.Tensor | None:
    if source.format == "nvfp4":
        return torch.tensor(global_multiplier(checkpoint, source))
    if source.format == "fp8":
        values = fp8_scale(checkpoint, source)
        return values.reshape(()) if values.numel() == 1 else values
    return None


def _allocate(
    source: WeightSource, scale: torch.Tensor | None, device: torch.device | str, dtype: torch.dtype
) -> tuple[DenseWeight, list[Transfer]]:
    if scale is None:
        plain = torch.empty(source.shape, dtype=kept_dtype(source, dtype), device=device)
        return plain, [Transfer(source.weight, plain)]
    rows, columns = source.shape
    if source.format == "fp8":
        values = torch.empty(rows, columns, dtype=torch.uint8, device=device)
        return FP8Tensor(values, scale.to(device)), [Transfer(source.weight, values)]
    assert source.scale is not None
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=device)
    block_scales = torch.empty(rows, columns // BLOCK, dtype=torch.uint8, device=device)
    filled = [Transfer(source.weight, codes), Transfer(source.scale, block_scales)]
    return NVFP4Tensor(codes, block_scales, scale.to(device)), filled
