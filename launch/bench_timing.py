"""Time on the GPU by graph replays, and the ceilings that a share is a share of."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

REPLAYS = 15
WARM_UPS = 3
READ_BYTES = 4 << 30
HOST_READ_BYTES = 256 << 20  # more than caches hold
MATMUL_SIZE = 8192


class Timing(NamedTuple):
    """Microseconds of one call: the median over replays, the fastest and the slowest."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Ceilings:
    device: str
    bytes_per_second: float  # reading memory
    flops_per_second: float  # bfloat16 product
    l2_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.device}: reads {self.bytes_per_second / 1e12:.2f} TB/s, bf16 product "
            f"{self.flops_per_second / 1e12:.0f} TFLOP/s, L2 {self.l2_bytes / 1e6:.0f} MB"
        )


def graph_time(calls: Sequence[Callable[[], object]], replays: int = REPLAYS) -> Timing:
    """One graph holds all calls, so that a launch costs what it costs in a captured step. Nothing may synchronise."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # In another thread NCCL asks about its events, which a capture of the whole process would not bear.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for call in calls:
            call()
    for _ in range(WARM_UPS):
        graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    for begin, end in events:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = [begin.elapsed_time(end) * 1e3 / len(calls) for begin, end in events]
    return Timing(statistics.median(times), min(times), max(times))


@cache
def measure_read(device: torch.device) -> float:
    """Bytes a second of a reduction over memory, measured once: a server asks for each of its models."""
    if device.type != "cuda":
        return _measure_host_read()
    with torch.cuda.device(device):
        count = min(READ_BYTES, torch.cuda.mem_get_info()[0] // 2) // 4
        data = torch.empty(count, dtype=torch.float32, device="cuda").uniform_()
        median = graph_time([data.sum]).median
        del data
        torch.cuda.empty_cache()
        return 4e6 * count / median


def _measure_host_read() -> float:
    data, times = torch.ones(HOST_READ_BYTES // 4), []
    for _ in range(WARM_UPS):
        began = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - began)
    return HOST_READ_BYTES / min(times)


def measure_ceilings() -> Ceilings:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    read, size = measure_read(torch.device("cuda", torch.cuda.current_device())), MATMUL_SIZE
    a, b = (torch.randn(size, size, device="cuda").bfloat16() for _ in range(2))
    product = graph_time([lambda: a @ b] * 4)
    return Ceilings(
        device=properties.name,
        bytes_per_second=read,
        flops_per_second=2e6 * size**3 / product.median,
        l2_bytes=properties.L2_cache_size,
    )
