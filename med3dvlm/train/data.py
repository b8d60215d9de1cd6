"""What the stages ask of their data before they start: how were they prepared, where are images read, what may turn."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from med3dvlm.data.augment import allowed_augmentation
from med3dvlm.data.cache import build_cache
from med3dvlm.data.codes import FileImages
from med3dvlm.data.datasets import ImageSource
from med3dvlm.data.manifest import CaptionRecord, ManifestError, VQARecord
from med3dvlm.data.presets import PreprocessConfig, check_preparation
from med3dvlm.data.profile import DataProfile, read_preparation
from med3dvlm.data.volume import prepared_header
from med3dvlm.train.arguments import DataArguments

logger = logging.getLogger("med3dvlm.train")
Record = CaptionRecord | VQARecord


def require_samples(records: Sequence[Record], *sources: str) -> None:
    """Raise ManifestError where the manifests and tables that `sources` name hold nothing to train on."""
    if not records:
        raise ManifestError(f"{', '.join(sources)}: no rows to train on")


def preparation_of(records: Sequence[Record], data_args: DataArguments) -> tuple[PreprocessConfig, DataProfile]:
    """The pipeline and the profile that the data were prepared with, from the nearest `preparation.json` between the
    first image and the data root. Without one: the published pipeline, and nothing known of the data.

    Raises ManifestError where that file cannot be used.
    """
    root = Path(data_args.data_root).absolute()
    for folder in Path(records[0].image).absolute().parents if records else ():
        try:
            found = read_preparation(folder)
        except ValueError as error:
            raise ManifestError(str(error)) from error
        if found:
            return found
        if folder == root:
            break
    return PreprocessConfig(), DataProfile()


def tell_about_preparation(records: Sequence[Record], config: PreprocessConfig) -> None:
    """Log the pipeline, and once where the data went through another one or have another size.

    The first image stands for all: a folder is prepared in one way.
    """
    logger.info("preprocessing: %s", config)
    header = prepared_header(records[0].image) if records else None
    if header is None:
        return
    mismatch = check_preparation(header["preparation"], config)
    if mismatch:
        logger.warning("%s: %s", records[0].image, mismatch)
    if tuple(header["shape"]) != config.size:
        found, expected = ("x".join(map(str, size)) for size in (header["shape"], config.size))
        logger.warning("%s: is prepared as %s, the model sees %s: every volume is resized", records[0].image, found,
                       expected)  # fmt: skip


def open_images(
    records: Sequence[Record], config: PreprocessConfig, data_args: DataArguments, quiet: bool
) -> ImageSource:
    """The images of all records: from the cache, which is built first where need be, or from their files."""
    if data_args.image_cache is None:
        return FileImages(config)
    folder = Path(data_args.data_root) / "image_cache" if data_args.image_cache == "auto" else data_args.image_cache
    return build_cache(folder, records, config, data_args.max_bad_samples, quiet=quiet)


def choose_augmentation(asked: str, records: Sequence[Record]) -> str:
    """The augmentation of a run: "auto" turns scans only where no text says which side is which.

    Logs a warning where turns are asked for against the texts.
    """
    if asked not in ("auto", "published"):
        return asked
    allowed = allowed_augmentation(_texts(records))
    if asked == "auto":
        logger.info("augmentation: %s", allowed)
        return allowed
    if allowed != "published":
        logger.warning("--augment published turns and flips scans whose texts name sides or planes, which are wrong "
                       "then; --augment auto changes their intensities only")  # fmt: skip
    return asked


def _texts(records: Iterable[Record]) -> Iterator[str]:
    for record in records:
        if isinstance(record, VQARecord):
            yield f"{record.question} {record.answer}"
            continue
        try:
            yield record.read_text()
        except ManifestError:  # bad samples may be allowed; the data set meets this one when it is its turn
            continue
