"""A synthetic torso in Hounsfield units, drawn with ellipsoids: for the browser tests and the screenshots in docs/."""

import nibabel as nib
import numpy as np

# Hounsfield units, then centre and radii in half axes: (superior->inferior, anterior->posterior, right->left)
_PARTS = (
    (-95, (0, 0, 0), (9, 0.76, 0.95)),  # fat below the skin
    (48, (0, 0.02, 0), (9, 0.66, 0.84)),  # muscle
    (-100, (0.75, -0.05, 0), (0.75, 0.5, 0.66)),  # fat around the bowel
    (-860, (-0.6, -0.02, -0.42), (0.55, 0.52, 0.32)),  # right lung
    (-860, (-0.6, -0.02, 0.42), (0.55, 0.52, 0.32)),  # left lung
    (150, (-0.42, -0.16, 0.12), (0.3, 0.3, 0.27)),  # heart
    (105, (0.1, -0.08, -0.4), (0.33, 0.48, 0.38)),  # liver
    (105, (0.02, -0.28, -0.05), (0.2, 0.26, 0.36)),
    (120, (0.05, 0.25, 0.6), (0.22, 0.24, 0.14)),  # spleen
    (20, (0.08, -0.2, 0.36), (0.2, 0.24, 0.2)),  # stomach
    (185, (0.4, 0.28, -0.44), (0.24, 0.17, 0.12)),  # kidneys
    (185, (0.4, 0.28, 0.44), (0.24, 0.17, 0.12)),
    (25, (0.4, 0.24, -0.38), (0.1, 0.08, 0.06)),
    (25, (0.4, 0.24, 0.38), (0.1, 0.08, 0.06)),
    (6, (0.06, -0.1, -0.52), (0.12, 0.15, 0.12)),  # a cyst in the liver
    (30, (0.8, -0.3, -0.3), (0.12, 0.12, 0.14)),  # bowel
    (30, (0.75, -0.2, 0.2), (0.14, 0.14, 0.16)),
    (30, (0.85, 0.0, -0.05), (0.12, 0.14, 0.18)),
    (210, (0, 0.24, 0.08), (9, 0.065, 0.05)),  # aorta
    (330, (0, 0.46, 0), (9, 0.14, 0.12)),  # spine
    (15, (0, 0.63, 0), (9, 0.05, 0.035)),  # spinal canal
)


def torso(shape=(96, 160, 192), seed: int = 0) -> np.ndarray:
    """int16 `[D, H, W]` in canonical order."""
    down, back, left = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij")
    volume = np.full(shape, -1000, np.float32)
    for value, (d, h, w), (rd, rh, rw) in _PARTS:
        volume[((down - d) / rd) ** 2 + ((back - h) / rh) ** 2 + ((left - w) / rw) ** 2 < 1] = value
    wall = np.sqrt((back / 0.62) ** 2 + (left / 0.8) ** 2)
    ribs = (np.abs(wall - 0.98) < 0.045) & (np.sin(down * 24 + back * 3) > 0.45) & (down < 0.35)
    volume[ribs] = 450
    noise = np.random.default_rng(seed).normal(0, 9, shape)
    return (volume + noise).clip(-1024, 3000).astype(np.int16)


def write_torso(path, shape=(96, 160, 192), spacing=(3.0, 1.8, 1.8), seed: int = 0) -> None:
    """Write it as NIfTI with RAS axes, spacing in mm along D, H, W."""
    affine = np.diag([spacing[2], spacing[1], spacing[0], 1.0])
    array = torso(shape, seed)[::-1, ::-1, ::-1].T  # to [i, j, k] that run to the right, to anterior, to superior
    image = nib.Nifti1Image(array, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    nib.save(image, path)
