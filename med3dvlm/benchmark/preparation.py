"""Preparing raw series, timed beside the plain formulation: cases per second and core, both in one run.

python -m med3dvlm.benchmark.preparation --cases 3 --repeats 5
"""

import argparse
import os
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from PIL import Image

from med3dvlm.benchmark.timing import alternate, table
from med3dvlm.data.presets import PUBLISHED_SIZE, PreprocessConfig
from med3dvlm.data.sources.base import Case
from med3dvlm.data.volume import load_volume, slice_files
from med3dvlm.data.work import CaseWorker, Options, Task

SLICES, WIDTH = 100, 512
DTYPES = ("uint8", "float16", "float32")


def write_case(folder: Path, seed: int) -> None:
    """A raw case: a report, and a series of grey JPEG slices that show a body with organs, bones, table and noise."""
    rng = np.random.default_rng(seed)
    series = folder / "Axial_C__arterial_phase"
    series.mkdir(parents=True)
    (folder / "text.txt").write_text("study_findings: No finding, this is a drawing.\n")
    y, x = np.mgrid[-1 : 1 : WIDTH * 1j, -1 : 1 : WIDTH * 1j]
    for number, z in enumerate(np.linspace(-1, 1, SLICES)):
        body = (x / 0.95) ** 2 + (y / 0.75) ** 2 < 1 - 0.1 * z**2
        plane = np.where(body, 0.42, 0.0)
        for shift, half in ((-0.4, 0.3), (0.4, 0.22), (0.0, 0.12)):
            organ = ((x - shift) / half) ** 2 + ((y + 0.1 * shift) / (half * 1.2)) ** 2 < 1 - z**2
            plane[organ] = 0.5 + 0.2 * np.sin(5 * shift + 3 * z)
        plane[(x / 0.09) ** 2 + ((y - 0.42) / 0.09) ** 2 < 1] = 0.95
        plane[abs(y - 0.88 - 0.05 * x**2) < 0.012] = 0.6
        plane[8:20, 8:12] = plane[-20:-8, -12:-8] = 0.9  # marks in the corners, as most slices have
        # The noise of a reconstruction has a grain of some pixels (here 12 HU in a window of 400); air is below the
        # window, and black.
        noise = cv2.GaussianBlur(rng.standard_normal(plane.shape, dtype=np.float32), (0, 0), 0.8)
        grey = np.clip(plane + 0.085 * noise * (plane > 0), 0, 1)
        Image.fromarray((grey * 255).astype(np.uint8)).save(series / f"{number}.jpeg", quality=90)


def prepare_plainly(series: Path, target: Path) -> None:
    """What one writes down first: Pillow slice by slice, float64 arrays, torch, SimpleITK."""
    slices = []
    for file in slice_files(series):
        with Image.open(file) as image:
            slices.append(np.array(image.convert("L"), dtype=np.float64) / 255)
    volume = np.stack(slices)  # [D, H, W]
    volume = volume - volume.min()
    volume = volume / max(volume.max(), 1e-8)
    inside = volume > 0
    ends = [np.flatnonzero(inside.any(axis=axes))[[0, -1]] for axes in ((1, 2), (0, 2), (0, 1))]
    volume = volume[tuple(slice(first, last + 1) for first, last in ends)].astype(np.float32)
    resized = F.interpolate(
        torch.from_numpy(volume)[None, None], size=PUBLISHED_SIZE, mode="trilinear", align_corners=False
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(resized[0, 0].numpy()), target, useCompression=True)


def report(cases: int, repeats: int) -> str:
    """Prepare `cases` cases, `repeats` times each way in turn, in this process; a Markdown table."""
    with TemporaryDirectory() as folder:
        return _report(Path(folder), cases, repeats)


def _report(folder: Path, count: int, repeats: int) -> str:
    cases = [Case(f"ct_case/{number:06d}", raw=folder / "raw" / f"{number:06d}") for number in range(count)]
    for number, case in enumerate(cases):
        write_case(case.raw, number)
    name = "Axial_C__arterial_phase"

    def plainly():
        for case in cases:
            target = folder / "plain" / case.folder / f"{name}.nii.gz"
            target.unlink(missing_ok=True)  # a file system may take its time to replace what is there
            prepare_plainly(case.raw / name, target)

    def ours(work: CaseWorker):
        for case in cases:
            (work.options.output / case.folder / f"{name}.nii.gz").unlink(missing_ok=True)
            list(work(Task(case)))

    options = {
        dtype: Options(folder / "raw", folder / dtype, PreprocessConfig(size=PUBLISHED_SIZE), dtype) for dtype in DTYPES
    }
    ways = {dtype: partial(ours, CaseWorker(options[dtype])) for dtype in DTYPES}
    times = alternate({"plain": plainly, **ways}, repeats)
    rows = [_row(key, times[key], times["plain"], folder / key, folder / "plain", count) for key in times]
    header = ["", "wall s", "CPU s", "cases / s", "wall ratio", "CPU ratio", "MB", "size ratio", "max abs difference"]
    kilobytes = sum(file.stat().st_size for case in cases for file in case.raw.rglob("*.jpeg")) / count / SLICES / 1000
    tuned = "set" if "GLIBC_TUNABLES" in os.environ else "not set"
    title = (
        f"Preparation, one process, {count} cases of {SLICES} JPEG slices of {WIDTH}x{WIDTH} ({kilobytes:.0f} kB), "
        f"median of {repeats}; GLIBC_TUNABLES {tuned}; seconds and MB are per case:"
    )
    return f"{title}\n\n{table(header, rows)}"


def _row(name: str, times, plain, folder: Path, plain_folder: Path, count: int) -> list[str]:
    files, expected = (sorted(path.rglob("*.nii.gz")) for path in (folder, plain_folder))
    size, plain_size = (sum(file.stat().st_size for file in group) / count / 1e6 for group in (files, expected))
    difference = max(
        float(np.abs(load_volume(a).array - load_volume(b, "stored").array).max())
        for a, b in zip(files, expected, strict=True)
    )
    return [
        "plain" if name == "plain" else f"ours, {name}",
        f"{times.median_wall / count:.3f}",
        f"{times.median_cpu / count:.3f}",
        f"{count / times.median_wall:.2f}",
        f"{plain.median_wall / times.median_wall:.1f}",
        f"{plain.median_cpu / times.median_cpu:.1f}",
        f"{size:.1f}",
        f"{plain_size / size:.1f}",
        f"{difference:.2e}",
    ]


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    torch.set_num_threads(1)  # what is compared is the work of one core
    print(report(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    main()
