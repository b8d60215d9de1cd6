"""Codes and the image cache: equal to the files, built once, resumed after a kill, stale entries noticed."""

import multiprocessing
import os
import pickle
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from isal import igzip
from torch.utils.data import DataLoader

from med3dvlm.data import cache as module
from med3dvlm.data.augment import to_unit
from med3dvlm.data.cache import CacheError, ImageCache, build_cache
from med3dvlm.data.codes import FileImages, read_codes, to_codes
from med3dvlm.data.preprocess import PreprocessConfig, preprocess
from med3dvlm.data.volume import VolumeError, load_volume, write_prepared

SIZE = (8, 16, 12)
CONFIG = PreprocessConfig("published", SIZE)


@dataclass
class Record:
    image: str

    @property
    def where(self) -> str:
        return f"manifest, row {Path(self.image).name[0]}"


def volume(seed=0, size=SIZE):
    return np.random.default_rng(seed).random(size, dtype=np.float32)


@pytest.fixture
def records(tmp_path):
    """Six files: prepared uint8 (0 to 2), prepared float32 (3), another size (4), a raw array (5)."""
    files = [tmp_path / "data" / f"{i}.nii.gz" for i in range(5)]
    for i, file in enumerate(files):
        size = (6, 10, 10) if i == 4 else SIZE
        write_prepared(file, volume(i, size), "float32" if i == 3 else "uint8")
    np.save(tmp_path / "data" / "5.npy", volume(5, (9, 20, 11)) * 1000)
    return [Record(str(file)) for file in (*files, tmp_path / "data" / "5.npy")]


def build(tmp_path, records, **options):
    return build_cache(tmp_path / "cache", records, CONFIG, quiet=True, **options)


def from_file(record):
    return preprocess(load_volume(record.image), CONFIG)


# ---------------------------------------------------------------- codes


def test_codes_are_nearest_and_exact_for_codes():
    image = volume()
    assert np.abs(to_codes(image) / 255.0 - image).max() <= 1 / 510 + 1e-6
    codes = np.arange(256, dtype=np.uint8)
    assert np.array_equal(to_codes(codes * np.float32(1 / 255)), codes)
    assert np.array_equal(to_codes((codes / 255).astype(np.float32)), codes)


def test_codes_converted_equal_the_volume_to_the_bit(records):
    for record in records[:3]:
        codes = read_codes(record.image, SIZE)
        assert codes.dtype == np.uint8 and codes.shape == SIZE
        assert torch.equal(to_unit(torch.from_numpy(codes)[None, None])[0], from_file(record))


def test_other_files_have_no_codes_and_take_the_usual_way(records, tmp_path):
    text = tmp_path / "text.nii.gz"
    text.write_text("not gzip")
    for path in [*(record.image for record in records[3:]), text, tmp_path / "absent.nii.gz", tmp_path]:
        assert read_codes(path, SIZE) is None
    images = FileImages(CONFIG)
    for record in records[3:]:
        assert torch.equal(images(record.image), from_file(record))
    for path in (text, tmp_path / "absent.nii.gz"):
        with pytest.raises(VolumeError, match=path.name):
            images(path)


@pytest.mark.parametrize("damage", ["cut off", "changed", "too long"])
def test_damaged_voxels_are_an_error_that_names_the_file(records, damage):
    file = Path(records[0].image)
    data = file.read_bytes()
    if damage == "cut off":
        data = data[:-300]
    elif damage == "changed":
        data = data[:-200] + bytes(20) + data[-180:]
    else:
        data = igzip.compress(igzip.decompress(data) + b"x")
    file.write_bytes(data)
    with pytest.raises(VolumeError, match="0.nii.gz"):
        FileImages(CONFIG)(file)


def test_a_header_that_only_promises_is_not_believed(tmp_path):
    """A few bytes that inflate to gigabytes stay few: no more is read than the size says."""
    write_prepared(tmp_path / "a.nii.gz", volume(), "uint8")
    with open(tmp_path / "b.nii.gz", "wb") as file:
        file.write(igzip.compress(igzip.decompress((tmp_path / "a.nii.gz").read_bytes())[:352] + bytes(50_000_000)))
    with pytest.raises(VolumeError, match="doesn't hold the 1536 voxels"):
        read_codes(tmp_path / "b.nii.gz", SIZE)


# ---------------------------------------------------------------- what the cache holds


def test_the_cache_holds_what_the_files_hold(tmp_path, records):
    cache = build(tmp_path, records)
    assert not cache.missing(record.image for record in records)
    for i, record in enumerate(records):
        image = cache(record.image)
        assert image.dtype == torch.uint8 and image.shape == (1, *SIZE)
        error = (to_unit(image[None])[0] - from_file(record)).abs().max()
        assert error == 0 if i < 3 else error <= 1 / 510 + 1e-6


def test_images_are_views_of_the_map(tmp_path, records):
    cache = build(tmp_path, records)
    starts = {cache(record.image).untyped_storage().data_ptr() for record in records}
    assert len(starts) == 1


def test_a_second_start_builds_nothing(tmp_path, records, monkeypatch):
    first = build(tmp_path, records)
    before = first.data_file.stat()
    monkeypatch.setattr(module, "_fill", None)  # what would build cannot be called
    again = build(tmp_path, records)
    assert again.index == first.index and again.data_file.stat().st_mtime_ns == before.st_mtime_ns


def test_a_complete_cache_may_be_read_only(tmp_path, records, monkeypatch):
    build(tmp_path, records)
    monkeypatch.setattr(module, "_only_builder", None)
    assert build(tmp_path, records)(records[0].image).shape == (1, *SIZE)


def test_more_images_are_added(tmp_path, records):
    first = build(tmp_path, records[:2])
    before = first(records[0].image).clone()
    cache = build(tmp_path, records[1:])
    assert torch.equal(cache(records[0].image), before) and torch.equal(first(records[0].image), before)
    assert torch.equal(cache(records[4].image), build(tmp_path / "new", records)(records[4].image))


def test_another_preprocessing_has_another_cache(tmp_path, records):
    other = PreprocessConfig("published", (4, 8, 8))
    small = build_cache(tmp_path / "cache", records, other, quiet=True)
    cache = build(tmp_path, records)
    assert small(records[0].image).shape == (1, 4, 8, 8) and cache(records[0].image).shape == (1, *SIZE)
    assert small.folder != cache.folder


def test_the_cache_may_move_with_its_data(tmp_path, records):
    build(tmp_path / "a", [Record(copy(record, tmp_path / "a")) for record in records])
    (tmp_path / "a").rename(tmp_path / "b")
    moved = ImageCache(tmp_path / "b" / "cache", CONFIG)
    assert not moved.missing(str(tmp_path / "b" / Path(record.image).name) for record in records)


def copy(record, folder):
    folder.mkdir(exist_ok=True)
    target = folder / Path(record.image).name
    target.write_bytes(Path(record.image).read_bytes())
    return str(target)


# ---------------------------------------------------------------- changes


def test_a_changed_file_is_noticed_and_only_that_is_read_again(tmp_path, records, monkeypatch):
    old = build(tmp_path, records)
    before = old(records[1].image).clone()
    write_prepared(records[1].image, volume(77), "uint8")
    read = []
    load = FileImages.__call__
    monkeypatch.setattr(FileImages, "__call__", lambda self, path: read.append(path) or load(self, path))
    cache = build(tmp_path, records)
    assert read == [records[1].image]
    assert torch.equal(to_unit(cache(records[1].image)[None])[0], from_file(records[1]))
    assert torch.equal(old(records[1].image), before), "a running training keeps what it opened"


def test_when_all_files_have_changed_the_old_images_go(tmp_path, records):
    cache = build(tmp_path, records)
    for turn in range(3):
        for i, record in enumerate(records[:4]):
            write_prepared(record.image, volume(100 + 10 * turn + i), "uint8")
        cache = build(tmp_path, records)
        for record in records[:3]:
            assert torch.equal(to_unit(cache(record.image)[None])[0], from_file(record))
    assert [file.name for file in cache.folder.glob("*.uint8")] == [cache.data_file.name]
    assert cache.data_file.stat().st_size <= 2.5 * len(records) * np.prod(SIZE)


def test_a_cache_that_was_built_anew_meanwhile_is_named(tmp_path, records):
    cache = build(tmp_path, records)
    cache.data_file.unlink()
    with pytest.raises(CacheError, match=r"images.1.uint8: cannot be opened .* start again"):
        cache(records[0].image)


def test_a_data_file_that_was_cut_off_is_noticed(tmp_path, records):
    cache = build(tmp_path, records)
    os.truncate(cache.data_file, cache.bytes_per_image * 3 + 5)
    again = build(tmp_path, records)
    for record in records[:3]:
        assert torch.equal(to_unit(again(record.image)[None])[0], from_file(record))


@pytest.mark.parametrize("content", ["{", "{}", '{"version": 9, "dtype": "uint8", "preprocess": {}}'])
def test_an_index_of_something_else_is_refused(tmp_path, records, content):
    cache = build(tmp_path, records)
    (cache.folder / "index.json").write_text(content)
    with pytest.raises(CacheError, match=f"index.json.*remove {cache.folder}"):
        build(tmp_path, records)


# ---------------------------------------------------------------- what goes wrong


def test_unreadable_images_are_named_or_left_out(tmp_path, records):
    Path(records[1].image).write_bytes(b"damaged")
    Path(records[4].image).unlink()
    with pytest.raises(VolumeError, match=r"manifest, row [14]: .*[14].nii.gz.*\(and 1 more images\)"):
        build(tmp_path, records, max_bad_samples=1)
    cache = build(tmp_path, records, max_bad_samples=2)
    assert torch.equal(to_unit(cache(records[2].image)[None])[0], from_file(records[2]))
    for record in (records[1], records[4]):
        with pytest.raises(VolumeError, match=Path(record.image).name):
            cache(record.image)


def test_too_little_space_is_said_before_anything_is_written(tmp_path, records, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(CacheError, match=r"needs 0.0 GiB more for 6 volumes, 0.0 GiB are free; make room"):
        build(tmp_path, records)
    assert not list((tmp_path / "cache").rglob("*.uint8"))


def test_a_full_disk_is_an_error_and_what_was_written_before_counts(tmp_path, records, monkeypatch):
    build(tmp_path, records[:2])

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(CacheError, match="No space left.*make room"):
        patch.setattr(module.os, "pwrite", full)
        build(tmp_path, records)
    assert build(tmp_path, records[:2])(records[0].image).dtype == torch.uint8


def test_a_folder_that_cannot_be_written_is_named(tmp_path, records):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(CacheError, match="cannot be written .*; name another folder"):
        build(tmp_path, records)


# ---------------------------------------------------------------- processes


def test_copies_for_other_processes_open_the_map_themselves(tmp_path, records):
    cache = build(tmp_path, records)
    expected = torch.stack([cache(record.image) for record in records])
    copied = pickle.loads(pickle.dumps(cache))  # as a spawned process gets it
    assert copied._map is None and torch.equal(copied(records[0].image), expected[0])
    loader = DataLoader(Images(copied, [record.image for record in records]), 3, num_workers=2)
    assert torch.equal(torch.cat(list(loader)), expected)


class Images:
    """The least data set."""

    def __init__(self, cache, paths):
        self.cache, self.paths = cache, paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.cache(self.paths[index])


def build_slowly(folder, records, pipe):
    """Report each image that this process has written."""
    write = module._write

    def slowly(*args):
        time.sleep(0.1)
        entry = write(*args)
        pipe.send(os.getpid())
        return entry

    module._write, module.PUBLISH_SECONDS = slowly, 0
    build(folder, records, workers=1)


def start_builder(tmp_path, records):
    """A process that builds, and the pipe it reports through."""
    context = multiprocessing.get_context("fork")
    ours, its = context.Pipe(duplex=False)
    process = context.Process(target=build_slowly, args=(tmp_path, records, its))
    process.start()
    its.close()
    return process, ours


def reports(pipe):
    while True:
        try:
            yield pipe.recv()
        except EOFError:
            return


def test_a_killed_builder_leaves_nothing_half_done_and_the_next_goes_on(tmp_path, records):
    process, pipe = start_builder(tmp_path, records)
    for _ in range(3):
        pipe.recv()
    process.kill()
    process.join()
    cache = ImageCache(tmp_path / "cache", CONFIG)
    listed = [record for record in records if not cache.missing([record.image])]
    assert 0 < len(listed) < len(records)
    with open(cache.data_file, "ab") as file:
        file.write(b"half an image")
    expected = build(tmp_path / "undisturbed", records)
    assert all(torch.equal(cache(record.image), expected(record.image)) for record in listed)
    whole = build(tmp_path, records)
    assert all(torch.equal(whole(record.image), expected(record.image)) for record in records)
    assert whole.data_file.stat().st_size == len(records) * whole.bytes_per_image


def test_one_process_builds_and_the_others_wait(tmp_path, records):
    builders = [start_builder(tmp_path, records) for _ in range(2)]
    writers = [pid for _, pipe in builders for pid in reports(pipe)]
    for process, _ in builders:
        process.join(30)
        assert process.exitcode == 0
    assert len(writers) == len(records) and len(set(writers)) == 1
