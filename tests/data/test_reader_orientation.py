"""All 48 orientations: every format that carries anatomy gives the same array and spacing to the bit."""

from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest

from med3dvlm.data.geometry import canonical_turn, empty_turned
from med3dvlm.data.volume import load_volume

sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is not installed")

AXES = [
    "".join(signs) for order in permutations(range(3)) for signs in product(*(("RL", "AP", "SI")[n] for n in order))
]
BODY = np.random.default_rng(0).integers(-1000, 3000, (5, 6, 7)).astype(np.int16)  # [to inferior, posterior, left]
SPACING = (3.0, 2.0, 1.5)  # of the body, in the same order
STEP = {"I": (0, 1), "S": (0, -1), "P": (1, 1), "A": (1, -1), "L": (2, 1), "R": (2, -1)}  # axis of BODY, direction


def stored(axes: str) -> tuple[np.ndarray, np.ndarray]:
    """The body as a file with these axes holds it, `[i, j, k]`, and its RAS+ affine."""
    array = BODY.transpose([STEP[letter][0] for letter in axes])
    array = array[tuple(slice(None, None, STEP[letter][1]) for letter in axes)]
    affine = np.eye(4)
    for column, letter in enumerate(axes):
        axis, sign = STEP[letter]
        towards_ras = {0: (2, -1), 1: (1, -1), 2: (0, -1)}[axis]  # I is -z, P is -y, L is -x
        affine[:3, column] = 0
        affine[towards_ras[0], column] = towards_ras[1] * sign * SPACING[axis]
    affine[:3, 3] = (11.5, -7.25, 40)
    return array, affine


def write_itk(path, array: np.ndarray, affine: np.ndarray, **options) -> None:
    """`[i, j, k]` and a RAS+ affine through SimpleITK, whose space is LPS."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    lps = np.diag([-1, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    sitk.WriteImage(image, str(path), **options)


def test_there_are_48():
    assert len(set(AXES)) == 48


@pytest.mark.parametrize("axes", AXES)
def test_formats_agree_to_the_bit(tmp_path, axes):
    array, affine = stored(axes)
    nib.save(nib.Nifti1Image(array, affine), tmp_path / "nibabel.nii.gz")
    nib.save(nib.Nifti2Image(array, affine), tmp_path / "nibabel2.nii")
    nib.save(nib.Nifti1Pair(array, affine), tmp_path / "pair.hdr")
    write_itk(tmp_path / "itk.nii.gz", array, affine)
    write_itk(tmp_path / "itk.nrrd", array, affine, useCompression=True)
    write_itk(tmp_path / "itk.nhdr", array, affine)
    write_itk(tmp_path / "itk.mha", array, affine, useCompression=True)
    write_itk(tmp_path / "itk.mhd", array, affine)
    names = ["nibabel.nii.gz", "nibabel2.nii", "pair.hdr", "pair.img", *(f"itk.{e}" for e in ("nii.gz", "nrrd"))]
    for name in [*names, "itk.nhdr", "itk.mha", "itk.mhd"]:
        volume = load_volume(tmp_path / name)
        assert volume.array.dtype == np.float32 and volume.array.flags.c_contiguous
        assert np.array_equal(volume.array, BODY), name
        assert volume.spacing == pytest.approx(SPACING), name
        assert volume.axes == axes and volume.orientation == "canonical" and volume.warnings == (), name
        kept = load_volume(tmp_path / name, orientation="stored")
        assert np.array_equal(kept.array, array.T) and kept.orientation == "stored", name
        assert kept.spacing == pytest.approx(np.linalg.norm(affine[:3, :3], axis=0)[::-1]), name


@pytest.mark.parametrize("axes", AXES)
def test_what_is_decoded_in_place_is_turned(axes):
    """`empty_turned` looks like the file and lies in memory as the canonical array: turning it copies nothing."""
    array, affine = stored(axes)
    target = empty_turned(array.T.shape, affine)
    target[:] = array.T
    view = canonical_turn(affine).view(target)
    assert np.array_equal(view, BODY) and view.flags.c_contiguous


@pytest.mark.parametrize("suffix", ["nii.gz", "nrrd", "mha"])
@pytest.mark.parametrize("angle", [0.2, 12.0, 40.0])
def test_oblique_volumes_go_to_the_nearest_axes_and_say_so(tmp_path, suffix, angle):
    array, affine = stored("LPS")
    turn = np.eye(4)
    cosine, sine = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    turn[:2, :2] = [[cosine, -sine], [sine, cosine]]
    write = write_itk if suffix != "nii.gz" else lambda path, a, m: nib.save(nib.Nifti1Image(a, m), path)
    write(tmp_path / f"x.{suffix}", array, turn @ affine)
    volume = load_volume(tmp_path / f"x.{suffix}")
    assert np.array_equal(volume.array, BODY) and volume.spacing == pytest.approx(SPACING)
    if angle > 1:
        (warning,) = volume.warnings
        assert "oblique" in warning and f"{angle:.1f} degrees" in warning
    else:
        assert volume.warnings == ()


def test_flip_reverses_the_axes_named(tmp_path):
    array, affine = stored("RAS")
    nib.save(nib.Nifti1Image(array, affine), tmp_path / "x.nii")
    np.save(tmp_path / "x.npy", BODY)
    for name in ("x.nii", "x.npy"):
        assert np.array_equal(load_volume(tmp_path / name, flip="D").array, BODY[::-1])
        assert np.array_equal(load_volume(tmp_path / name, flip="WH").array, BODY[:, ::-1, ::-1])
    with pytest.raises(ValueError, match="flip"):
        load_volume(tmp_path / "x.nii", flip="X")


@pytest.mark.parametrize("unit, factor", [("mm", 1.0), ("meter", 1000.0), ("micron", 0.001)])
def test_spacing_is_in_mm_whatever_the_unit_of_the_file(tmp_path, unit, factor):
    array, affine = stored("LPS")
    image = nib.Nifti1Image(array, affine @ np.diag([1 / factor] * 3 + [1]))
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "x.nii")
    assert load_volume(tmp_path / "x.nii").spacing == pytest.approx(SPACING)


def test_qform_and_sform_that_contradict_each_other_are_told(tmp_path):
    array, affine = stored("LPS")
    image = nib.Nifti1Image(array, affine)
    image.set_sform(affine, code=1)
    image.set_qform(np.diag([-1, 1, 1, 1]) @ affine, code=1)
    nib.save(image, tmp_path / "x.nii")
    (warning,) = load_volume(tmp_path / "x.nii").warnings
    assert "RPS" in warning and "LPS" in warning


def test_nrrd_in_another_space_and_headers_that_say_nothing(tmp_path):
    """NRRD may count to the right, front and top; a header without a space, or without a matrix, is told."""
    head = "NRRD0004\ntype: short\ndimension: 3\nsizes: 7 6 5\nendian: little\nencoding: raw\n"
    ras = "space: right-anterior-superior\nspace directions: (1,0,0) (0,2,0) (0,0,3)\nspace origin: (0,0,0)\n"
    array = BODY[::-1, ::-1, ::-1].tobytes()  # i to the right, j to the front, k upwards
    (tmp_path / "ras.nrrd").write_bytes(f"{head}{ras}\n".encode() + array)
    volume = load_volume(tmp_path / "ras.nrrd")
    assert np.array_equal(volume.array, BODY) and volume.axes == "RAS" and volume.spacing == (3, 2, 1)
    assert volume.warnings == ()
    meta = "ObjectType = Image\nNDims = 3\nModality = MET_MOD_CT\nDimSize = 7 6 5\nElementType = MET_SHORT\n"
    (tmp_path / "x.nrrd").write_bytes(f"{head}spacings: 1 2 3\n\n".encode() + array)
    (tmp_path / "x.mha").write_bytes(f"{meta}ElementDataFile = LOCAL\n".encode() + array)
    for name in ("x.nrrd", "x.mha"):
        (warning,) = load_volume(tmp_path / name).warnings
        assert "nothing about its orientation" in warning
    assert load_volume(tmp_path / "x.mha").modality == "CT"


@pytest.mark.parametrize(("space", "guessed"), [
    ("space dimension: 3", True), ("space: scanner-xyz", True), ("space: 3D-right-handed", True),
    ("space: left-posterior-superior", False), ("space: RAS", False), ("space: Right-Anterior-Superior", False),
    ("space: LPS", False),
])  # fmt: skip
def test_nrrd_whose_space_is_no_anatomy_is_told(tmp_path, space, guessed):
    """Directions alone lead nowhere; the space that they are in has to be that of a patient."""
    head = "NRRD0004\ntype: short\ndimension: 3\nsizes: 7 6 5\nendian: little\nencoding: raw\n"
    directions = "space directions: (1,0,0) (0,2,0) (0,0,3)\nspace origin: (0,0,0)\n"
    (tmp_path / "x.nrrd").write_bytes(f"{head}{space}\n{directions}\n".encode() + BODY.tobytes())
    warnings = load_volume(tmp_path / "x.nrrd").warnings
    assert any("left and right are guessed" in warning for warning in warnings) == guessed
