"""Read DICOM files with SimpleITK, one per line of standard input, and write the arrays beside them.

`dicom_itk` runs this file in a process of its own, because its decoders crash on some damaged streams.
"""

import os
import sys

import numpy as np
import SimpleITK as sitk


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the decoders print is no answer
    for line in sys.stdin:
        file = line.rstrip("\n")
        try:
            array = sitk.GetArrayFromImage(sitk.ReadImage(file, imageIO="GDCMImageIO"))
        except RuntimeError:
            print("failed", file=answers, flush=True)
            continue
        np.save(f"{file}.npy", array)
        print("done", file=answers, flush=True)


if __name__ == "__main__":
    main()
