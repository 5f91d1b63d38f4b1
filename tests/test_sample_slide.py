"""The made-up slide: what OpenSlide, tifffile and tiffslide see in it."""

import errno
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
import tiffslide
from PIL import Image

import demo.slide
from demo.slide import FACTORS, TILE, TOLERANCE, write_sample_slide

SIZE = 5_000_000


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_sample_slide(tmp_path_factory.mktemp("slide") / "sample.svs", size=SIZE)


@pytest.fixture(scope="module")
def slide(path):
    with openslide.OpenSlide(path) as opened:
        yield opened


def pixels_of(slide, level):
    region = slide.read_region((0, 0), level, slide.level_dimensions[level])
    return np.asarray(region.convert("RGB"))


def difference(a, b):
    return np.abs(a.astype(int) - b).mean()


def test_openslide_reads_an_aperio_pyramid(slide):
    """OpenSlide sees vendor, levels, resolution and thumbnail of an Aperio slide."""
    properties = slide.properties
    assert properties["openslide.vendor"] == "aperio"
    assert slide.level_downsamples == (1, *FACTORS)
    assert slide.level_dimensions[-1] == tuple(n // FACTORS[-1] for n in slide.dimensions)
    assert float(properties["openslide.mpp-x"]) == pytest.approx(0.499)
    assert properties["openslide.objective-power"] == "20"
    assert properties["openslide.level[0].tile-width"] == "256"
    thumbnail = np.asarray(slide.associated_images["thumbnail"].convert("RGB"))
    shrunk = Image.fromarray(pixels_of(slide, 1)).resize(thumbnail.shape[1::-1])
    assert difference(thumbnail, np.asarray(shrunk)) < 8


def test_pages_are_laid_out_as_by_aperio(path):
    """Level 0, a stripped thumbnail, the lower levels; YCbCr tiles of a realistic size."""
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_svs
        assert [page.is_tiled for page in tiff.pages] == [True, False, True, True, True]
        assert len(tiff.pages[1].dataoffsets) > 1
        assert {page.photometric.name for page in tiff.pages} == {"YCBCR"}
        assert all(page.description.startswith("Aperio Image Library") for page in tiff.pages)
        assert "|AppMag = 20|MPP = 0.4990|" in tiff.pages[0].description
        assert 10_000 < np.median(tiff.pages[0].databytecounts) < 30_000


def test_readers_agree(path, slide):
    """tifffile and tiffslide give the pixels that OpenSlide gives, across tile borders."""
    x, y = (n // 2 // TILE * TILE - 100 for n in slide.dimensions)
    box = np.s_[y : y + 400, x : x + 600]
    seen = np.asarray(slide.read_region((x, y), 0, (600, 400)).convert("RGB"))
    assert seen.std() > 20
    with tiffslide.TiffSlide(path) as other:
        assert other.properties["tiffslide.vendor"] == "aperio"
        assert difference(seen, np.asarray(other.read_region((x, y), 0, (600, 400)))) < 1
    assert difference(seen, tifffile.imread(path, key=0)[box]) < 1


def test_size_is_as_asked(tmp_path, path):
    """The file has the bytes asked for, within the stated tolerance."""
    assert path.stat().st_size == pytest.approx(SIZE, rel=TOLERANCE)
    for size in (1_000_000, 30_000_000):
        other = write_sample_slide(tmp_path / "sample.svs", size=size)
        assert other.stat().st_size == pytest.approx(size, rel=TOLERANCE)


def test_lower_levels_show_what_level_0_shows(slide):
    """Every lower level is level 0, averaged."""
    level_0 = Image.fromarray(pixels_of(slide, 0))
    for level, factor in enumerate(FACTORS, 1):
        lower = pixels_of(slide, level)
        assert lower.std() > 20
        assert difference(lower, np.asarray(level_0.reduce(factor))) < 6


def test_no_seams(slide):
    """Neighbours differ across a border of tiles as much as across one of JPEG blocks."""
    level_0 = pixels_of(slide, 0)[4 * TILE : 12 * TILE, 4 * TILE : 12 * TILE].astype(np.int16)
    for axis in (0, 1):
        steps = np.abs(np.diff(level_0, axis=axis)).mean(axis=(1 - axis, 2))
        assert steps[TILE - 1 :: TILE].mean() < 1.3 * steps[15::16].mean()


def test_same_size_gives_same_bytes(tmp_path, path):
    """Another process writes the same file."""
    code = "import sys, demo.slide as s; s.write_sample_slide(sys.argv[1], size=int(sys.argv[2]))"
    folder = Path(demo.slide.__file__).parents[1]
    again = tmp_path / "again.svs"
    subprocess.run([sys.executable, "-c", code, again, str(SIZE)], cwd=folder, check=True)
    assert again.read_bytes() == path.read_bytes()


def test_bigtiff_is_aperio_too(tmp_path, monkeypatch):
    """Beyond the offsets of a classic TIFF, OpenSlide still sees an Aperio slide."""
    monkeypatch.setattr("demo.slide._CLASSIC_TIFF", 0)
    path = write_sample_slide(tmp_path / "big.svs", size=1_000_000)
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_bigtiff
    with openslide.OpenSlide(path) as slide:
        assert slide.properties["openslide.vendor"] == "aperio"
        assert slide.level_count == 1 + len(FACTORS)


def test_progress_ends_at_the_expected_bytes(tmp_path):
    """Progress grows and ends at what it announced."""
    calls = []
    path = tmp_path / "sample.svs"
    write_sample_slide(path, size=1_000_000, progress=lambda *call: calls.append(call))
    written, expected = zip(*calls, strict=True)
    assert list(written) == sorted(written)
    assert 0 < written[0] < written[-1] == expected[-1]
    assert len(set(expected)) == 1
    assert expected[0] == pytest.approx(path.stat().st_size, rel=TOLERANCE)


def test_no_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    """One sentence names the folder, the MB needed and the MB free; no file is made."""
    usage = shutil.disk_usage(tmp_path)._replace(free=7_000_000)
    monkeypatch.setattr("demo.slide.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match=r"needs 103 MB in .+, where 7 MB are free") as caught:
        write_sample_slide(tmp_path / "sample.svs", size=100_000_000)
    assert caught.value.errno == errno.ENOSPC
    assert str(tmp_path) in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "disk full")])
def test_interrupted_writing_leaves_nothing(tmp_path, error):
    """An interrupted run leaves no file of its own, and the file that was there as it was."""
    path = tmp_path / "sample.svs"
    path.write_bytes(b"before")
    names = []

    def interrupt(written, expected):
        names.extend(file.name for file in tmp_path.iterdir())
        raise error

    with pytest.raises((KeyboardInterrupt, OSError)):
        write_sample_slide(path, size=1_000_000, progress=interrupt)
    assert len(names) == 2
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"before"


def test_too_small_is_refused(tmp_path):
    """A size that no slide fits into is refused in one sentence."""
    with pytest.raises(ValueError, match=r"sample\.svs: 999999 bytes are too few"):
        write_sample_slide(tmp_path / "sample.svs", size=999_999)
