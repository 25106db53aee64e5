"""Volumes that appear in a folder while a scan runs, and responses that equal those of the scan that ended there."""

import gzip
import struct
import time
from unittest.mock import Mock

import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
import pytest

from braindecode_vis.base.checks import DataError
from braindecode_vis.datasets.bids.fmri_dataset import BidsFmriConfig
from braindecode_vis.datasets.sources.betas_source import Geometry
from braindecode_vis.datasets.sources.bold_source import CleanConfig, GlmConfig, WindowConfig
from braindecode_vis.parts.live.volume_decoder import ScanSoFar
from braindecode_vis.parts.live.volumes import FolderSource, write_volumes
from braindecode_vis.parts.phantom.formats import bids_fmri as phantom
from braindecode_vis.preprocessing.bold import make_betas

AFFINE = np.array([[-4.0, 0, 0, 20], [0, 4, 0, -30], [0, 0, 4, -10], [0, 0, 0, 1]])
SHAPE, N, T_R = (6, 5, 4), 40, 2.0
MASK = np.zeros(SHAPE, bool)
MASK[1:-1, 1:-1, 1:-1] = True
GEOMETRY = Geometry.from_mask(MASK, AFFINE)
EVENTS = pd.DataFrame({"onset": 6.0 + 7.0 * np.arange(8), "duration": 1.0, "trial_type": "picture"}).assign(
    stimulus_id=["ant", "bee", "cat", "dog"] * 2,
    stim_file=[f"a/{name}.jpg" for name in ["ant", "bee", "cat", "dog"] * 2],
)
VOLUMES = (1000 + np.random.default_rng(0).normal(size=(N, *SHAPE)).cumsum(axis=0) * 3).astype(np.float32)


def write_one(folder, number, values=None, affine=AFFINE, t_r=T_R, name="vol-{:04d}.nii"):
    image = nib.Nifti1Image(VOLUMES[number - 1] if values is None else values, affine)
    image.header["pixdim"][4] = t_r
    image.header.set_xyzt_units("mm", "sec")
    path = folder / name.format(number)
    nib.save(image, path)
    return path


def open_source(folder, **options):
    options = {"geometry": GEOMETRY, "t_r": T_R, "wait": 0, "patience": 0, "idle": 60} | options
    return FolderSource(folder, **options)


def read_all(source, n, timeout=600.0):
    """Chunks until `n` volumes have come."""
    chunks, until = [], time.monotonic() + timeout
    while not chunks or (sum(c.samples.shape[1] for c in chunks) < n and time.monotonic() < until):
        chunks.append(source.read(0.05))
    samples = np.concatenate([c.samples for c in chunks], axis=1)
    return samples, np.concatenate([c.times for c in chunks]), [note for c in chunks for note in c.notes]


def test_volumes_come_in_order_once_and_a_lost_one_is_named(tmp_path):
    for number in (1, 2, 4):
        write_one(tmp_path, number)
    nib.save(nib.Nifti1Image(VOLUMES[1], AFFINE), tmp_path / "other-0002.nii")
    source = open_source(tmp_path)
    assert source.connect().sfreq == 1 / T_R
    samples, times, notes = read_all(source, 3)
    np.testing.assert_array_equal(samples.T, VOLUMES[[0, 1, 3]][:, MASK])
    np.testing.assert_array_equal(times, [0, 2, 6])
    assert any("volume 3 is missing" in note for note in notes)
    assert any("volume 2 came twice" in note for note in notes)
    write_one(tmp_path, 3)
    assert any("came too late" in note for note in read_all(source, 1, 0.2)[2])


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_volume_is_taken_when_all_of_it_is_there(tmp_path, ending):
    whole = write_one(tmp_path, 1, name="whole{}.nii").read_bytes()
    (tmp_path / "whole1.nii").unlink()
    whole = gzip.compress(whole) if ending.endswith("gz") else whole
    source, path = open_source(tmp_path), tmp_path / f"vol-1{ending}"
    source.connect()
    for cut in (100, len(whole) // 2):
        path.write_bytes(whole[:cut])
        assert not read_all(source, 1, 0.1)[0].size
    path.write_bytes(whole)
    np.testing.assert_array_equal(read_all(source, 1)[0][:, 0], VOLUMES[0][MASK])


def test_a_series_that_grows_gives_each_volume_once(tmp_path):
    made = nib.Nifti1Image(VOLUMES[:4].transpose(1, 2, 3, 0), AFFINE)
    made.header.set_zooms((4, 4, 4, T_R))
    made.header.set_xyzt_units("mm", "sec")
    nib.save(made, tmp_path / "all.nii")
    data = (tmp_path / "all.nii").read_bytes()
    size = VOLUMES[0].nbytes
    (tmp_path / "all.nii").write_bytes(data[: -2 * size - 7])
    source = open_source(tmp_path)
    source.connect()
    first = read_all(source, 1)[0]
    (tmp_path / "all.nii").write_bytes(data)
    rest, times, _ = read_all(source, 3)
    np.testing.assert_array_equal(np.hstack([first, rest]).T, VOLUMES[:4][:, MASK])
    assert times[-1] == 6


def test_volumes_that_run_the_other_way_are_turned_and_others_refused(tmp_path):
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = SHAPE[0] - 1
    write_one(tmp_path, 1, VOLUMES[0][::-1], AFFINE @ flip)
    source = open_source(tmp_path)
    source.connect()
    samples, _, notes = read_all(source, 1)
    np.testing.assert_array_equal(samples[:, 0], VOLUMES[0][MASK])
    assert any("reoriented" in note for note in notes)
    moved = AFFINE.copy()
    moved[0, 3] += 1
    # A localiser, another sequence and a structural image in the folder end no scan that has begun.
    write_one(tmp_path, 7, VOLUMES[0][:-1])
    write_one(tmp_path, 8, t_r=1.5)
    write_one(tmp_path, 8, name="anat.nii")
    write_one(tmp_path, 2)
    samples, _, notes = read_all(source, 1)
    np.testing.assert_array_equal(samples[:, 0], VOLUMES[1][MASK])
    assert sum("is left out" in note for note in notes) == 3
    for path in tmp_path.glob("*.nii"):
        path.unlink()
    for options, words in (
        ({"affine": moved}, "another grid"),
        ({"values": VOLUMES[0][:-1]}, "another resolution or field of view"),
        ({"t_r": 1.5}, "repetition time of 1.5 s"),
    ):
        write_one(tmp_path, 1, **options)
        with pytest.raises(DataError, match=words):
            open_source(tmp_path, wait=1).connect()
    (tmp_path / "vol-0001.nii").rename(tmp_path / "volume.nii")
    write_one(tmp_path, 1, name="volume.nii")
    with pytest.raises(DataError, match="no number in its name"):
        open_source(tmp_path, wait=1).connect()
    with pytest.raises(DataError, match="does not exist"):
        open_source(tmp_path / "nowhere").connect()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="--tr"):
        open_source(tmp_path / "empty", t_r=None).connect()


def make_csa(**tags):
    """The private header that Siemens writes beside a mosaic, its second version."""
    packed = b"SV10\4\3\2\1" + struct.pack("<2I", len(tags), 77)
    for name, (kind, values) in tags.items():
        packed += struct.pack("<64si4s3i", name.encode(), len(values), kind, 6, len(values), 77)
        for value in values:
            text = str(value).encode() + b"\0"
            packed += (
                struct.pack("<4i", len(text), len(text), 77, len(text)) + text + b"\0" * (-len(text) % 4)
            )
    return packed


def write_dicom(folder, number, kind, series="1.2.3"):
    """A volume of the test grid whose rows and columns are DICOM's: (z, y, x), to the left and to the back."""
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4" + ".1" * (
        kind != "mosaic"
    )
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"1.2.{number}"
    data.Modality, data.SeriesInstanceUID, data.InstanceNumber = "MR", series, number
    values = np.round(VOLUMES[number - 1]).astype(np.uint16).transpose(2, 1, 0)  # (z, y, x)
    # x grows to the left in AFFINE (as in DICOM); y to the front, which DICOM counts to the back: rows from the last.
    values = values[:, ::-1]
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit = 15
    first = np.array([-20.0, 30 - 4 * (SHAPE[1] - 1), -10])  # of the first pixel, DICOM's x and y
    direction = [1, 0, 0, 0, 1, 0]
    if kind == "mosaic":
        tiles = np.zeros((2, 2, SHAPE[1], SHAPE[0]), np.uint16)
        tiles.reshape(4, SHAPE[1], SHAPE[0])[:] = values
        mosaic = tiles.transpose(0, 2, 1, 3).reshape(2 * SHAPE[1], 2 * SHAPE[0])
        data.ImageType = ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]
        data.Rows, data.Columns = mosaic.shape
        data.PixelSpacing, data.SliceThickness, data.SpacingBetweenSlices = [4, 4], 4, 4
        data.ImageOrientationPatient, data.RepetitionTime = direction, 1000 * T_R
        # Siemens gives the corner of the mosaic as if it were one large slice.
        data.ImagePositionPatient = (first - np.array([4 * SHAPE[0] / 2, 4 * SHAPE[1] / 2, 0])).tolist()
        block = data.private_block(0x29, "SIEMENS CSA HEADER", create=True)
        tags = {"NumberOfImagesInMosaic": (b"US", [4]), "SliceNormalVector": (b"FD", [0, 0, 1])}
        block.add_new(0x10, "OB", make_csa(AcquisitionMatrixText=(b"SH", ["5p*6"]), **tags))
        data.PixelData = mosaic.tobytes()
    else:
        data.Rows, data.Columns, data.NumberOfFrames = SHAPE[1], SHAPE[0], SHAPE[2]
        shared, timing, plane, turn = (pydicom.Dataset() for _ in range(4))
        timing.RepetitionTime = 1000 * T_R
        plane.PixelSpacing, plane.SliceThickness, plane.SpacingBetweenSlices = [4, 4], 4, 4
        turn.ImageOrientationPatient = direction
        shared.MRTimingAndRelatedParametersSequence, shared.PixelMeasuresSequence = [timing], [plane]
        shared.PlaneOrientationSequence = [turn]
        data.SharedFunctionalGroupsSequence = [shared]
        frames = []
        for z in range(SHAPE[2]):
            frame, content, place = (pydicom.Dataset() for _ in range(3))
            content.StackID, content.InStackPositionNumber, content.DimensionIndexValues = (
                "1",
                z + 1,
                [1, z + 1],
            )
            place.ImagePositionPatient = [first[0], first[1], first[2] + 4 * z]
            frame.FrameContentSequence, frame.PlanePositionSequence = [content], [place]
            frames.append(frame)
        data.PerFrameFunctionalGroupsSequence = frames
        index = [pydicom.Dataset(), pydicom.Dataset()]
        for item, tag in zip(index, (0x00209056, 0x00209057), strict=True):
            item.DimensionIndexPointer, item.FunctionalGroupPointer = tag, 0x00209111
        data.DimensionIndexSequence = index
        data.PixelData = values.tobytes()
    path = folder / f"{series}.{number:04d}.dcm"
    data.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize("kind", ["mosaic", "enhanced"])
def test_dicom_volumes_reach_the_same_voxels(tmp_path, kind):
    whole = write_dicom(tmp_path, 1, kind).read_bytes()
    write_dicom(tmp_path, 2, kind)
    write_dicom(tmp_path, 7, kind, series="9.9")
    source = open_source(tmp_path, t_r=None, wait=1)
    assert source.connect().sfreq == 1 / T_R
    samples, times, notes = read_all(source, 2)
    np.testing.assert_array_equal(samples.T, np.round(VOLUMES[:2][:, MASK]))
    assert times.tolist() == [0, 2]
    assert any("another series" in note for note in notes)
    third = tmp_path / "1.2.3.0003.dcm"
    whole = write_dicom(tmp_path, 3, kind).read_bytes()
    third.write_bytes(whole[:-100])
    assert not read_all(source, 1, 0.15)[0].size
    third.write_bytes(whole)
    assert read_all(source, 1)[1].tolist() == [4]


def test_events_that_grow_become_markers_line_by_line(tmp_path):
    table = tmp_path / "events.tsv"
    source = open_source(tmp_path, markers=table)
    assert not open_source(tmp_path).connect().markers
    source.connect()
    table.write_text("onset\tduration\tstim_file\n4.5\t1\ta/ant.jpg\n6\t1\tn/a\n9\t1\ta/b")
    assert [(m.time, m.value) for m in source.read(0).markers] == [(4.5, "ant")]
    with table.open("a") as file:
        file.write("ee.png\n")
    assert [(m.time, m.value) for m in source.read(0).markers] == [(9.0, "bee")]
    table.write_text("onset\tpicture\n")
    with pytest.raises(DataError, match="names the picture"):
        open_source(tmp_path, markers=table).read(0)


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    root = tmp_path_factory.mktemp("scan")
    for name, n in (("whole", N), ("cut", 24)):
        phantom.write_dataset(root / name, pd.DataFrame({"participant_id": ["sub-01"]}))
        events = EVENTS[EVENTS["onset"] < T_R * n - 8]
        confounds = pd.DataFrame({"csf": np.zeros(n)})
        phantom.write_run(
            root / name, "01", iter(VOLUMES[:n]), events, confounds, MASK, n_volumes=n, affine=AFFINE, t_r=T_R
        )
    return root


@pytest.mark.parametrize(
    "model",
    [
        GlmConfig(),
        GlmConfig(clean=CleanConfig(drift="polynomial", order=2, scaling="none")),
        WindowConfig(),
        WindowConfig(keep="times", clean=CleanConfig(scaling="percent", cutoff=40.0)),
        WindowConfig(until="offset"),
    ],
)
def test_a_live_response_is_that_of_the_scan_that_ended_there(scan, model):
    """Of the last trial in a recording of 24 volumes, by the run's own preprocessing."""
    root = scan / "cut"
    config = BidsFmriConfig(root=root, task="images", zscore="none", model=model)
    part = make_betas(config.open_bold()).parts[0]
    expected = part.read(0, len(part.trials))[-1]
    events = EVENTS[EVENTS["onset"] < T_R * 24 - 8]
    live = ScanSoFar(model, T_R)
    for number in range(24):
        live.add(VOLUMES[number][MASK], number)
    onset, duration = events["onset"].iloc[-1], 1.0
    assert live.find_last(onset, duration) <= 24
    others = list(zip(events["onset"][:-1], events["duration"][:-1], strict=True))
    found, notes = live.estimate(onset, duration, others)
    assert not notes
    np.testing.assert_allclose(found.T.squeeze(), expected, rtol=1e-4, atol=2e-5 * np.abs(expected).max())


def test_a_missing_volume_is_named_and_the_time_axis_keeps_its_place(scan):
    live = ScanSoFar(WindowConfig(), T_R)
    for number in set(range(24)) - {10}:
        live.add(VOLUMES[number][MASK], number)
    found, notes = live.estimate(16.0, 1.0)  # volumes 10 and 11
    assert notes == ["1 volumes of its window are missing."]
    assert np.isfinite(found).all()
    alone = ScanSoFar(WindowConfig(stop=6.0), T_R)
    for number in set(range(24)) - {10}:
        alone.add(VOLUMES[number][MASK], number)
    with pytest.raises(DataError, match="1 of the 1 volumes"):
        alone.estimate(16.0, 1.0)


def test_a_recorded_run_is_played_volume_by_volume(scan, tmp_path):
    image = next((scan / "whole").rglob("*_bold.nii.gz"))
    table = next((scan / "whole").rglob("*_events.tsv"))
    slept = []
    source = open_source(tmp_path, markers=tmp_path / "events.tsv", idle=0.05)
    source.connect()
    markers, n = [], 0
    for _ in write_volumes(image, tmp_path, events=table, duration=18.0, sleep=slept.append):
        chunk = source.read(1.0)
        markers, n = [*markers, *chunk.markers], n + chunk.samples.shape[1]
        # An event is known with the volume in which it began, not earlier.
        assert all(m.time < T_R * (n + 1) for m in chunk.markers)
    samples = read_all(source, 9 - n)[0]
    assert n + samples.shape[1] == 9
    assert [m.value for m in markers] == ["ant", "bee"]
    assert 1.5 < slept[0] <= 2
    while not (chunk := source.read(0.05)).ended:
        pass
    assert "the scan is over" in chunk.notes[-1]
    with pytest.raises(DataError, match="holds volumes already"):
        next(write_volumes(image, tmp_path))


@pytest.mark.parametrize(
    ("t_r", "patience", "is_waited_for"), [(None, None, False), (60.0, None, True), (60.0, 0, False)]
)
def test_a_missing_volume_is_waited_for_as_long_as_one_takes(tmp_path, t_r, patience, is_waited_for):
    """Where nobody knows how long that is, it is given up at once."""
    source = FolderSource(tmp_path, t_r=t_r, patience=patience)
    for number in (1, 3):
        source._ready[number] = Mock(number=number, seen=time.perf_counter())
    assert [volume.number for volume in source._hand_on()] == ([1] if is_waited_for else [1, 3])
    assert ["volume 2 is missing" in note for note in source._notes] == [True] * (not is_waited_for)
