"""DICOM images made for the tests, and the pictures that an independent program draws of them."""

import io
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from pydicom import config
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
)

from dicomstore.imaging import rendering, values

#: DCMTK's programs; the first knows JPEG as well as what is not compressed, the second JPEG-LS.
ORACLES = ("dcmj2pnm", "dcml2pnm")

needs_oracle = pytest.mark.skipif(
    any(shutil.which(program) is None for program in ORACLES),
    reason="the pictures are compared with DCMTK's: apt-get install dcmtk",
)


def image(array, *, photometric=None, syntax=ExplicitVRLittleEndian, pixels=None, **attributes):
    """Return a DICOM file of these stored values, as bytes.

    `pixels` replaces what `array` would be in the file: bytes, or a list of compressed frames.
    Attributes replace those that follow from the array.
    """
    array = np.asarray(array)
    colour = array.ndim > 2 and array.shape[-1] == 3
    bits = array.itemsize * 8
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = SecondaryCaptureImageStorage, "1.2.3.4"
    dataset.Rows, dataset.Columns = array.shape[-3:-1] if colour else array.shape[-2:]
    dataset.SamplesPerPixel = 3 if colour else 1
    if colour:
        dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = photometric or ("RGB" if colour else "MONOCHROME2")
    dataset.BitsAllocated = bits
    dataset.BitsStored = attributes.pop("BitsStored", bits)
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(array.dtype.kind == "i")
    with config.disable_value_validation():
        for keyword, value in attributes.items():
            setattr(dataset, keyword, value)
    big = syntax == ExplicitVRBigEndian
    if array.dtype.kind == "f":
        keyword = {32: "FloatPixelData", 64: "DoubleFloatPixelData"}[bits]
        setattr(dataset, keyword, array.tobytes())
        del dataset.PixelRepresentation, dataset.BitsStored, dataset.HighBit
    elif isinstance(pixels, list):
        dataset.PixelData = encapsulate(pixels)
        dataset["PixelData"].is_undefined_length = True
    else:
        if pixels is None:
            pixels = array.astype(array.dtype.newbyteorder(">" if big else "<")).tobytes()
        dataset.PixelData = pixels + b"\0" * (len(pixels) % 2)
    if "PixelData" in dataset:
        dataset["PixelData"].VR = "OB" if isinstance(pixels, list) or bits == 8 else "OW"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    buffer = io.BytesIO()
    with config.disable_value_validation():
        dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def table(entries, *, first=0, bits=16, data=None):
    """Return a sequence with a lookup table; `data` replaces its entries."""
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(entries), first, bits])
    item.add_new("LUTData", "US" if data is None else "OW", entries if data is None else data)
    return [item]


def palette(red, green, blue, *, first=0, bits=16, encode):
    """Return the attributes of a palette, its entries encoded by `encode`."""
    attributes = {}
    for colour, entries in zip(("Red", "Green", "Blue"), (red, green, blue), strict=True):
        name = f"{colour}PaletteColorLookupTable"
        attributes[f"{name}Descriptor"] = [len(entries) % 2**16, first, bits]
        attributes[f"{name}Data"] = encode(np.asarray(entries))
    return attributes


def drawn(path, frame, folder, *options):
    """Return DCMTK's picture of a frame, or None if it draws none."""
    target = folder / "drawn.pnm"
    for program in ORACLES:
        command = [program, "--quiet", "--no-overlays", "--write-raw-pnm", *options]
        command += ["--frame", str(frame + 1), str(path), str(target)]
        if subprocess.run(command, stderr=subprocess.DEVNULL, timeout=60).returncode == 0:
            with Image.open(target) as picture:
                return np.asarray(picture)
    return None


def shown(content, frame=0):
    """Return a frame as it is shown, and see that reading it from a file shows the same."""
    dataset = rendering.read_dataset(content)
    with values.quietly():
        picture = rendering.render(dataset, frame)
        syntax = dataset.file_meta.TransferSyntaxUID
        of_file = rendering.render_file(io.BytesIO(content), frame, syntax, longest=10**6)
    assert np.array_equal(picture, of_file)
    return picture


def window(centre, width, function=None):
    """Return the attributes of a window."""
    attributes = {"WindowCenter": centre, "WindowWidth": width}
    return attributes | ({"VOILUTFunction": function} if function else {})
