"""What this process takes of the machine, as metrics with the names that Prometheus's own clients give them."""

import os
import resource
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import torch

from moe_nvfp4.launch.http_metrics import Family, gauge

STARTED: Final = time.time()


def process_figures() -> Iterable[Family]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    yield gauge("process_start_time_seconds", "Since 1970.", [({}, STARTED)])
    yield gauge("process_cpu_seconds_total", "Of all threads.", [({}, used.ru_utime + used.ru_stime)], "counter")
    if Path("/proc/self/statm").exists():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        yield gauge("process_resident_memory_bytes", "In RAM.", [({}, pages * resource.getpagesize())])
        yield gauge("process_open_fds", "Files and sockets.", [({}, len(os.listdir("/proc/self/fd")))])
    if torch.cuda.is_initialized():
        reserved = [({"device": str(d)}, torch.cuda.memory_reserved(d)) for d in range(torch.cuda.device_count())]
        yield gauge("moe_nvfp4_device_memory_bytes", "Taken by this process for tensors.", reserved)
