"""Write prepared volumes; `med3dvlm.data.volume` reads them, and recognises them by their mark."""

import re

import nibabel as nib
import numpy as np
from isal import isal_zlib

from med3dvlm.data.files import write_bytes
from med3dvlm.data.readers.nifti import PREPARED_MARK

# Stored type -> largest code and its numpy type. NIfTI has no float16; 65536 even steps are closer than its rounding.
CODES = {"uint8": (255, np.uint8), "float16": (65535, np.uint16)}
PREPARED_ERROR = {"float32": 0.0, "float16": 0.5 / 65535, "uint8": 0.5 / 255}  # besides float32 rounding, 1e-7


def write_prepared(path, array: np.ndarray, dtype: str = "float32", preparation: str = "published") -> None:
    """Write a prepared volume as compressed NIfTI, atomically; the same input gives the same bytes.

    array: `[D, H, W]` within 0..1; for uint8 also the codes 0..255 themselves.
    dtype: "float32" stores the values. "uint8" stores 256 steps and "float16" 65536 (uint16), with the slope that
        gives every reader values within 0..1 again; `PREPARED_ERROR` is the largest difference.
    preparation: name of the preprocessing, recorded in the header: 1 to 50 printable ASCII characters.

    The header equals the published one (unit spacing, LPS axes), plus our mark.
    Raises:
        ValueError: unknown dtype, values outside 0..1, not three axes, or a name that can't be recorded.
    """
    if dtype not in PREPARED_ERROR:
        raise ValueError(f"dtype must be one of {', '.join(PREPARED_ERROR)}, not {dtype!r}")
    if not re.fullmatch(r"[ -~]{1,50}", preparation):
        raise ValueError(f"the name of a preparation is 1 to 50 printable ASCII characters, not {preparation!r}")
    if array.ndim != 3 or (array.dtype != np.uint8 and not (array.min() >= 0 and array.max() <= 1)):
        raise ValueError(f"a prepared volume is [D, H, W] within 0..1; {array.shape} {array.dtype} is none")
    slope, stored = _encoded(array, dtype)
    header = nib.Nifti1Header()
    header.set_data_dtype(stored.dtype)
    header.set_data_shape(stored.shape[::-1])  # [D, H, W] in C order is [i, j, k] in the order of NIfTI
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    header.set_qform(affine, code=1)
    header.set_sform(affine, code=1)
    header.set_xyzt_units("mm", "sec")
    header.set_slope_inter(slope, 0)
    header["descrip"] = PREPARED_MARK + b" v2: " + preparation.encode()
    header["vox_offset"] = 352
    # The fastest level: prepared volumes are read far more often than they are sent anywhere. 31: with a gzip header,
    # which holds no time. In parts, because joining them first would copy every voxel.
    packer = isal_zlib.compressobj(1, wbits=31)
    parts = header.binaryblock, bytes(4), memoryview(np.ascontiguousarray(stored)).cast("B")
    write_bytes(path, b"".join([*map(packer.compress, parts), packer.flush()]))


def _encoded(array: np.ndarray, dtype: str) -> tuple[float, np.ndarray]:
    """The slope and the array to store."""
    if array.dtype == np.uint8 and dtype != "uint8":
        raise ValueError(f"codes 0..255 can't be stored as {dtype}")
    if dtype == "float32":
        return 1.0, array.astype("<f4", copy=False)
    largest, code = CODES[dtype]
    slope = np.float32(1 / largest)
    if float(slope) * largest > 1:  # readers that compute in float64 would get a value above 1
        slope = np.nextafter(slope, np.float32(0))
    return float(slope), array if array.dtype == np.uint8 else np.rint(array * np.float32(largest)).astype(code)
