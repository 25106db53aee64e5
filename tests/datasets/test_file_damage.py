"""Damaged files of every format are named by `check`, and sound ones are not."""

import gzip
import shutil
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from braindecode_vis.base.checks import DataError
from braindecode_vis.cli.catalogue import check
from braindecode_vis.datasets.sources.file_damage import check_data_file, check_data_files, check_texts
from braindecode_vis.parts.phantom import FORMATS
from braindecode_vis.parts.phantom.formats.nsd_repacks import write_tar
from braindecode_vis.pipeline.preparing import write_dataset
from braindecode_vis.pipeline.runs import SilentListener
from braindecode_vis.preprocessing.whole_check import check_trials
from tests.parts.phantom.test_assemble import LOADERS
from tests.parts.phantom.tiny import make_tiny

# Format -> a file of its samples.
SAMPLES = {
    "things-eeg2": "sub-01/ses-02/raw_eeg_test.npy",
    "things-eeg2-official": "sub-01/preprocessed_eeg_test.npy",
    "things-eeg2-250hz": "sub-01/preprocessed_eeg_test.npy",
    "things-eeg2-neurobridge": "preprocessed_eeg/sub-01/test.npy",
    "things-eeg2-ubp": "Preprocessed_data_250Hz_whiten/sub-01/test.pt",
    "things-meg": "derivatives/preprocessed/preprocessed_P1-epo.fif",
    "nsd": "nsddata_betas/ppdata/subj01/func1pt8mm/betas_fithrf_GLMdenoise_RR/betas_session02.nii.gz",
    "things-fmri": "betas_csv/sub-01_ResponseData.h5",
    "god": "Subject1.h5",
    "bids-eeg": "sub-01/ses-01/eeg/*_eeg.eeg",
    "bids-fmri": "derivatives/fmriprep/sub-01/ses-01/func/*preproc_bold.nii.gz",
    "things-eeg1": "sub-01/eeg/*_eeg.eeg",
    "alljoined1": "subj01_session2_eeg.fif",
    "alljoined16m": "raw_eeg/sub-01/session_01/block_02/*.edf",
    "deeprecon": "sub-01_perceptionNaturalImageTraining*.h5",
    "nsd-timeseries": "nsddata_timeseries/ppdata/subj01/func1pt8mm/timeseries/*run02.nii.gz",
    "nsd-mindeye1": "webdataset_avg_split/train/*.tar",
    "nsd-mindeye2": "betas_all_subj01*.hdf5",
    "nsd-brain-diffuser": "nsd_train_fmriavg*.npy",
    "nod": "sub-01/ses-imagenet01/func/*_bold.nii.gz",
    "cneuromod-things": "THINGS/glmsingle/sub-01/glmsingle/output/*statseries.h5",
    "vim-1": "EstimatedResponses.mat",
    "bold5000": "sub-CSI1/ses-02/func/*_bold.nii.gz",
    "bold5000-betas": "BOLD5000_GLMsingle_betas/*ses-02.nii.gz",
}
# Making these phantoms, or converting their files, takes most of the time.
SLOW = (
    "things-meg", "things-eeg2", "things-eeg2-official", "things-eeg2-ubp", "alljoined1", "alljoined16m", "bids-eeg",
    "bids-fmri", "nod", "nsd-timeseries", "bold5000", "deeprecon",
)  # fmt: skip
# One format of each way to store samples that is quick to make.
QUICK = ("things-eeg2-250hz", "god", "nsd-brain-diffuser", "vim-1", "bold5000-betas")
LAYOUTS = [
    pytest.param(
        name, marks=pytest.mark.slow if name in SLOW else () if name in QUICK else pytest.mark.further
    )
    for name in FORMATS
    if name in SAMPLES
]


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    base = tmp_path_factory.mktemp("phantoms")

    def make(name):
        return base / name if (base / name).exists() else make_tiny(name, base / name)

    return make


def configure(name, root):
    loader, options = LOADERS[name]
    return loader(root=root, **options)


def preprocess(config, folder):
    write_dataset(config, folder, seed=0, listener=SilentListener())


def zero_half(path):
    """Overwrite the second half of the samples, as a broken copy does; the size stays."""
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        content = gzip.decompress(raw)
        half = len(content) // 2
        path.write_bytes(gzip.compress(content[:half] + bytes(len(content) - half), 1))
    elif b"\x89HDF" in raw[:520]:
        with h5py.File(path, "r+") as file:
            found = []
            file.visititems(lambda _, item: found.append(item) if isinstance(item, h5py.Dataset) else None)
            largest = max((item for item in found if item.dtype.kind in "fi"), key=lambda item: item.size)
            largest[largest.shape[0] // 2 :] = 0
    else:
        first, last = int(0.45 * len(raw)), int(0.95 * len(raw))
        path.write_bytes(raw[:first] + bytes(last - first) + raw[last:])


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_damaged_file_is_found_and_a_sound_one_is_not(name, phantoms, tmp_path):
    root = shutil.copytree(phantoms(name), tmp_path / "data")
    config = configure(name, root)
    assert [found for found in check(SimpleNamespace(dataset=config), full=True) if not found.ok] == []
    path = next(iter(root.glob(SAMPLES[name])))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 52 // 100])
    named = [found for found in check_data_files(root) if not found.ok]
    assert path.stem in named[0].message or path.with_suffix("").name in named[0].message
    assert "1 damaged" in named[-1].message
    with pytest.raises(DataError):
        preprocess(config, tmp_path / "cut")
    path.write_bytes(whole)
    zero_half(path)
    assert [found for found in check_trials(config) if not found.ok]
    with pytest.raises(DataError):
        preprocess(config, tmp_path / "zeros")


def test_all_damaged_files_are_named_at_once_with_exit_2(phantoms, tmp_path, command_line):
    """A session of NSD that a broken download had cut to half passed `check`, which looked at its first volumes."""
    root = shutil.copytree(phantoms("nsd"), tmp_path / "data")
    assert command_line("check", "nsd", "--root", root).returncode == 0
    folder = root / "nsddata_betas/ppdata/subj01/func1pt8mm/betas_fithrf_GLMdenoise_RR"
    for number in (1, 2):
        path = folder / f"betas_session{number:02d}.nii.gz"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    said = command_line("check", "nsd", "--root", root)
    assert said.returncode == 2
    assert "betas_session01.nii.gz" in said.stdout
    assert "betas_session02.nii.gz" in said.stdout
    assert "2 damaged" in said.stdout


def test_a_folder_without_recordings_is_not_called_sound(tmp_path, command_line):
    """Below what was missing stood "ok files: 0 files, 0.0 MB: sizes compared with headers"."""
    said = command_line("check", "god", "--root", tmp_path)
    assert said.returncode == 2
    assert "wrong" in said.stdout
    assert "ok " not in said.stdout


def test_full_reads_what_a_look_cannot_see(phantoms, tmp_path, command_line):
    root = shutil.copytree(phantoms("nsd"), tmp_path / "data")
    path = next(root.rglob("betas_session02.nii.gz"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF  # one byte: the size and the end are as they were
    path.write_bytes(content)
    check_data_file(path)
    said = command_line("check", "nsd", "--root", root, "--full")
    assert said.returncode == 2
    assert "session02" in said.stdout


@pytest.mark.shared
@pytest.mark.parametrize(
    "name", ["haxby_slices", "muse_n170", "digits69", "god", "nsd", "readers", "bids_metadata"]
)
def test_real_files_are_whole(shared, name):
    assert [found for found in check_data_files(shared / "data" / name, full=True) if not found.ok] == []


@pytest.mark.parametrize("name", ["test.edf", "test.bdf", "test.vhdr", "test_ctf_comp_raw.fif"])
@pytest.mark.shared
def test_real_recordings_that_are_cut_are_named(shared, tmp_path, name):
    source = shared / "data/readers/mne"
    for path in source.glob(f"{name.split('.')[0]}.*"):
        shutil.copy(path, tmp_path)
        (tmp_path / path.name).chmod(0o644)
    check_data_file(tmp_path / name, full=True)
    samples = (tmp_path / name).with_suffix(".eeg") if name.endswith(".vhdr") else tmp_path / name
    samples.write_bytes(samples.read_bytes()[: int(0.7 * samples.stat().st_size)])
    with pytest.raises(DataError, match="truncated"):
        check_data_file(tmp_path / name)


def test_a_tar_with_zeros_in_the_middle_is_named(tmp_path):
    """Zeros pass for the end of a tar; the loader noticed the members behind them, `check` did not."""
    path = tmp_path / "train_subj01_0.tar"
    write_tar(path, {f"{n:05d}": {"nsdgeneral.npy": np.ones(2000)} for n in range(4)})
    assert all(finding.ok for finding in check_data_files(tmp_path))
    content = bytearray(path.read_bytes())
    second = content.index(b"00001.nsdgeneral.npy")
    content[second : second + 1024] = bytes(1024)
    path.write_bytes(content)
    finding = next(finding for finding in check_data_files(tmp_path) if not finding.ok)
    assert f"its list of members ends at byte {second + 1024} of {len(content)}" in finding.message


def test_formats_without_a_phantom(tmp_path):
    for name, content in (("a.npy", np.arange(1000.0)), ("b.npz", None), ("c.csv", None), ("d.json", None)):
        path = tmp_path / name
        if name == "a.npy":
            np.save(path, content)
        elif name == "b.npz":
            np.savez(path, x=np.arange(1000.0))
        else:
            path.write_bytes(b"1,2\n" * 500)
        check_data_file(path, full=True)
        path.write_bytes(path.read_bytes()[:900] + (b"" if name[0] in "ab" else bytes(100)))
        with pytest.raises(DataError, match=r"damaged|truncated|zeros instead of text"):
            check_data_file(path)
    (tmp_path / "e.nii.gz").touch()
    with pytest.raises(DataError, match="is empty"):
        check_data_file(tmp_path / "e.nii.gz")
    (tmp_path / "movie.avi").write_bytes(b"what is not known here is left alone")
    check_data_file(tmp_path / "movie.avi", full=True)


def test_texts_of_an_hdf5_file_that_were_overwritten_are_told(tmp_path):
    """The library never came back from a heap with an entry of no length: zeros in 249 bytes hung a run for ever."""
    path = tmp_path / "labels.h5"
    with h5py.File(path, "w") as file:
        file["labels"] = np.array(
            [f"a name of some length {n}" for n in range(40)], dtype=h5py.string_dtype()
        )
        file["numbers"] = np.arange(2000.0)
    check_texts(path)
    content = bytearray(path.read_bytes())
    heap = content.index(b"GCOL\x01\0\0\0")
    content[heap + 400 : heap + 700] = bytes(300)
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"the texts that begin at byte {heap} are overwritten"):
        check_texts(path)
    assert any(
        "are overwritten" in finding.message for finding in check_data_files(tmp_path) if not finding.ok
    )
    path.write_bytes(b"")
    check_texts(path)
    check_texts(tmp_path / "absent.h5")
