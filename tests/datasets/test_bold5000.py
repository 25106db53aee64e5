"""BOLD5000: real events with synthetic images beside them."""

import shutil

import pandas as pd
import pytest

from braindecode_vis.base.checks import DataError
from braindecode_vis.datasets.bold5000 import Bold5000Config, find_concept
from braindecode_vis.datasets.manifests import read_manifest
from tests.datasets.reading import read_in_parcels
from tests.parts.phantom.tiny import write_noise


def write_session(root, session="01", types=("imagenet", "rep_coco", "scenes"), names=None):
    names = names or ["n01641577_1229.JPEG", "COCO_train2014_000000113449.jpg", "concert5.jpg"]
    stem = root / f"sub-CSI1/ses-{session}/func/sub-CSI1_ses-{session}_task-5000scenes_run-01"
    stem.parent.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(
        {"onset": [6.0, 16.0, 26.0], "duration": 1.0, "ImgName": names, "ImgType": types, "stim_file": names}
    )
    table.to_csv(f"{stem}_events.tsv", sep="\t", index=False)
    write_noise(stem.with_name(stem.name + "_bold.nii.gz"), 30)
    return stem.with_name(stem.name + "_events.tsv")


def prepare(root, **options):
    return Bold5000Config(root=root, mask="varying", **options).open_bold()


def test_kinds_become_splits_and_concepts(tmp_path):
    write_session(tmp_path)
    trials = prepare(tmp_path).runs[0].trials
    assert trials["split"].tolist() == ["train", "test", "train"]
    assert trials["concept"].tolist() == ["n01641577", "COCO_train2014_000000113449", "concert"]
    assert trials["image_type"].tolist() == ["imagenet", "coco", "scenes"]
    assert find_concept("123", "scenes") == "123"


def test_a_test_picture_is_one_in_every_session(tmp_path):
    """Seen without rep_ in front once, it must still not be trained on."""
    write_session(tmp_path, "01")
    write_session(tmp_path, "02", types=("rep_imagenet", "coco", "scenes"))
    source = prepare(tmp_path)
    assert [run.trials["split"].tolist() for run in source.runs] == [["test", "test", "train"]] * 2
    assert source.runs[1].trials["repetition"].tolist() == [1, 1, 1]


def test_the_list_of_repeated_pictures_must_agree(tmp_path):
    write_session(tmp_path)
    listed = tmp_path / "stimuli" / "repeated_stimuli_113_list.txt"
    listed.parent.mkdir()
    listed.write_text("COCO_train2014_000000113449.jpg\nconcert5.jpg\n")
    assert prepare(tmp_path).runs[0].trials["split"].tolist() == ["train", "test", "test"]
    assert listed.name in Bold5000Config(root=tmp_path, mask="varying").hash_inputs()
    listed.write_text("concert5.jpg\n")
    with pytest.raises(DataError, match=r"1 pictures of the kind rep_\* are not in"):
        prepare(tmp_path)


def test_bad_events_are_named(tmp_path):
    path = write_session(tmp_path, types=("imagenet", "video", "scenes"))
    with pytest.raises(DataError, match="pictures of the kind 'video'"):
        prepare(tmp_path)
    write_session(tmp_path)
    path.write_text(path.read_text().replace("concert5.jpg", "concert6.jpg", 1))
    with pytest.raises(DataError, match=r"names 'concert6.jpg' and 'concert5.jpg' in row 4"):
        prepare(tmp_path)


@pytest.mark.shared
@pytest.mark.parametrize("derivative", [False, True])
def test_real_events(shared, tmp_path, derivative):
    """The first session of CSI1, raw and under the old names of fMRIPrep."""
    root = tmp_path / "ds001499"
    shutil.copytree(shared / "data/bids_metadata/ds001499", root)
    for events in sorted(root.rglob("*run-*_events.tsv")):
        name = events.name.replace("_events.tsv", "_bold.nii.gz")
        if derivative:
            folder = root / "derivatives/fmriprep" / events.parent.relative_to(root)
            write_noise(folder / name.replace("_bold", "_bold_space-T1w_preproc"), 194)
        else:
            write_noise(events.with_name(name), 194)
    source = prepare(root)
    trials = pd.concat([run.trials for run in source.runs])
    facts = read_manifest("bold5000").facts
    assert [len(run.trials) for run in source.runs] == [facts["trials_per_run"]] * 10
    assert {run.t_r for run in source.runs} == {facts["t_r"]}
    expected = facts["session1_types"]
    for kind in ("imagenet", "coco", "scenes"):
        assert (trials["image_type"] == kind).sum() == expected[kind] + expected[f"rep_{kind}"]
    # Of the twenty repeated pictures, two are shown a second time here, without the mark: test trials all the same.
    tested = trials[trials["split"] == "test"]
    assert (
        tested["stimulus_id"].nunique()
        == sum(n for kind, n in expected.items() if kind.startswith("rep_"))
        == 20
    )
    assert len(tested) == 22
    # It said 113, whatever lay in the folder.
    assert source.notes["protocol"] == "test: the 20 repeated pictures"
    assert set(tested["stimulus_id"][tested["repetition"] == 1]) == {
        "COCO_train2014_000000488558",
        "n02808304_3656",
    }
    assert set(trials["stimulus_id"].value_counts()) == {1, 2}
    assert trials["subject"].unique().tolist() == ["CSI1"]
    findings = Bold5000Config(root=root, mask="varying").check()
    assert [finding.message for finding in findings if not finding.ok] == [
        "1 of 15 declared sessions are read, without 02, 03, 04, 05, 06, 07, 08, 09, 10, 11, 12, 13, 14, 15"
    ]
    assert len(findings) == 12
    findings = Bold5000Config(root=root, mask="varying", sessions=("01",)).check()
    assert all(finding.ok for finding in findings)  # the ten runs of that session are there


def test_whole_brain_in_parcels_around_the_onset(tmp_path):
    write_session(tmp_path)
    read_in_parcels(Bold5000Config, tmp_path, n_trials=3)
