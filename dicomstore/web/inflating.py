"""Deflated data sets (PS3.5 A.5), inflated so that they can be read like any other."""

from __future__ import annotations

import io
import zlib
from typing import BinaryIO

from pydicom.dataset import FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_file_meta_info
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from dicomstore.errors import DamagedError
from dicomstore.imaging import header

#: A deflated data set is not inflated beyond this, and a larger file not inflated at all (bytes).
INFLATED_BYTES = 256 * 1024 * 1024


class TooLargeError(ValueError):
    """A deflated data set is too large to be inflated."""


def plain(file: BinaryIO) -> BinaryIO:
    """Return a DICOM file, inflated if it is deflated.

    Raises
    ------
    TooLargeError
        If it is larger than ``INFLATED_BYTES``.
    DamagedError
        If it cannot be inflated.
    """
    if header.dataset_syntax(file) != DeflatedExplicitVRLittleEndian:
        return file
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    deflated = file.read(INFLATED_BYTES)
    try:
        dataset = inflater.decompress(deflated, INFLATED_BYTES)
    except zlib.error as error:
        raise DamagedError("The deflated data set cannot be inflated.") from error
    if inflater.unconsumed_tail or file.read(1):
        raise TooLargeError("The deflated data set is too large.")
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    head = DicomBytesIO()
    write_file_meta_info(head, meta, enforce_standard=False)
    return io.BytesIO(b"\0" * 128 + b"DICM" + head.getvalue() + dataset)
