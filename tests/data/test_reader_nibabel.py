"""Files that others made: everything in nibabel's installed test data is read as nibabel reads it, or refused."""

from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes

from med3dvlm.data.volume import VolumeError, load_volume

DATA = sorted(path for path in Path(nib.__file__).parent.rglob("tests/data/*") if path.is_file())
# file -> how many volumes it holds
READ = {
    "anatomical.nii": 1, "example4d.nii.gz": 2, "example_nifti2.nii.gz": 2, "functional.nii": 20,
    "reoriented_anat_moved.nii": 1, "resampled_anat_moved.nii": 1, "standard.nii.gz": 1,
}  # fmt: skip
REFUSED_NIFTI = {  # headers without voxels, and a matrix of connections
    "analyze.hdr": "analyze.img", "nifti1.hdr": "nifti1.img", "nifti2.hdr": "nifti2.img",
    "row_major.dconn.nii": "one number a voxel",
}  # fmt: skip


def read_all(path: Path) -> list:
    """Every volume of a file; NaN replaced where there are any."""
    try:
        return [load_volume(path)]
    except VolumeError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        if "--frame" in str(error):
            return [load_volume(path, frame=frame) for frame in range(nib.load(path).shape[3])]
        if "not finite" in str(error):
            return [load_volume(path, nan="fill")]
        return [str(error)]


def expected_volumes(path: Path) -> tuple[list[np.ndarray], tuple]:
    """The canonical volumes `[D, H, W]` of a file and their spacing, as nibabel has them."""
    image = nib.as_closest_canonical(nib.load(path))
    data = image.get_fdata().astype(np.float32)  # [i, j, k, ...], to the right, to the front, upwards
    data = data.reshape(*data.shape[:3], -1)
    return [data[..., n].T[::-1, ::-1, ::-1] for n in range(data.shape[3])], voxel_sizes(image.affine)[::-1]


def test_every_file_is_read_as_nibabel_does_or_refused():
    read, refused = {}, {}
    for path in DATA:
        volumes = read_all(path)
        if isinstance(volumes[0], str):
            refused[path.name] = volumes[0]
        elif path.suffix != ".dcm":  # nibabel reads no DICOM files by itself
            expected, spacing = expected_volumes(path)
            for volume, values in zip(volumes, expected, strict=True):
                finite = np.isfinite(values)
                assert np.array_equal(volume.array[finite], values[finite]), path.name
                assert np.allclose(volume.spacing, spacing, rtol=1e-6), path.name
            read[path.name] = len(volumes)
    assert read == READ and sum(read.values()) == 28
    nifti = {name: text for name, text in refused.items() if name.endswith((".nii", ".nii.gz", ".hdr", ".img"))}
    assert nifti.keys() == REFUSED_NIFTI.keys()
    assert all(REFUSED_NIFTI[name] in text for name, text in nifti.items())
    assert len(refused) >= 80  # MINC, AFNI, PAR/REC, MGH, surfaces, fibre tracts, texts
