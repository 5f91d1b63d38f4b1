"""DICOM files made for the tests."""

import contextlib
import hashlib
import io
import threading
from pathlib import Path

import pytest
from pydicom import config
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from dicomstore.blobs.versions import Versions

PREAMBLE = b"\0" * 128 + b"DICM"


def dicom(*, pixels=b"", syntax=ExplicitVRLittleEndian, **attributes):
    """Return a small DICOM file as bytes, with `attributes` by their keywords."""
    dataset = Dataset()
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = "1.2.3.4"
    with config.disable_value_validation():
        for keyword, value in attributes.items():
            setattr(dataset, keyword, value)
    if pixels:
        dataset.BitsAllocated = 8
        dataset.add_new("PixelData", "OB", pixels)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.TransferSyntaxUID = syntax
    buffer = io.BytesIO()
    with config.disable_value_validation():
        dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def element(tag, vr, value, *, length=None):
    """Return one data element in explicit VR little endian, as bytes, valid or not."""
    head = (tag >> 16).to_bytes(2, "little") + (tag & 0xFFFF).to_bytes(2, "little") + vr.encode()
    length = len(value) if length is None else length
    if vr in ("OB", "OW", "SQ", "UN", "UT", "UC", "UR"):
        return head + b"\0\0" + length.to_bytes(4, "little") + value
    return head + length.to_bytes(2, "little") + value


def sha256_of(folder):
    """Return the SHA-256 of every regular file below `folder`, by relative path."""
    root = Path(folder)
    return {
        file.relative_to(root).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in root.rglob("*")
        if file.is_file()
    }


@contextlib.contextmanager
def before_commit(act):
    """Call `act(manifest)` for every version whose chunks are sent, before it is committed.

    What `act` itself stores does not count.
    """
    commit, acting = Versions.commit, threading.local()

    def disturbed(self, writes):
        if not getattr(acting, "now", False):
            acting.now = True
            try:
                for write in writes:
                    act(write.manifest)
            finally:
                acting.now = False
        commit(self, writes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Versions, "commit", disturbed)
        yield
