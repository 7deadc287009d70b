"""Where a decode step's time goes, kernel by kernel and by kind, against the bytes that each kind must move."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Final

import torch

from moe_nvfp4.engine.step_buffers import DecodeRow
from moe_nvfp4.runner import MoERunner

STEPS: Final = 3
# A kernel belongs to the first kind of which a part of its name is known.
KINDS: Final = {
    "router": ("logits_few", "logits_tile", "choose_rows", "group_pairs", "count_pairs", "scatter_pairs"),
    "experts": ("_pairs", "_grouped", "_many", "combine", "arrange"),
    "cache": ("splits", "step_heads"),
    "norms, heads, activations": ("add_and_norm", "norm_rotate", "activate_rows", "add_share"),
    "sampling": ("summarise", "choose_tokens"),
    "dense": ("dense_", "decode_nvfp4", "decode_fp8", "gemm", "gemv", "cutlass", "nvjet", "splitK"),
}


def explain(
    runner: MoERunner, rows: Sequence[DecodeRow], moved: dict[str, float], bytes_per_second: float | None
) -> str:
    """Runs a few steps more, from `rows` on."""
    times: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for _ in range(2):  # the profiler's first records come late
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
            for _ in range(STEPS):
                runner.stepper.decode(rows)
                rows = [row._replace(position=row.position + 1) for row in rows]
            torch.cuda.synchronize()
    for event in profile.events():
        if event.device_type == torch.profiler.DeviceType.CUDA:
            times[event.name] += event.device_time_total / STEPS
            calls[event.name] += 1
    kinds: dict[str, float] = defaultdict(float)
    lines = ["  kernel                                              calls   us a step  kind"]
    for name, time in sorted(times.items(), key=lambda item: -item[1]):
        kind = kind_of(name)
        kinds[kind] += time
        lines.append(f"  {name[:50]:<50}{calls[name] / STEPS:>7.0f}{time:>12.1f}  {kind}")
    lines.append("  kind                              us a step   MB to move    us at full bandwidth")
    by_kind = {"dense": moved["attention and mixers"] + moved["dense MLP"] + moved["head"]}
    by_kind |= {kind: moved[kind] for kind in ("experts", "router", "cache")}
    for kind in [*(kind for kind in moved if kind in kinds), *(kind for kind in kinds if kind not in moved)]:
        nbytes = by_kind.get(kind, 0.0)
        floor = f"{1e6 * nbytes / bytes_per_second:>10.1f}" if bytes_per_second and nbytes else ""
        lines.append(f"  {kind:<30}{kinds[kind]:>12.1f}{nbytes / 1e6:>13.1f}{floor}".rstrip())
    total = sum(kinds.values())
    lines.append(f"  sum{total:>39.1f}   (kernels launched early overlap: a step takes less than their sum)")
    return "\n".join(lines)


def kind_of(kernel: str) -> str:
    for kind, names in KINDS.items():
        if any(name in kernel for name in names):
            return kind
    return "other"
