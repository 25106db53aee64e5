"""NOD: real events of both experiments with synthetic images beside them."""

import shutil

import pandas as pd
import pytest

from braindecode_vis.base.checks import DataError
from braindecode_vis.datasets.manifests import read_manifest
from braindecode_vis.datasets.nod import NodConfig
from tests.datasets.reading import read_in_parcels
from tests.parts.phantom.tiny import write_noise


def write_run(root, session, task, table):
    stem = root / f"sub-01/ses-{session}/func/sub-01_ses-{session}_task-{task}_run-01"
    stem.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(f"{stem}_events.tsv", sep="\t", index=False, na_rep="n/a")
    write_noise(stem.with_name(stem.name + "_bold.nii.gz"), 30)


def make_tables():
    base = pd.DataFrame({"onset": [0.0, 8.0, 16.0], "duration": 1.0})
    names = [f"imagenet/n0{n}131574/n0{n}131574_{n}.JPEG" for n in (1, 2, 3)]
    imagenet = base.assign(trial_type=[521.0, 277.0, 3.0], stim_file=names)
    coco = base.assign(trial_type=[29.0, 1000.0, 2000.0], condition=["coco/000000124419.jpg", None, None])
    return imagenet, coco


def prepare(root, **options):
    return NodConfig(root=root, mask="varying", **options).open_bold()


def test_both_experiments(tmp_path):
    for (session, task), table in zip(
        (("imagenet01", "imagenet"), ("coco", "coco")), make_tables(), strict=True
    ):
        write_run(tmp_path, session, task, table)
    source = prepare(tmp_path)
    trials = pd.concat([run.trials for run in source.runs]).set_index("stimulus_id")
    assert trials.loc["n01131574_1", ["concept", "split", "imagenet_class"]].tolist() == [
        "n01131574",
        "train",
        521,
    ]
    assert trials.loc["000000124419", ["concept", "split", "imagenet_class"]].tolist() == [
        "000000124419",
        "test",
        0,
    ]
    others = next(run for run in source.runs if run.trials["task"].iloc[0] == "coco").others
    assert others[["onset", "trial_type"]].to_numpy().tolist() == [[16.0, "fixation_change"]]
    assert len(prepare(tmp_path, tasks=("imagenet",)).runs) == 1


def test_bad_events_are_named(tmp_path):
    imagenet, coco = make_tables()
    write_run(tmp_path, "coco", "coco", coco.assign(trial_type=[29.0, 1000.0, 3000.0]))
    with pytest.raises(DataError, match="events of the type 3000 without a picture"):
        prepare(tmp_path, tasks=("coco",))
    write_run(tmp_path, "coco", "coco", coco.rename(columns={"condition": "stim_file"}))
    with pytest.raises(DataError, match=r"is missing the column\(s\) condition"):
        prepare(tmp_path, tasks=("coco",))
    imagenet.loc[1, "stim_file"] = None
    write_run(tmp_path, "imagenet01", "imagenet", imagenet)
    with pytest.raises(DataError, match="has no picture in row 3"):
        prepare(tmp_path, tasks=("imagenet",))


@pytest.mark.shared
def test_real_events(shared, tmp_path):
    root = tmp_path / "ds004496"
    shutil.copytree(shared / "data/bids_metadata/ds004496", root)
    for events in sorted(root.rglob("*run-*_events.tsv")):
        n = 241 if "task-coco" in events.name else 256
        write_noise(events.with_name(events.name.replace("_events.tsv", "_bold.nii.gz")), n)
    source = prepare(root)
    facts = read_manifest("nod").facts
    trials = pd.concat([run.trials for run in source.runs])
    imagenet, coco = (trials[trials["task"] == task] for task in ("imagenet", "coco"))
    assert len(imagenet) == imagenet["stimulus_id"].nunique() == facts["images_per_imagenet_session"]
    assert coco["stimulus_id"].nunique() == facts["n_coco_images"]
    assert set(coco["stimulus_id"].value_counts()) == {facts["coco_repetitions"]}
    assert sorted(coco["repetition"].unique()) == list(range(10))
    assert {run.t_r for run in source.runs} == {facts["t_r"]}
    assert imagenet.set_index("stimulus_id").loc["n03131574_8247", "imagenet_class"] == 521
    assert imagenet["imagenet_class"].between(1, 1000).all()
    assert all((run.others["trial_type"] == "fixation_change").all() for run in source.runs)
    assert sum(len(run.others) for run in source.runs) == 150


def test_whole_brain_in_parcels_around_the_onset(tmp_path):
    for (session, task), table in zip(
        (("imagenet01", "imagenet"), ("coco", "coco")), make_tables(), strict=True
    ):
        write_run(tmp_path, session, task, table)
    read_in_parcels(NodConfig, tmp_path, n_trials=4)
