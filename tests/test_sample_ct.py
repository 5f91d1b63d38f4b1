"""The made-up CT: a valid series, always the same, that looks like a chest."""

import numpy as np
import pydicom

from demo.ct import write_sample_ct

#: Type 1 attributes of the CT Image IOD (PS3.3 A.3), and those of type 2 that it must hold.
REQUIRED = """SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID Modality
    FrameOfReferenceUID PixelSpacing ImageOrientationPatient ImagePositionPatient ImageType
    SamplesPerPixel PhotometricInterpretation Rows Columns BitsAllocated BitsStored HighBit
    PixelRepresentation PixelData RescaleIntercept RescaleSlope"""
PRESENT = """PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime StudyID
    AccessionNumber ReferringPhysicianName SeriesNumber PositionReferenceIndicator Manufacturer
    SliceThickness KVP AcquisitionNumber InstanceNumber ContrastBolusAgent"""


def test_made_up_ct_is_a_valid_series(tmp_path):
    """Each file has what the CT Image IOD requires, UIDs of its own, and no patient."""
    paths = sorted(write_sample_ct(tmp_path / "ct", slices=6, side=48).iterdir())
    series = [pydicom.dcmread(path) for path in paths]
    for dataset in series:
        assert all(dataset[keyword].value not in ("", None) for keyword in REQUIRED.split())
        assert all(keyword in dataset for keyword in PRESENT.split())
        assert dataset.file_meta.MediaStorageSOPInstanceUID == dataset.SOPInstanceUID
        assert dataset.SOPInstanceUID.is_valid and dataset.SOPInstanceUID.startswith("2.25.")
        assert dataset.PatientName == "MADE UP" and dataset.pixel_array.max() < 4096
    assert len({dataset.SOPInstanceUID for dataset in series}) == 6
    assert [dataset.InstanceNumber for dataset in series] == [1, 2, 3, 4, 5, 6]


def test_made_up_ct_is_the_same_each_time(tmp_path):
    """It is made of fixed numbers: the same files with the same bytes each time."""
    first, second = (
        {
            path.name: path.read_bytes()
            for path in write_sample_ct(folder, slices=6, side=48).iterdir()
        }
        for folder in (tmp_path / "1", tmp_path / "2")
    )
    assert first == second and len(set(first.values())) == 6


def test_made_up_ct_looks_like_a_chest(tmp_path):
    """Air is around it; lungs, soft tissue and bone take about as much of it as in a body."""
    paths = sorted(write_sample_ct(tmp_path / "ct", slices=40, side=96).iterdir())
    stored = np.stack([pydicom.dcmread(path).pixel_array for path in paths])
    array = stored.astype(np.int16) - 1024
    inside = array[:, 18:-18, 6:-6]
    shares = [
        np.mean((inside > low) & (inside < high))
        for low, high in ((-950, -700), (-150, 150), (350, 1500))
    ]
    assert np.all(array[:, 0] < -900)
    assert 0.1 < shares[0] < 0.4 and 0.3 < shares[1] < 0.7 and 0.01 < shares[2] < 0.1
    noise = array[:, :12, :12].std()
    assert 5 < noise < 40
