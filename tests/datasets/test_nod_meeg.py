"""NOD-EEG and NOD-MEG: phantoms in the files of both sets, and what does not fit together in them."""

import shutil

import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.datasets.bids.meeg_files import open_epochs
from braindecode_vis.datasets.manifests import read_manifest
from braindecode_vis.datasets.nod import NodConfig
from braindecode_vis.datasets.nod_meeg import (
    FORMS,
    LAYOUT,
    NodEegConfig,
    NodMegConfig,
    pair_epochs,
    read_trials,
)
from tests.datasets.reading import check_and_prepare, refuse_changes
from tests.parts.phantom.tiny import make_tiny

KINDS = {"eeg": NodEegConfig, "meg": NodMegConfig}
N_CHANNELS = {"eeg": 62, "meg": 272}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    base = tmp_path_factory.mktemp("nod")
    return {name: make_tiny(f"nod-{name}", base / name, n_sessions=1, n_runs=2) for name in KINDS}


def place(root, modality, name="run", run="01"):
    labels = {"session": "ImageNet01", "run": run, "form": FORMS[modality]}
    return LAYOUT.place(root, name, subject="01", modality=modality, **labels)


@pytest.mark.parametrize("modality", KINDS)
def test_both_layouts_have_the_same_trials_and_nearly_the_same_signal(phantoms, modality, tmp_path):
    """The authors' epochs are low-passed at 40 Hz; the raw ones are only cut."""
    config = KINDS[modality](root=phantoms[modality])
    epochs, stimuli = check_and_prepare(config, tmp_path / "epochs")
    rate = {"eeg": 250, "meg": 200}[modality]
    assert (epochs.coords["modality"], epochs.data.shape[1:]) == (
        modality,
        (N_CHANNELS[modality], round(0.8 * rate)),
    )
    raw, _ = check_and_prepare(config.model_copy(update={"layout": "raw"}), tmp_path / "raw")
    keys = ["subject", "session", "run", "stimulus_id", "repetition", "split"]
    pd.testing.assert_frame_equal(raw.trials[keys], epochs.trials[keys])
    assert set(epochs.trials["run"]) == {"01", "02"}
    assert stimuli.root is not None
    smooth = [
        np.apply_along_axis(np.convolve, 2, each.data, np.ones(9) / 9, "same") for each in (epochs, raw)
    ]
    flat = [each.reshape(len(each), -1) for each in smooth]
    assert np.corrcoef(flat[0].ravel(), flat[1].ravel())[0, 1] > 0.95
    assert raw.unit == epochs.unit == {"eeg": "V", "meg": "T"}[modality]


def test_pictures_have_the_ids_of_nod_and_a_folder_of_nod_serves(phantoms, tmp_path):
    nod = make_tiny("nod", tmp_path / "nod")
    fmri = NodConfig(root=nod, mask="varying", tasks=("imagenet",)).open_bold()
    seen = {name: KINDS[name](root=phantoms[name]).open_epochs() for name in KINDS}
    ids = set(pd.concat([run.trials for run in fmri.runs])["stimulus_id"])
    for source in seen.values():
        shown = source.parts[0].trials.set_index("stimulus_id")
        assert ids < set(shown.index)
        assert {name.partition("_")[0] for name in ids} <= set(shown["concept"])
    root = shutil.copytree(phantoms["eeg"], tmp_path / "eeg")
    for path in (root / "stimuli/ImageNet").iterdir():  # as in the folder of `nod`
        folder = root / "elsewhere/imagenet" / path.name.partition("_")[0]
        folder.mkdir(parents=True, exist_ok=True)
        path.rename(folder / path.name)
    found = NodEegConfig(root=root, images=root / "elsewhere").open_epochs().stimuli
    assert (found.table["sha256"] == seen["eeg"].stimuli.table["sha256"]).all()


def test_the_picture_is_that_of_the_table_of_trials(phantoms, tmp_path):
    root = shutil.copytree(phantoms["eeg"], tmp_path / "eeg")
    path = LAYOUT.place(root, "trials", subject="01")
    table = pd.read_csv(path)
    second = (table["run"] == 2).to_numpy()
    table.loc[second, "image_id"] = table.loc[second, "image_id"].to_numpy()[::-1]
    table.to_csv(path, index=False)
    part = NodEegConfig(root=root, layout="raw").open_epochs().parts[1]
    assert part.trials["stimulus_id"].tolist() == table.loc[second, "image_id"].tolist()


def test_epochs_that_were_left_out_keep_the_pictures_of_the_others(phantoms):
    epochs = open_epochs(place(phantoms["eeg"], "eeg", "epochs"), "here")
    table = read_trials(LAYOUT.place(phantoms["eeg"], "trials", subject="01"))
    kept = np.arange(len(table)) != 3
    rows = pair_epochs(table, epochs.metadata[kept], kept.sum(), "here")
    assert rows["stimulus_id"].tolist() == table["stimulus_id"][kept].tolist()
    assert pair_epochs(table, None, len(table), "here") is table


def test_what_does_not_fit_is_named(phantoms, tmp_path):
    root = shutil.copytree(phantoms["eeg"], tmp_path / "eeg")
    path, epochs = LAYOUT.place(root, "trials", subject="01"), place(root, "eeg", "epochs")
    events = place(root, "eeg").with_name("sub-01_ses-ImageNet01_task-ImageNet_run-01_events.tsv")
    table = pd.read_csv(path)
    plain, raw = (NodEegConfig(root=root, layout=layout) for layout in ("auto", "raw"))
    with pytest.raises(DataError, match="epochs without metadata"):
        pair_epochs(read_trials(path), None, 5, "here")
    with pytest.raises(ConfigError, match=r"dataset\.tmin applies to raw"):
        NodEegConfig(root=root, tmin=-0.2).open_epochs()
    with pytest.raises(ConfigError, match="published epochs are not resampled"):
        NodEegConfig(root=root, sfreq=100).open_epochs()
    with pytest.raises(DataError, match="subject 07 is not there"):
        NodEegConfig(root=root, subjects=(7,)).open_epochs()
    with pytest.raises(DataError, match="session ImageNet02 is not there"):
        NodEegConfig(root=root, layout="raw", sessions=("ImageNet02",)).open_epochs()

    def write(changed):
        changed.to_csv(path, index=False)

    refuse_changes(
        raw,
        (
            DataError,
            "shows 11 pictures .* but derivatives/detailed_events lists 10",
            lambda: write(table[1:]),
        ),
        (
            DataError,
            "names no picture in row 4",
            lambda: write(table.assign(image_id=table["image_id"].where(table.index != 2))),
        ),
        (DataError, r"is missing the column\(s\) image_id", lambda: write(table.drop(columns="image_id"))),
        (DataError, "it alone names the picture of a trial", path.unlink),
    )
    refuse_changes(
        plain,
        (DataError, "are not in derivatives/detailed_events", lambda: write(table.assign(image_id="n1_1"))),
    )
    write(table)
    refuse_changes(
        raw,
        (
            DataError,
            "fetch both again",
            lambda: events.write_text(events.read_text().replace("stim_on", "resp")),
        ),
    )
    refuse_changes(
        plain, (DataError, "cut short|cannot be", lambda: epochs.write_bytes(epochs.read_bytes()[:90_000]))
    )
    epochs.unlink()
    shutil.rmtree(root / "sub-01")
    refuse_changes(
        plain, (DataError, "expected derivatives/preprocessed/epochs/sub-01_eeg_epo.fif or", lambda: None)
    )


def test_published_files_have_sizes_and_digests():
    """Epochs of 4000 trials have 226 samples (250 Hz): 226 x 62 or 273 values of four bytes, and tables beside them."""
    for kind, n_channels, n_runs in (("eeg", 62, 448), ("meg", 273, 266)):
        manifest = read_manifest(f"nod_{kind}")
        files = {file.path: file for part in manifest.parts for file in part.files}
        assert all(file.checksum and file.bytes for file in files.values())
        assert sum(path.endswith(f"_{kind}.{FORMS[kind]}") for path in files) == n_runs
        size = files[f"derivatives/preprocessed/epochs/sub-01_{kind}_epo.fif"].bytes
        assert 0 < size - 4 * 4000 * 226 * n_channels < 2_000_000
        people = {file.subject for file in files.values()} - {""}
        assert len(people) == manifest.subjects
