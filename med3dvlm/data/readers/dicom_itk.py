"""SimpleITK as the decoder of what pydicom's plugins leave over: JPEG-LS, JPEG lossless, JPEG of 12 bits."""

import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
from pydicom import dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import SecondaryCaptureImageStorage, generate_uid

from med3dvlm.data.readers.dicom_planes import PixelSource

WORKER = Path(__file__).with_name("dicom_itk_worker.py")
SECONDS = 15  # for one frame


class ItkError(Exception):
    """SimpleITK cannot decode a frame, or crashed on it."""


class ItkDecoder:
    """Decodes frames in a process that starts with the first one and ends with the context.

    Each frame goes there in a file of its own, without rescaling and photometric interpretation, on which SimpleITK
    would act, and without anything else of the original header.
    """

    def __init__(self):
        self._process = None

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def decode(self, source: PixelSource, encoded: bytes) -> np.ndarray:
        """One compressed frame as stored integers `[rows, columns]`.

        Raises:
            ItkError: it cannot be decoded.
        """
        with tempfile.TemporaryDirectory(prefix="med3dvlm-") as folder:
            file = Path(folder, "frame.dcm")
            dcmwrite(file, _plain_image(source, encoded), enforce_file_format=True)
            self._ask(str(file))
            stored = np.load(f"{file}.npy", allow_pickle=False)
        if stored.size != source.rows * source.columns:
            raise ItkError(f"decoded to {stored.shape}")
        return stored.reshape(source.rows, source.columns)

    def _ask(self, file: str) -> None:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        watch = threading.Timer(SECONDS, self._process.kill)
        watch.start()
        try:
            print(file, file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline().strip()
        except BrokenPipeError as error:
            raise ItkError("crashed before") from error
        finally:
            watch.cancel()
        if answer != "done":
            raise ItkError(answer or "crashed")


def _plain_image(source: PixelSource, encoded: bytes) -> Dataset:
    image = Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = source.syntax
    image.SOPClassUID = SecondaryCaptureImageStorage
    image.SOPInstanceUID = generate_uid()
    image.Rows, image.Columns, image.SamplesPerPixel = source.rows, source.columns, 1
    image.PhotometricInterpretation = "MONOCHROME2"
    image.BitsAllocated, image.BitsStored, image.HighBit = source.allocated, source.stored, source.high
    image.PixelRepresentation = int(source.signed)
    image.PixelData = encapsulate([encoded])
    return image
