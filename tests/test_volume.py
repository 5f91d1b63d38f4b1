"""A series as one array: order, geometry, values, and what is refused."""

import io
import itertools
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK
from conftest import PYDICOM_DATA
from pydicom.dataset import Dataset
from pydicom.pixels import apply_rescale
from pydicom.uid import ExplicitVRBigEndian

from demo.ct import write_sample_ct
from dicomstore.errors import NotStoredError, VolumeError
from dicomstore.imaging import header
from dicomstore.imaging.frames import Frames
from dicomstore.imaging.locating import locate
from dicomstore.imaging.volume import Instance, needs_dataset, plan_volumes

#: To where a made-up slice has moved when the whole body is turned.
TILTED = np.linalg.qr(np.array([[0.9, 0.2, -0.3], [-0.1, 0.95, 0.2], [0.3, -0.1, 0.9]]))[0]


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """Six slices of the made-up CT, in their own order, from the head to the feet."""
    folder = write_sample_ct(tmp_path_factory.mktemp("ct"), slices=6, side=48)
    return [pydicom.dcmread(path) for path in sorted(folder.iterdir())]


def saved(datasets, folder):
    """Write data sets, as they are now, to `folder`, and return the paths in this order."""
    paths = [folder / f"{n}.dcm" for n in range(len(datasets))]
    for path, dataset in zip(paths, datasets, strict=True):
        dataset.save_as(path)
    return paths


def copied(datasets):
    buffers = [io.BytesIO() for _ in datasets]
    for dataset, buffer in zip(datasets, buffers, strict=True):
        dataset.save_as(buffer)
        buffer.seek(0)
    return [pydicom.dcmread(buffer) for buffer in buffers]


def instances_of(paths):
    for path in paths:
        members = header.searchable(io.BytesIO(path.read_bytes()))
        attributes = members["header"]
        if needs_dataset(attributes):
            attributes = pydicom.dcmread(path, stop_before_pixels=True)
        yield Instance(str(path), attributes, members.get("transferSyntaxUID"))


def volume_of(paths, plan=None):
    """Return the volume of files as the store makes it: native bytes in place, others decoded."""
    plan = plan or plan_volumes(instances_of(paths))[0]
    array = plan.empty()
    for n, one in enumerate(plan.slices):
        file = Path(one.path).read_bytes()
        members = header.searchable(io.BytesIO(file))
        member, table = locate(io.BytesIO(file), members)
        frames = Frames(one.path, member, members["header"], members["transferSyntaxUID"], table)
        span = frames.span(one.frame)
        fetched = file[span.offset : span.offset + span.length]
        if "bits" in member:
            room = plan.room(array, n)
            memoryview(room).cast("B")[:] = fetched
            plan.put_native(array, n, room)
        else:
            plan.put(array, n, frames.decode(one.frame, frames.stored(one.frame, fetched)))
    return plan.volume(array)


def turned(datasets, rotation, shift=(10.0, -20.0, 30.0)):
    """Return copies of slices whose patient has been turned and moved."""
    changed = copied(datasets)
    for dataset in changed:
        row, column = np.array(dataset.ImageOrientationPatient, float).reshape(2, 3)
        position = rotation @ np.array(dataset.ImagePositionPatient, float) + shift
        dataset.ImageOrientationPatient = [
            f"{number:.10f}" for number in (*(rotation @ row), *(rotation @ column))
        ]
        dataset.ImagePositionPatient = [f"{number:.10f}" for number in position]
    return changed


def arrangement(datasets, name):
    if name == "shuffled":
        return [datasets[n] for n in (3, 0, 5, 1, 4, 2)]
    if name == "tilted":
        return turned(datasets, TILTED)
    if name == "reversed":
        return turned(datasets, np.diag([1.0, 1.0, -1.0]))
    if name == "sagittal":
        return turned(datasets, np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]]))
    return datasets


ARRANGEMENTS = ["as written", "shuffled", "tilted", "reversed", "sagittal"]


# --- compared with others ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_equal_to_highdicom(series, name, tmp_path):
    """Voxels and the place of each are highdicom's, whose slices may run the other way."""
    paths = saved(arrangement(series, name), tmp_path)
    ours = volume_of(paths)
    theirs = highdicom.get_volume_from_series([pydicom.dcmread(path) for path in paths])
    array, affine = theirs.array, theirs.affine
    if np.dot(affine[:3, 0], ours.affine[:3, 0]) < 0:
        affine = affine @ np.array(
            [[-1, 0, 0, len(array) - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
        )
        array = array[::-1]
    np.testing.assert_array_equal(ours.array, array)
    np.testing.assert_allclose(ours.affine, affine, atol=1e-6)
    np.testing.assert_allclose(ours.spacing, theirs.spacing, atol=1e-6)


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_equal_to_simpleitk(series, name, tmp_path):
    """Voxels, their order and their geometry are those of SimpleITK's series reader."""
    paths = saved(arrangement(series, name), tmp_path)
    ours = volume_of(paths)
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path)))
    image = reader.Execute()
    np.testing.assert_array_equal(ours.array, SimpleITK.GetArrayFromImage(image))
    np.testing.assert_allclose(ours.spacing, image.GetSpacing()[::-1], atol=1e-6)
    for index in itertools.product(*((0, size - 1) for size in ours.array.shape)):
        place = image.TransformIndexToPhysicalPoint(tuple(reversed(index)))
        np.testing.assert_allclose((ours.affine @ (*index, 1))[:3], place, atol=1e-4)


def test_paths_are_in_the_order_of_slices(series, tmp_path):
    """`paths` names each slice's file, from the feet to the head for an axial series."""
    paths = saved(arrangement(series, "shuffled"), tmp_path)
    volume = volume_of(paths)
    heights = [pydicom.dcmread(path).ImagePositionPatient[2] for path in volume.paths]
    assert heights == sorted(heights) and set(volume.paths) == set(map(str, paths))


def test_real_series():
    """Slices of a real series lie where their headers say, with their own Rescale."""
    folder = PYDICOM_DATA / "test_files" / "dicomdirtests" / "77654033" / "CT2"
    paths = [path for path in folder.iterdir() if path.name != "17106"]
    volume = volume_of(paths)
    for k, path in enumerate(volume.paths):
        dataset = pydicom.dcmread(path)
        np.testing.assert_array_equal(volume.array[k], apply_rescale(dataset.pixel_array, dataset))
        place = (volume.affine @ (k, 0, 0, 1))[:3]
        np.testing.assert_allclose(place, dataset.ImagePositionPatient, atol=1e-3)


def test_enhanced_instance(large_files):
    """A real enhanced CT gives a volume by its functional groups, equal to highdicom's."""
    path = next(large_files.rglob("eCT_Supplemental.dcm"))
    ours = volume_of([path])
    dataset = pydicom.dcmread(path)
    frames = dataset.PerFrameFunctionalGroupsSequence
    where = [group.PlanePositionSequence[0].ImagePositionPatient for group in frames]
    assert ours.array.shape == (2, 512, 512) and ours.paths == (str(path),) * 2
    for k in range(2):
        assert (ours.affine @ (k, 0, 0, 1))[:3].tolist() in [list(place) for place in where]
    theirs = highdicom.imread(path).get_volume(apply_real_world_transform=False)
    array = theirs.array
    if np.dot(theirs.affine[:3, 0], ours.affine[:3, 0]) < 0:
        array = array[::-1]
    np.testing.assert_array_equal(ours.array, array)


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "dtype"),
    [
        ({}, np.int16),
        ({"RescaleIntercept": "0"}, np.uint16),
        ({"RescaleSlope": "2", "RescaleIntercept": "-3000"}, np.int16),
        ({"RescaleSlope": "-7", "RescaleIntercept": "0"}, np.int16),
        ({"RescaleSlope": "8"}, np.int16),
        ({"RescaleIntercept": "-32768"}, np.int16),
        ({"RescaleIntercept": "-32769"}, np.float32),
        ({"RescaleSlope": "9"}, np.float32),
        ({"RescaleSlope": "0.37"}, np.float32),
        ({"RescaleIntercept": "-0.5"}, np.float32),
        ({"BitsStored": 16, "HighBit": 15}, np.float32),
        ({"PixelRepresentation": 1, "RescaleIntercept": "0"}, np.int16),
        ({"PixelRepresentation": 1, "RescaleIntercept": "31000"}, np.float32),
    ],
)
def test_values_and_their_type(series, changed, dtype, tmp_path):
    """Values are pydicom's; their type is the smallest that holds whatever the bits can give."""
    datasets = copied(series[:3])
    for dataset in datasets:
        for keyword, value in changed.items():
            setattr(dataset, keyword, value)
    volume = volume_of(saved(datasets, tmp_path))
    assert volume.array.dtype == dtype
    expected = [apply_rescale(one.pixel_array, one) for one in reversed(datasets)]
    np.testing.assert_array_equal(volume.array, np.array(expected, np.float64).astype(dtype))


def test_slices_with_a_rescale_of_their_own(series, tmp_path):
    """Each slice keeps its own slope and intercept, as in PET."""
    datasets = copied(series)
    for n, dataset in enumerate(datasets):
        dataset.RescaleSlope, dataset.RescaleIntercept = str(0.5 + n), str(n)
    volume = volume_of(saved(datasets, tmp_path))
    expected = [apply_rescale(one.pixel_array, one) for one in reversed(datasets)]
    np.testing.assert_array_equal(volume.array, np.array(expected, np.float32))


@pytest.mark.parametrize("signed", [0, 1])
def test_bits_that_are_not_used_are_cleared(series, signed, tmp_path):
    """Whatever lies above BitsStored is no part of a value, as pydicom holds too."""
    datasets = copied(series[:2])
    for dataset in datasets:
        stored = np.frombuffer(dataset.PixelData, "<u2")
        dataset.PixelData = (stored | 0x5000).tobytes()
        dataset.PixelRepresentation = signed
    volume = volume_of(saved(datasets, tmp_path))
    expected = [apply_rescale(one.pixel_array, one) for one in reversed(datasets)]
    np.testing.assert_array_equal(volume.array, expected)


@pytest.mark.parametrize("bits", [8, 32])
def test_pixels_of_other_widths(series, bits, tmp_path):
    """8 and 32 bits a pixel, which cannot be read into their place, are rescaled as well."""
    datasets = copied(series[:2])
    for dataset in datasets:
        values = dataset.pixel_array >> 4
        dataset.PixelData = values.astype(f"<u{bits // 8}").tobytes()
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, 8, 7
    volume = volume_of(saved(datasets, tmp_path))
    expected = [apply_rescale(one.pixel_array, one) for one in reversed(datasets)]
    assert volume.array.dtype == np.int16
    np.testing.assert_array_equal(volume.array, expected)


def test_big_endian_and_compressed_slices(series, tmp_path):
    """Slices of several transfer syntaxes make one volume, the same as uncompressed ones."""
    expected = volume_of(saved(series, tmp_path)).array
    mixed = copied(series)
    for dataset in mixed[1:3]:
        dataset.compress(pydicom.uid.RLELossless, encoding_plugin="pydicom")
    swapped = Dataset()
    for data_element in mixed[4]:
        swapped.add(data_element)
    swapped.PixelData = mixed[4].pixel_array.astype(">u2").tobytes()
    swapped.file_meta = mixed[4].file_meta
    swapped.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    mixed[4] = swapped
    paths = [tmp_path / f"{n}.dcm" for n in range(6)]
    for path, dataset in zip(paths, mixed, strict=True):
        pydicom.dcmwrite(path, dataset)
    np.testing.assert_array_equal(volume_of(paths).array, expected)


def test_frame_of_another_size_than_its_header(series, tmp_path):
    """A compressed frame that is not of the header's size is refused, not put somewhere."""
    plan = plan_volumes(instances_of(saved(series, tmp_path)))[0]
    with pytest.raises(VolumeError, match=r"frame of \(3, 4\), where its header says \(48, 48\)"):
        plan.put(plan.empty(), 0, np.zeros((3, 4), np.uint16))


# --- what does not form one volume ---------------------------------------------------------------


def headers(count=5, **changed):
    """Return `count` axial slices as instances; `changed` holds what differs, by slice number."""
    found = []
    for n in range(count):
        attributes = {
            "SeriesInstanceUID": "1.2",
            "FrameOfReferenceUID": "1.3",
            "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
            "InstanceNumber": n + 1,
            "ImagePositionPatient": [0, 0, 2.5 * n],
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
            "PixelSpacing": [0.7, 0.8],
            "SliceThickness": 5,
            "Rows": 4,
            "Columns": 6,
            "PhotometricInterpretation": "MONOCHROME2",
            "BitsAllocated": 16,
            "BitsStored": 12,
            "PixelRepresentation": 0,
        }
        attributes |= changed.get(f"of_{n}", {})
        found.append(
            Instance(f"{n}.dcm", {key: value for key, value in attributes.items() if value != ""})
        )
    return found


def names(plan):
    return [one.path for one in plan.slices]


@pytest.mark.parametrize(
    ("change", "keyword"),
    [
        ({"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}, "ImageOrientationPatient"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "ImageType"),
        ({"Rows": 5}, "Rows or Columns"),
        ({"PixelSpacing": [0.7, 0.9]}, "PixelSpacing"),
        ({"FrameOfReferenceUID": "1.4"}, "FrameOfReferenceUID"),
        ({"SeriesInstanceUID": "1.4"}, "SeriesInstanceUID"),
    ],
)
def test_slices_that_differ(change, keyword):
    """A localiser, or another size or series, is named; `split` makes two volumes."""
    instances = headers(5, of_0=change)
    with pytest.raises(VolumeError, match=rf"^0\.dcm differ in {keyword} from the other 4 slices"):
        plan_volumes(instances)
    assert [names(plan) for plan in plan_volumes(instances, split=True)] == [
        ["1.dcm", "2.dcm", "3.dcm", "4.dcm"],
        ["0.dcm"],
    ]


def test_orientations_that_differ_by_rounding():
    """Direction cosines that differ in the last digits are the same orientation."""
    almost = {"ImageOrientationPatient": [0.99999, 0.00001, 0, 0, 1, 0]}
    assert len(plan_volumes(headers(5, of_2=almost))[0].slices) == 5


def test_positions_that_are_shared():
    """Slices at one position are named; `split` gives a volume for each InstanceNumber in turn."""
    places = {f"of_{n}": {"ImagePositionPatient": [0, 0, n // 2]} for n in range(6)}
    with pytest.raises(VolumeError, match=r"0\.dcm, 1\.dcm, .+ and 1 more share their positions"):
        plan_volumes(headers(6, **places))
    plans = plan_volumes(reversed(headers(6, **places)), split=True)
    assert [names(plan) for plan in plans] == [
        ["0.dcm", "2.dcm", "4.dcm"],
        ["1.dcm", "3.dcm", "5.dcm"],
    ]


def test_gaps():
    """The slices on both sides of a gap are named; `split` makes a volume of each side."""
    instances = headers(7)
    del instances[4]
    with pytest.raises(VolumeError, match=r"gaps between 3\.dcm, 5\.dcm: most steps are 2\.5 mm"):
        plan_volumes(instances)
    assert [names(plan) for plan in plan_volumes(instances, split=True)] == [
        ["0.dcm", "1.dcm", "2.dcm", "3.dcm"],
        ["5.dcm", "6.dcm"],
    ]


def test_slices_that_do_not_lie_in_a_line():
    """A slice that is shifted within its plane leaves a gap too: no affine holds for it."""
    with pytest.raises(VolumeError, match="gaps between"):
        plan_volumes(headers(5, of_2={"ImagePositionPatient": [3, 0, 5]}))


def test_slices_that_lean():
    """A leaning gantry shifts each slice alike: the affine leans as well."""
    lean = {f"of_{n}": {"ImagePositionPatient": [0, 0.5 * n, 2.5 * n]} for n in range(5)}
    plan = plan_volumes(headers(5, **lean))[0]
    assert plan.affine[:3, 0].tolist() == [0, 0.5, 2.5]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ImagePositionPatient": ""}, "has no ImagePositionPatient"),
        ({"ImagePositionPatient": [0, 1]}, "that is not 3 numbers"),
        ({"ImagePositionPatient": [0, 1, float("nan")]}, "that is not 3 numbers"),
        ({"ImagePositionPatient": ["a", "b", "c"]}, "that is not 3 numbers"),
        ({"ImageOrientationPatient": ""}, "has no ImageOrientationPatient"),
        ({"ImageOrientationPatient": [0, 0, 0, 0, 0, 0]}, "without two perpendicular directions"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "without two perpendicular directions"),
        ({"PixelSpacing": ""}, "has no PixelSpacing"),
        ({"PixelSpacing": [0, 1]}, "PixelSpacing that is not positive"),
        ({"Rows": 0}, "has no usable Rows"),
        ({"RescaleSlope": [1, 2]}, "RescaleSlope that is not 1 numbers"),
        ({"BitsAllocated": 1}, "has no pixels of 8, 16 or 32 bits"),
        ({"BitsStored": 17}, "has no pixels of 8, 16 or 32 bits"),
        ({"PixelRepresentation": ""}, "has no pixels of 8, 16 or 32 bits"),
        ({"PhotometricInterpretation": "RGB"}, "is not grey"),
        ({"ModalityLUTSequence": [{"ModalityLUTType": "OD"}]}, "has a Modality LUT"),
        ({"NumberOfFrames": 3}, "has several frames at one position"),
        ({"NumberOfFrames": 3, "ImagePositionPatient": ""}, "has no functional groups"),
    ],
)
def test_instances_that_are_no_slices(change, reason):
    """What has no geometry, or no grey integers, is named with the reason; `split` or not."""
    instances = headers(5, of_1=change, of_3=change)
    for split in (False, True):
        with pytest.raises(VolumeError, match=rf"^1\.dcm, 3\.dcm .*{reason}"):
            plan_volumes(instances, split=split)


def test_nothing():
    """No instance at all is an error, not an empty array."""
    with pytest.raises(VolumeError, match="no slices"):
        plan_volumes([])


def test_one_slice():
    """A single slice is a volume as thick as itself."""
    plan = plan_volumes(headers(1))[0]
    assert plan.spacing == (5, 0.7, 0.8) and plan.affine[:3, 0].tolist() == [0, 0, 5]


# --- enhanced instances --------------------------------------------------------------------------


def enhanced(places):
    """Return an enhanced instance's data set with a frame at each z, Rescale by frame."""
    dataset = Dataset()
    for keyword, value in headers(1)[0].attributes.items():
        if keyword not in ("ImagePositionPatient", "PixelSpacing", "ImageOrientationPatient"):
            setattr(dataset, keyword, value)
    dataset.NumberOfFrames = len(places)
    dataset.PerFrameFunctionalGroupsSequence = groups = [Dataset() for _ in places]
    for z, group in zip(places, groups, strict=True):
        group.PlanePositionSequence = [Dataset()]
        group.PlanePositionSequence[0].ImagePositionPatient = [0, 0, z]
        group.PixelValueTransformationSequence = [Dataset()]
        group.PixelValueTransformationSequence[0].RescaleIntercept = z
        group.PixelValueTransformationSequence[0].RescaleSlope = 1
    common = Dataset()
    common.PlaneOrientationSequence = [Dataset()]
    common.PlaneOrientationSequence[0].ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    common.PixelMeasuresSequence = [Dataset()]
    common.PixelMeasuresSequence[0].PixelSpacing = [0.7, 0.8]
    common.PixelValueTransformationSequence = [Dataset()]
    common.PixelValueTransformationSequence[0].RescaleIntercept = 99
    dataset.SharedFunctionalGroupsSequence = [common]
    return dataset


def test_functional_groups():
    """Frames are ordered by their functional groups, per frame before shared ones."""
    dataset = enhanced([4, 0, 2])
    assert needs_dataset(dataset) and not needs_dataset(headers(1)[0].attributes)
    plan = plan_volumes([Instance("e.dcm", dataset)])[0]
    assert [one.frame for one in plan.slices] == [1, 2, 0]
    assert [one.intercept for one in plan.slices] == [0, 2, 4]
    assert plan.spacing == (2, 0.7, 0.8) and names(plan) == ["e.dcm"] * 3


def test_functional_groups_that_do_not_count():
    """Fewer groups than frames are refused."""
    dataset = enhanced([4, 0, 2])
    dataset.NumberOfFrames = 4
    with pytest.raises(VolumeError, match=r"e\.dcm has no functional groups for each"):
        plan_volumes([Instance("e.dcm", dataset)])


def test_many_names_are_looked_up_together(store, client, tmp_path):
    """A volume of named files takes a few round trips, not one for each name."""
    store.load(write_sample_ct(tmp_path, slices=60, side=16))
    paths = list(store.find()["path"])
    before = client.info("stats")["total_reads_processed"]
    volume = store.volume(paths)
    assert client.info("stats")["total_reads_processed"] - before < 20
    assert sorted(volume.paths) == paths
    with pytest.raises(NotStoredError, match="'none'"):
        store.volume([*paths, "none"])
