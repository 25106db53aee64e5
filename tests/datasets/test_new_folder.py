"""`new` writes what a folder lacks, overwrites nothing, says what it cannot know, and `run` goes on from there."""

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

import braindecode_vis as bdv
from braindecode_vis.base.checks import DataError
from braindecode_vis.config import read_config
from braindecode_vis.datasets.array_folder import read_array_folder
from braindecode_vis.datasets.new_folder import start_folder

N = 12


def make_folder(root, *, pictures=N, shape=(N, 40)):
    root.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    np.save(root / "data.npy", rng.normal(size=shape).astype(np.float32))
    if pictures:
        (root / "images").mkdir()
        for number in range(pictures):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(
                root / "images" / f"p{number:02d}.png"
            )
    return root


def read_trials(root):
    return pd.read_csv(root / "trials.csv", dtype=str)


def test_one_picture_per_trial_goes_by_the_order_of_the_files(tmp_path):
    started = start_folder(make_folder(tmp_path / "mine"))
    assert started.complete
    assert [path.name for path in started.written] == ["trials.csv", "meta.yaml", "decode.yaml"]
    assert read_trials(tmp_path / "mine")["stimulus_id"].tolist() == [f"p{n:02d}" for n in range(N)]
    assert any("check this" in note for note in started.notes)
    assert yaml.safe_load((tmp_path / "mine" / "meta.yaml").read_text()) == {"title": "mine"}
    config = read_config(tmp_path / "mine" / "decode.yaml")
    assert (config.name, config.split.kind, config.encoder.kind) == ("mine", "kfold", "ridge")
    read_array_folder(tmp_path / "mine")


def test_what_is_there_is_kept(tmp_path):
    root = make_folder(tmp_path / "mine")
    pd.DataFrame({"stimulus_id": ["p00"] * N}).to_csv(root / "trials.csv", index=False)
    (root / "meta.yaml").write_text("title: Ours\n")
    before = {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()}
    assert [path.name for path in start_folder(root).written] == ["decode.yaml"]
    assert {name: (root / name).read_bytes() for name in before} == before
    assert start_folder(root).written == ()


def test_a_table_beside_the_data_names_pictures_and_classes(tmp_path):
    root = make_folder(tmp_path / "mine", pictures=4)
    shown = [f"p{n % 4:02d}.png" for n in range(N)]
    pd.DataFrame({"onset": range(N), "file": shown, "trial_type": ["face", "house"] * 6}).to_csv(
        root / "log.tsv", sep="\t", index=False
    )
    started = start_folder(root)
    assert started.complete
    assert read_trials(root)["stimulus_id"].tolist() == shown
    assert "concept" in read_trials(root)
    assert any("log.tsv" in note for note in started.notes)


def test_labels_become_classes(tmp_path):
    root = make_folder(tmp_path / "mine", pictures=0)
    np.save(root / "labels.npy", np.array(["face", "house"] * 6))
    assert start_folder(root).complete
    assert read_trials(root)["concept"].tolist()[:2] == ["face", "house"]
    assert read_config(root / "decode.yaml").encoder.kind == "lda"


def test_what_cannot_be_told_is_said(tmp_path):
    root = make_folder(tmp_path / "mine", pictures=4)
    started = start_folder(root)
    assert not started.complete
    assert any(
        "no file says which of the 4 pictures each of the 12 trials showed" in n for n in started.notes
    )
    assert read_trials(root)["stimulus_id"].isna().all()
    with pytest.raises(DataError, match="no stimulus_id in row 0"):
        read_array_folder(root)


def test_a_column_of_numbers_is_no_picture_by_chance(tmp_path):
    """Runs 1 to 4 of files 1.png to 13.png: the first column that fitted was taken for the pictures."""
    root = make_folder(tmp_path / "mine", pictures=0)
    (root / "images").mkdir()
    for n in range(1, 14):
        Image.fromarray(np.full((4, 4, 3), 19 * n, np.uint8)).save(root / "images" / f"{n}.png")
    codes = np.repeat([1, 2, 3, 4], 3)
    for columns, found in (
        ({"run": codes}, [None] * N),
        ({"run": codes, "picture": codes + 1}, (codes + 1).astype(str).tolist()),
    ):
        (root / "trials.csv").unlink(missing_ok=True)
        pd.DataFrame(columns).to_csv(root / "log.tsv", sep="\t", index=False)
        started = start_folder(root)
        assert started.complete == (found[0] is not None)
        if found[0] is not None:
            assert read_trials(root)["stimulus_id"].tolist() == found


def test_an_array_of_pictures_and_codes_need_a_line_more(tmp_path):
    root = make_folder(tmp_path / "mine", pictures=0)
    np.save(root / "images.npy", np.random.default_rng(0).integers(0, 256, (5, 8, 8), dtype=np.uint8))
    pd.DataFrame({"code of picture": np.tile([1, 2, 3, 4], 3)}).to_csv(root / "log.csv", index=False)
    started = start_folder(root)
    assert not started.complete
    assert any("write into meta.yaml from which number they count (first_id: 1)" in n for n in started.notes)
    meta = root / "meta.yaml"
    assert "# first_id: 1" in meta.read_text()
    meta.write_text(meta.read_text().replace("# first_id: 1", "first_id: 1"))
    assert start_folder(root).complete


def test_epochs_bring_their_own_table(tmp_path):
    mne = pytest.importorskip("mne")
    rng = np.random.default_rng(0)
    info = mne.create_info(["Oz", "O1", "O2"], 100.0, "eeg")
    events = np.stack([np.arange(N) * 100, np.zeros(N, int), np.tile([1, 2], N // 2)], axis=1)
    epochs = mne.EpochsArray(
        rng.normal(size=(N, 3, 50)) * 1e-6, info, events, -0.1, {"face": 1, "house": 2}, verbose="error"
    )
    (tmp_path / "mine").mkdir()
    epochs.save(tmp_path / "mine" / "sub-epo.fif", verbose="error")
    assert start_folder(tmp_path / "mine").complete
    assert read_trials(tmp_path / "mine")["concept"].tolist()[:2] == ["face", "house"]
    meta = yaml.safe_load((tmp_path / "mine" / "meta.yaml").read_text())
    assert (meta["modality"], meta["unit"], meta["sfreq"]) == ("eeg", "volt", 100)


def test_groups_choose_split_and_resampling(tmp_path):
    root = make_folder(tmp_path / "mine", pictures=0)
    table = pd.DataFrame({"concept": ["face", "house"] * 6, "group": np.repeat(["a", "b", "c", "d"], 3)})
    table.to_csv(root / "trials.csv", index=False)
    start_folder(root)
    config = read_config(root / "decode.yaml")
    assert config.split.kind == "leave_one_group_out"


def test_a_folder_without_trials_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no data\.npy"):
        start_folder(tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        start_folder(tmp_path / "nowhere")


def test_from_a_bare_folder_to_a_report(tmp_path, command_line):
    """`new`, then the very command that it prints."""
    root = make_folder(tmp_path / "mine", shape=(N, 60))

    done = command_line("new", root)
    assert done.returncode == 0, done.stderr
    command = done.stdout.replace("\n", " ").rsplit("next: braindecode-vis ", 1)[1].split()
    done = command_line(*command, "--out", tmp_path / "run", "--set", "evaluation.n_permutations=100")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "run" / "report.html").read_text()
    assert "mine" in page


def test_what_was_saved_from_python_lacks_the_configuration_alone(tmp_path):
    rng = np.random.default_rng(0)
    data = bdv.from_arrays(
        rng.normal(size=(N, 5)), labels=["old", "young"] * (N // 2), subject=np.arange(N) % 6
    )
    root = data.save(tmp_path / "saved")
    started = start_folder(root)
    assert started.complete
    assert [path.name for path in started.written] == ["decode.yaml"]
    config = read_config(root / "decode.yaml")
    # As `decode` would split these people, each of whom has one class.
    assert (config.split.kind, config.encoder.kind) == ("leave_one_subject_out", "lda")
    assert started.notes == ("responses: 12 x 5, trials first, with their table, as they were saved.",)
    assert start_folder(root).written == ()
