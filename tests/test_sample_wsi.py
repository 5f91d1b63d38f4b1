"""The made-up DICOM slide, as pydicom and wsidicom read it, from files and over DICOMweb."""

import numpy as np
import pydicom
import pytest
import wsidicom
from dicomweb_client.api import DICOMwebClient
from test_web import serving

from demo.wsi import FACTORS, LEVELS, SERIES, STUDY, TILE, write_sample_wsi
from dicomstore import DicomStore

#: wsidicom asks for tiles where pydicom expects to be told how to fetch all of the pixels.
pytestmark = pytest.mark.filterwarnings("ignore:No bulk data URI handler:UserWarning")

SIZE = 3_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_sample_wsi(tmp_path_factory.mktemp("wsi") / "slide", size=SIZE)


def test_each_level_is_an_instance_of_one_series(folder):
    """Three instances of whole tiles, in JPEG, of the same size in millimetres."""
    levels = [pydicom.dcmread(path) for path in sorted(folder.iterdir())]
    assert len(levels) == LEVELS
    for level, factor in zip(levels, (1, *FACTORS), strict=False):
        assert (level.StudyInstanceUID, level.SeriesInstanceUID) == (STUDY, SERIES)
        assert level.file_meta.TransferSyntaxUID.name.startswith("JPEG Baseline")
        sides = level.TotalPixelMatrixColumns, level.TotalPixelMatrixRows
        assert level.NumberOfFrames == np.prod([-(-side // TILE) for side in sides])
        assert sides[0] == levels[0].TotalPixelMatrixColumns // factor
        assert level.ImagedVolumeWidth == pytest.approx(levels[0].ImagedVolumeWidth, rel=0.05)
    assert len({level.SOPInstanceUID for level in levels}) == LEVELS


def test_the_same_files_each_time(folder, tmp_path):
    """Fixed UIDs and no date of today: a second run writes the same bytes."""
    again = write_sample_wsi(tmp_path / "again", size=SIZE)
    for path in folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_lower_levels_show_what_level_0_shows(folder):
    """wsidicom reads a pyramid: a region looks alike at every level, and is not empty."""
    with wsidicom.WsiDicom.open(folder) as slide:
        assert [level.level for level in slide.pyramids[0]] == [0, 2, 4]
        width, height = slide.size.width // 16, slide.size.height // 16
        smallest = np.asarray(slide.read_region((0, 0), 4, (width, height)).convert("RGB"))
        whole = slide.read_region((0, 0), 0, (width * 16, height * 16)).convert("RGB")
        reduced = np.asarray(whole.reduce(16))
    assert smallest.std() > 20
    assert np.abs(reduced.astype(int) - smallest).mean() < 6


def test_wsidicom_reads_the_same_over_dicomweb(folder, client):
    """Regions of every level, across the borders of tiles, equal those of the files."""
    with DicomStore(client, progress=False) as store:
        store.load(folder)
        with serving(store) as address, wsidicom.WsiDicom.open(folder) as files:
            web = wsidicom.WsiDicomWebClient(DICOMwebClient(address))
            with wsidicom.WsiDicom.open_web(web, STUDY, SERIES) as slide:
                assert slide.size == files.size
                for place, level, size in (
                    ((900, 700), 0, (700, 500)),
                    ((100, 60), 2, (300, 200)),
                    ((0, 0), 4, (60, 40)),
                ):
                    regions = [one.read_region(place, level, size) for one in (slide, files)]
                    first, second = (np.asarray(region) for region in regions)
                    assert first.std() > 5
                    assert np.array_equal(first, second)
