"""How long a training waits for its images: plain readers against ours, on volumes of 128 x 256 x 256.

    sh scripts/benchmark.sh data --only loading

The plain way is the published one: float32 `.nii.gz`, read by SimpleITK in a loader's process, float32 batches.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import nibabel
import numpy as np
import SimpleITK
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from med3dvlm.benchmark.timing import alternate, table
from med3dvlm.data.augment import to_unit
from med3dvlm.data.cache import build_cache
from med3dvlm.data.codes import FileImages
from med3dvlm.data.presets import PUBLISHED_SIZE, PreprocessConfig
from med3dvlm.data.volume import write_prepared
from med3dvlm.model.dcformer import DCFormer

CONFIG = PreprocessConfig("published", PUBLISHED_SIZE)
VOLUMES = 8  # more than a CPU cache holds
BATCH = 2
STEPS = 4
SECONDS = 2.0  # of each throughput measurement


@dataclass
class _Record:
    image: str
    where: str = "benchmark"


def volume(seed: int) -> np.ndarray:
    """A body of smooth and noisy texture that reaches the borders, as after cropping: float32 `[D, H, W]` in 0..1."""
    rng = np.random.default_rng(seed)
    d, h, w = (np.linspace(-1, 1, n, dtype=np.float32) for n in PUBLISHED_SIZE)
    inside = h[:, None] ** 2 + w**2 < 1  # [H, W]
    smooth = 0.45 + 0.3 * np.sin(9 * d + seed)[:, None, None] * np.cos(12 * h)[:, None] * np.cos(10 * w)
    noise = rng.standard_normal(PUBLISHED_SIZE, dtype=np.float32) * np.float32(0.04)
    return np.where(inside, smooth + noise, 0).clip(0, 1).astype(np.float32)


def simpleitk_image(path: str) -> torch.Tensor:
    """As the published data sets read a volume: float32 `[1, D, H, W]`."""
    return torch.from_numpy(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(path)))[None]


def nibabel_image(path: str) -> torch.Tensor:
    """float32 `[1, D, H, W]` through nibabel."""
    return torch.from_numpy(np.asarray(nibabel.load(path).dataobj, dtype=np.float32).T)[None]


class _Images(Dataset):
    """Over and over the same files, for longer than anybody measures."""

    def __init__(self, read: Callable[[str], torch.Tensor], paths: list[str]):
        self.read, self.paths = read, paths

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.read(self.paths[index % len(self.paths)])


@dataclass
class Sources:
    """Ways to the same images: name -> (reader, paths)."""

    ways: dict[str, tuple[Callable[[str], torch.Tensor], list[str]]]

    def loader(self, name: str, workers: int) -> DataLoader:
        return DataLoader(_Images(*self.ways[name]), BATCH, num_workers=workers)


PLAIN, NIBABEL = "SimpleITK, float32 .nii.gz (plain)", "nibabel, float32 .nii.gz"
OURS, CACHE = "ours, uint8 .nii.gz", "ours, cache"


def write_sources(folder: Path) -> Sources:
    """Write the volumes both ways, and the cache."""
    plain, ours = ([str(folder / name / f"{i}.nii.gz") for i in range(VOLUMES)] for name in ("float32", "uint8"))
    (folder / "float32").mkdir()
    for i in range(VOLUMES):
        array = volume(i)
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), plain[i], useCompression=True)
        write_prepared(ours[i], array, "uint8")
    cache = build_cache(folder / "cache", [_Record(path) for path in ours], CONFIG, quiet=True)
    return Sources({PLAIN: (simpleitk_image, plain), NIBABEL: (nibabel_image, plain),
                    OURS: (FileImages(CONFIG), ours), CACHE: (cache, ours)})  # fmt: skip


def sample_times(sources: Sources, repeats: int) -> str:
    """Milliseconds a sample, one thread, page cache warm; every call reads another file."""
    buffer = torch.empty(1, 1, *PUBLISHED_SIZE)

    def calls(name: str, deliver: Callable[[torch.Tensor], object]) -> Callable[[], object]:
        read, paths = sources.ways[name]
        endless = itertools.cycle(paths)
        return lambda: deliver(read(next(endless)))

    def batch(image: torch.Tensor) -> torch.Tensor:
        return default_collate([image])  # [1, 1, D, H, W], the copy that every loader makes

    candidates = {name: calls(name, batch) for name in (PLAIN, NIBABEL)}
    candidates |= {f"{name}: uint8": calls(name, batch) for name in (OURS, CACHE)}
    into_buffer = calls(CACHE, lambda image: to_unit(image[None], out=buffer))
    candidates[f"{CACHE}: float32 in a reused buffer"] = into_buffer
    times = alternate(candidates, repeats, warmup=VOLUMES)
    plain = times[PLAIN].median_wall
    rows = [[name, f"{1000 * t.median_wall:.2f}", f"{plain / t.median_wall:.1f}"] for name, t in times.items()]
    return table(["one sample, one thread", "ms", "times as fast"], rows)


def throughput(sources: Sources) -> str:
    """Samples a second through a DataLoader whose batches nobody uses."""
    rows = []
    for name in (PLAIN, OURS, CACHE):
        rates = [f"{_rate(sources.loader(name, workers)):.0f}" for workers in (0, 1, 2)]
        rows.append([name, *rates])
    return table(["samples per second", "no worker", "1 worker", "2 workers"], rows)


def _rate(loader: DataLoader) -> float:
    batches = iter(loader)
    for _ in range(2 * max(1, loader.num_workers) + 2):  # past the start, and what was read meanwhile
        next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() < start + SECONDS:
        count += len(next(batches))
    return count / (time.perf_counter() - start)


def waiting(sources: Sources) -> str:
    """The share of training steps that waits for data, and samples a second: a real encoder, forward and backward."""
    encoder = DCFormer.from_variant("nano")
    optimizer = torch.optim.SGD(encoder.parameters(), lr=1e-6)
    rows = []
    for name in (PLAIN, OURS, CACHE):
        cells = [_steps(encoder, optimizer, sources.loader(name, workers)) for workers in (0, 1)]
        rows.append([name, *(f"{100 * share:.1f} % ({rate:.2f})" for share, rate in cells)])
    head = f"share of a training step that waits (samples per second), DCFormer nano, batch {BATCH}"
    return table([head, "no worker", "1 worker"], rows)


def _steps(encoder: DCFormer, optimizer: torch.optim.Optimizer, loader: DataLoader) -> tuple[float, float]:
    batches, waited, start = iter(loader), 0.0, 0.0
    for step in range(STEPS + 1):
        if step == 1:  # the first one also starts the workers
            waited, start = 0.0, time.perf_counter()
        asked = time.perf_counter()
        images = next(batches)  # [BATCH, 1, D, H, W]
        waited += time.perf_counter() - asked
        sum(hidden.square().mean() for hidden in encoder(to_unit(images))).backward()
        optimizer.step()
        optimizer.zero_grad()
    total = time.perf_counter() - start
    return waited / total, STEPS * BATCH / total


def report(arguments: argparse.Namespace) -> str:
    """All measurements as Markdown, about a minute and a half on two cores.

    arguments: `repeats`, which is counted three times for the times of single samples.
    """
    with TemporaryDirectory() as folder:
        sources = write_sources(Path(folder))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        times = sample_times(sources, 3 * arguments.repeats)
        torch.set_num_threads(threads)
        return "\n\n".join([times, throughput(sources), waiting(sources)])
