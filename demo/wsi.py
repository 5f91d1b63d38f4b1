"""The made-up slide as DICOM: `python -m demo.wsi FOLDER`. No patient, no scanner.

Each level is an instance of one series (PS3.3 A.32.8), its frames the tiles of `demo.slide`'s slide
as they are: none is decoded.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import cast

import pydicom
import tifffile
from PIL import ImageCms
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import JPEGBaseline8Bit, VLWholeSlideMicroscopyImageStorage

from demo.slide import FACTORS, MPP, TILE, write_sample_slide

SIZE = 20_000_000  # bytes
LEVELS = 3
#: UIDs for all time: the same instances each time they are made (2.25: PS3.5 B.2).
UID_ROOT = "2.25.20714968351972046183759204716385"
STUDY, SERIES, FRAME_OF_REFERENCE, PYRAMID, SPECIMEN = (f"{UID_ROOT}{n}" for n in range(11, 16))


def write_sample_wsi(folder: str | os.PathLike[str], *, size: int = SIZE) -> Path:
    """Write a slide of three levels as DICOM, a file a level, in JPEG tiles (TILED_FULL).

    Parameters
    ----------
    folder : path
        Is made if it is not there.
    size : int, optional
        Bytes asked for, as of :func:`demo.slide.write_sample_slide`.

    Returns
    -------
    pathlib.Path
        `folder`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        slide = write_sample_slide(Path(temporary) / "slide.svs", size=size)
        with tifffile.TiffFile(slide) as tiff:
            levels = tiff.series[0].levels[:LEVELS]
            for number, level in enumerate(levels):
                page = cast(tifffile.TiffPage, level.pages[0])
                segments = tiff.filehandle.read_segments(
                    page.dataoffsets, page.databytecounts, sort=False
                )
                frames = [cast(bytes, tile) for tile, _ in segments]
                dataset = _instance(number, page.imagewidth, page.imagelength, frames)
                file = folder / f"level-{number}.dcm"
                pydicom.dcmwrite(file, dataset, enforce_file_format=True)
    return folder


def _instance(number: int, width: int, height: int, frames: list[bytes]) -> Dataset:
    """Return a level as a data set."""
    factor = (1, *FACTORS)[number]
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    dataset.SOPClassUID = VLWholeSlideMicroscopyImageStorage
    dataset.SOPInstanceUID = f"{UID_ROOT}{20 + number}"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = STUDY, SERIES
    dataset.FrameOfReferenceUID, dataset.PyramidUID = FRAME_OF_REFERENCE, PYRAMID
    dataset.StudyDate = dataset.ContentDate = "20200101"
    dataset.StudyTime = dataset.ContentTime = "120000"
    dataset.AcquisitionDateTime = "20200101120000"
    dataset.Modality, dataset.Manufacturer = "SM", "MADE UP"
    dataset.ManufacturerModelName = dataset.DeviceSerialNumber = "MADE UP"
    dataset.SoftwareVersions = "1"
    dataset.PatientName = dataset.PatientID = "MADE UP"
    dataset.PatientBirthDate, dataset.PatientSex = "", "O"
    dataset.StudyID, dataset.AccessionNumber, dataset.ReferringPhysicianName = "1", "", ""
    dataset.StudyDescription, dataset.SeriesDescription = "Made-up slide", "Made-up section"
    dataset.SeriesNumber, dataset.InstanceNumber = 1, number + 1
    dataset.PositionReferenceIndicator = "SLIDE_CORNER"
    _add_specimen(dataset)
    _add_place(dataset, width, height, MPP * factor / 1000)
    # PS3.3 C.8.12.4
    dataset.ImageType = ["DERIVED", "PRIMARY", "VOLUME", "RESAMPLED" if number else "NONE"]
    dataset.VolumetricProperties = "VOLUME"
    dataset.BurnedInAnnotation, dataset.SpecimenLabelInImage = "NO", "NO"
    dataset.FocusMethod, dataset.ExtendedDepthOfField = "AUTO", "NO"
    dataset.LossyImageCompression = "01"
    dataset.LossyImageCompressionMethod = "ISO_10918_1"
    dataset.LossyImageCompressionRatio = 10
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 3, "YBR_FULL_422"
    dataset.PlanarConfiguration, dataset.PixelRepresentation = 0, 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
    dataset.Rows = dataset.Columns = TILE
    dataset.NumberOfFrames = len(frames)
    dataset.PixelData = encapsulate(frames)
    dataset["PixelData"].is_undefined_length = True
    return dataset


def _add_specimen(dataset: Dataset) -> None:
    """Say what is on the slide, and in which light it is seen (PS3.3 C.7.6.22, C.8.12.5)."""
    dataset.ContainerIdentifier = "MADE UP"
    dataset.IssuerOfTheContainerIdentifierSequence = []
    dataset.ContainerTypeCodeSequence = [_coded(codes.SCT.MicroscopeSlide)]
    specimen = Dataset()
    specimen.SpecimenIdentifier, specimen.SpecimenUID = "MADE UP", SPECIMEN
    specimen.IssuerOfTheSpecimenIdentifierSequence = []
    specimen.SpecimenPreparationSequence = []
    dataset.SpecimenDescriptionSequence = [specimen]
    dataset.AcquisitionContextSequence = []
    path = Dataset()
    path.OpticalPathIdentifier = "1"
    path.IlluminationTypeCodeSequence = [_coded(codes.DCM.BrightfieldIllumination)]
    path.IlluminationColorCodeSequence = [_coded(codes.SCT.FullSpectrum)]
    path.ObjectiveLensPower = 20
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[24:36] = bytes(12)  # when it was made
    path.ICCProfile, path.ColorSpace = bytes(profile), "SRGB"
    dataset.OpticalPathSequence, dataset.NumberOfOpticalPaths = [path], 1


def _add_place(dataset: Dataset, width: int, height: int, spacing: float) -> None:
    """Say where the tiles lie: row by row, beginning at the corner of the slide (PS3.3 C.8.12.14).

    `spacing` is in mm.
    """
    dataset.TotalPixelMatrixColumns, dataset.TotalPixelMatrixRows = width, height
    dataset.TotalPixelMatrixFocalPlanes = 1
    dataset.ImagedVolumeWidth, dataset.ImagedVolumeHeight = width * spacing, height * spacing
    dataset.ImagedVolumeDepth = 1.0  # micrometres, as is no other length
    dataset.ImageOrientationSlide = [0, -1, 0, -1, 0, 0]
    dataset.DimensionOrganizationType = "TILED_FULL"
    origin = Dataset()
    origin.XOffsetInSlideCoordinateSystem, origin.YOffsetInSlideCoordinateSystem = 20, 40
    dataset.TotalPixelMatrixOriginSequence = [origin]
    measures, light, kind, shared = Dataset(), Dataset(), Dataset(), Dataset()
    measures.PixelSpacing = [round(spacing, 6)] * 2
    measures.SliceThickness = 0.001
    light.OpticalPathIdentifier = "1"
    kind.FrameType = ["DERIVED", "PRIMARY", "VOLUME", "NONE"]
    shared.PixelMeasuresSequence = [measures]
    shared.OpticalPathIdentificationSequence = [light]
    shared.WholeSlideMicroscopyImageFrameTypeSequence = [kind]
    dataset.SharedFunctionalGroupsSequence = [shared]


def _coded(code: Code) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator = code.value, code.scheme_designator
    item.CodeMeaning = code.meaning
    return item


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m demo.wsi", description="Write a DICOM slide.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=SIZE, help="bytes (%(default)s)")
    options = parser.parse_args()
    print(write_sample_wsi(options.folder, size=options.size))


if __name__ == "__main__":
    main()
