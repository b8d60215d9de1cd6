"""Timing that can be trusted on a shared machine: candidates alternate, the median counts, ratios come from one run."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import torch
from tqdm import tqdm


@dataclass
class Times:
    """Seconds per call, one entry a repetition: by the clock, and on the CPU (all threads of this process)."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def median_wall(self) -> float:
        return statistics.median(self.wall)

    @property
    def median_cpu(self) -> float:
        return statistics.median(self.cpu)


def alternate(candidates: dict[str, Callable[[], object]], repeats: int = 5, warmup: int = 1) -> dict[str, Times]:
    """Call every candidate in turn, `warmup` times untimed and `repeats` times timed.

    What slows the machine down for a while then hits all candidates alike. On a GPU each call is waited for.
    """
    times = {name: Times() for name in candidates}
    calls = [(repetition, name) for repetition in range(-warmup, repeats) for name in candidates]
    for repetition, name in tqdm(calls, desc="timing", leave=False, disable=None):
        _synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        candidates[name]()
        _synchronize()
        if repetition >= 0:
            times[name].wall.append(time.perf_counter() - wall)
            times[name].cpu.append(time.process_time() - cpu)
    return times


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> str:
    """Date, processor, threads and versions, in one line: the head of every table."""
    parts = [date.today().isoformat(), _processor(), f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    parts += [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    return ", ".join(parts)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
