"""The streamed preparation of slice folders equals the plain one, whatever the shapes, and its memory is bounded."""

import io
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from med3dvlm.data.fast_slices import MAX_PIXELS, SlicePreparer, decode_slice
from med3dvlm.data.preprocess import preprocess
from med3dvlm.data.volume import VolumeError, load_volume
from tests.helpers.tiny_data import write_slices

SIZES = [(4, 8, 8), (16, 16, 32), (7, 5, 9), (1, 1, 3), (33, 12, 6)]


def shown(rng, shape, low, high, box=None) -> np.ndarray:
    """A volume with values from `low` to `high`, above `low` only inside `box`."""
    volume = np.full(shape, low, np.uint8)
    inside = tuple(slice(first, last + 1) for first, last in box or [(0, n - 1) for n in shape])
    volume[inside] = rng.integers(low, high + 1, volume[inside].shape)
    volume[tuple(s.start for s in inside)] = high
    volume[tuple(s.stop - 1 for s in inside)] = high
    return volume


def assert_equal_to_plain(folder, size, memory=2**20):
    expected = preprocess(load_volume(folder), size=size)[0].numpy()
    array = SlicePreparer(size, codes=False, memory=memory)(folder).array
    codes = SlicePreparer(size, memory=memory)(folder).array
    assert array.dtype == np.float32 and codes.dtype == np.uint8
    assert np.abs(array - expected).max() <= 1e-6
    assert np.abs(codes / 255 - expected).max() <= 1 / 510 + 1e-6


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("size", SIZES)
def test_equal_to_the_plain_formulation(tmp_path, seed, size):
    """Larger and smaller on each axis, cropped and whole, high and low contrast, kept and decoded again."""
    rng = np.random.default_rng(1000 * seed + sum(size))
    shape = tuple(int(n) for n in rng.integers(2, 48, 3))
    low = int(rng.integers(0, 120))
    high = low + int(rng.integers(1, 135 if seed % 3 else 8))
    box = [sorted(int(n) for n in rng.integers(0, length, 2)) for length in shape] if seed % 2 else None
    volume = shown(rng, shape, low, high, box)
    if volume.min() == volume.max():
        volume[0, 0, 0] += 1
    write_slices(tmp_path, volume)
    memory = int(rng.integers(1, 2 * volume.size))
    try:
        preprocess(load_volume(tmp_path), size=size)
    except VolumeError as error:  # the few voxels of the result may all be the same
        with pytest.raises(VolumeError, match="nearly all of its values are the same"):
            SlicePreparer(size, memory=memory)(tmp_path)
        assert "nearly all" in str(error)
    else:
        assert_equal_to_plain(tmp_path, size, memory)


@pytest.mark.parametrize("box", [[(3, 3), (0, 10), (2, 8)], [(0, 5), (7, 7), (0, 8)], [(0, 5), (0, 10), (4, 4)]])
def test_boxes_of_one_row(tmp_path, box):
    write_slices(tmp_path, shown(np.random.default_rng(0), (6, 11, 9), 7, 250, box))
    assert_equal_to_plain(tmp_path, (4, 8, 16))


def test_the_published_size(tmp_path):
    write_slices(tmp_path, shown(np.random.default_rng(1), (40, 300, 230), 0, 255, [(2, 38), (5, 290), (0, 229)]))
    assert_equal_to_plain(tmp_path, (128, 256, 256))


def test_memory_stays_within_its_bound(tmp_path):
    """300 slices are 4.9 MB; with 0.5 MB for them, all that is taken is those, the result and a few slices."""
    write_slices(tmp_path, shown(np.random.default_rng(2), (300, 128, 128), 0, 255))
    size, memory = (8, 64, 64), 2**19
    tracemalloc.start()
    try:
        small = SlicePreparer(size, memory=memory)(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    slice_bytes = 128 * 128 * 4
    assert peak < memory + 8 * 64 * 64 + 12 * slice_bytes + 300 * 2000  # 2 kB of bookkeeping for each file
    assert np.array_equal(small.array, SlicePreparer(size)(tmp_path).array)


def test_one_preparer_serves_series_of_different_sizes(tmp_path):
    rng = np.random.default_rng(3)
    prepare = SlicePreparer((8, 16, 16), codes=False)
    for number, shape in enumerate([(9, 40, 30), (3, 12, 70), (20, 17, 17), (9, 40, 30)]):
        write_slices(tmp_path / str(number), shown(rng, shape, 0, 255))
        expected = preprocess(load_volume(tmp_path / str(number)), size=(8, 16, 16))[0].numpy()
        assert np.abs(prepare(tmp_path / str(number)).array - expected).max() <= 1e-6


def test_slices_of_another_size_are_left_out_and_noted(tmp_path):
    write_slices(tmp_path, shown(np.random.default_rng(4), (8, 10, 12), 0, 255))
    for number in (2, 5):
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / f"{number}.png")
    done = SlicePreparer((4, 8, 8))(tmp_path)
    assert done.shape == (6, 10, 12)
    assert done.notes == load_volume(tmp_path).warnings and "2 of 8 slices left out" in done.notes[0]
    assert_equal_to_plain(tmp_path, (4, 8, 8))


def test_the_sample_shows_what_the_series_holds(tmp_path):
    volume = shown(np.random.default_rng(5), (40, 200, 200), 10, 210)
    write_slices(tmp_path, volume)
    sample = SlicePreparer((8, 8, 8))(tmp_path).sample
    assert len(sample) >= 16 and sample[0].size >= 6000
    assert np.abs(np.percentile(sample, [5, 50, 95]) - np.percentile(volume, [5, 50, 95])).max() < 4


def encoded(image: Image.Image, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, **options)
    return data.getvalue()


GREY = Image.fromarray((np.random.default_rng(6).random((37, 53)) * np.linspace(0, 255, 53)).astype(np.uint8))
TURNED = Image.Exif()
TURNED[0x0112] = 6  # an orientation that readers for photographs apply
FILES = {
    **{f"jpeg {q}": encoded(GREY, format="jpeg", quality=q) for q in (5, 50, 90, 100)},
    "progressive": encoded(GREY, format="jpeg", progressive=True),
    "optimised": encoded(GREY, format="jpeg", optimize=True),
    "restart markers": encoded(GREY, format="jpeg", restart_marker_rows=1),
    "turned by exif": encoded(GREY, format="jpeg", exif=TURNED),
    "colour jpeg": encoded(GREY.convert("RGB").rotate(5), format="jpeg"),
    "cmyk jpeg": encoded(GREY.convert("CMYK"), format="jpeg"),
    "png": encoded(GREY, format="png"),
    "png with text": encoded(GREY, format="png", dpi=(72, 72), transparency=3),
    "colour png": encoded(Image.merge("RGB", (GREY, GREY.rotate(90), GREY)), format="png"),
    "palette": encoded(GREY.convert("P"), format="png"),
    "transparent": encoded(GREY.convert("RGBA"), format="png"),
    "grey and transparent": encoded(GREY.convert("LA"), format="png"),
    "one bit": encoded(GREY.convert("1"), format="png"),
}


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file_decodes_as_pillow_does(tmp_path, kind):
    file = tmp_path / ("0.jpeg" if FILES[kind][:2] == b"\xff\xd8" else "0.png")
    file.write_bytes(FILES[kind])
    with Image.open(file) as image:
        image = image.convert("RGBA") if image.mode == "P" else image
        expected = np.asarray(image.convert("L"))
    assert np.array_equal(decode_slice(file), expected)


@pytest.mark.parametrize("kind", ["jpeg 90", "png", "colour png", "progressive"])
@pytest.mark.parametrize("part", [0.0, 0.1, 0.6])
def test_cut_files_are_errors_that_name_them(tmp_path, kind, part):
    for number in range(3):
        GREY.save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes(FILES[kind][: int(len(FILES[kind]) * part)])
    with pytest.raises(VolumeError, match=r"1\.png"):
        SlicePreparer((4, 8, 8))(tmp_path)


def test_hostile_files_are_refused(tmp_path):
    header = bytearray(encoded(GREY, format="png"))
    header[16:24] = (2**16).to_bytes(4, "big") * 2  # width and height
    assert 2**32 > MAX_PIXELS
    (tmp_path / "0.png").write_bytes(header)
    with pytest.raises(VolumeError, match=r"0\.png"):
        SlicePreparer((4, 8, 8))(tmp_path)


def test_nothing_to_see_and_nothing_there(tmp_path):
    with pytest.raises(VolumeError, match="holds no slices"):
        SlicePreparer((4, 8, 8))(tmp_path)
    write_slices(tmp_path, np.full((3, 4, 4), 9, np.uint8))
    with pytest.raises(VolumeError, match="nothing to see"):
        SlicePreparer((4, 8, 8))(tmp_path)


def test_sixteen_bits_are_left_to_the_reader(tmp_path):
    Image.fromarray(np.arange(2000, 2056, dtype=np.uint16).reshape(7, 8)).save(tmp_path / "0.png")
    assert SlicePreparer((4, 8, 8))(tmp_path) is None


def test_neither_torch_nor_monai_is_imported(tmp_path):
    write_slices(tmp_path / "ct_case/000001/Axial", shown(np.random.default_rng(7), (4, 5, 6), 0, 255))
    code = (
        "import sys; from med3dvlm.data import prepare;"
        f"assert prepare.main(['--input_dir', {str(tmp_path)!r}, '--output_dir', {str(tmp_path / 'out')!r},"
        "'--size', '2', '4', '4', '--num_workers', '1']) == 0;"
        "assert not {'torch', 'monai', 'SimpleITK', 'pandas'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
