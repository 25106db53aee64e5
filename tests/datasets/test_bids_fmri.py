"""The generic BIDS recipe: file names of several releases, and real event tables with synthetic images beside them."""

import json
import shutil

import mne_bids
import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.datasets.bids.fmri_dataset import BidsFmriConfig
from braindecode_vis.datasets.bids.fmri_files import find_runs
from braindecode_vis.parts.phantom.formats.file_writers import write_volume
from tests.parts.phantom.tiny import write_noise

SHAPE = (3, 3, 2)


def write_events(path, n=4, names=None, **columns):
    names = [f"{k}/{k}_01.jpg" for k in ("ant", "bee", "cat", "dog")][:n] if names is None else names
    table = pd.DataFrame({"onset": 4.0 + 10 * np.arange(n), "duration": 1.0, "stim_file": names, **columns})
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, sep="\t", index=False, na_rep="n/a")
    return path


def write_run(root, stem, *, derivative=None, **options):
    """One run; `derivative` ends the name of a preprocessed image in place of the raw one."""
    folder = root.joinpath(*[part for part in stem.split("_") if part.startswith(("sub-", "ses-"))], "func")
    write_events(folder / f"{stem}_events.tsv", **options)
    if derivative is None:
        return write_noise(folder / f"{stem}_bold.nii.gz", 40, SHAPE)
    derived = root / "derivatives" / "fmriprep" / folder.relative_to(root)
    return write_noise(derived / f"{stem}{derivative}", 40, SHAPE)


def make_config(root, **options):
    return BidsFmriConfig(
        root=root, **({"mask": "varying", "zscore": "none", "concept_pattern": r"^(\w+)/"} | options)
    )


def prepare(root, **options):
    return make_config(root, **options).open_bold()


def test_raw_runs_in_their_natural_order(tmp_path):
    for run in (2, 10, 1):
        write_run(tmp_path, f"sub-01_ses-a_task-see_run-{run}")
    (tmp_path / "task-see_bold.json").write_text(json.dumps({"RepetitionTime": 2.0, "TaskName": "see"}))
    source = prepare(tmp_path)
    assert [run.trials["run"].iloc[0] for run in source.runs] == ["1", "2", "10"]
    assert source.runs[0].trials["session"].unique().tolist() == ["a"]
    assert source.runs[2].trials["repetition"].tolist() == [2] * 4
    assert source.stimuli.table[["stimulus_id", "concept"]].to_numpy().tolist()[0] == ["ant_01", "ant"]
    assert source.runs[0].t_r == 2.0


def test_runs_of_two_phase_encodings_are_listed(tmp_path):
    """Why mne-bids does not list them, as the header of `fmri_files` says; if it finds all, it may be tried again."""
    for direction in ("AP", "PA"):
        write_run(tmp_path, f"sub-01_task-see_dir-{direction}_run-1")
    runs = find_runs(tmp_path, derivatives=None, space=None, entities={})
    assert [run.entities["dir"] for run in runs] == ["AP", "PA"]
    assert not mne_bids.find_matching_paths(tmp_path, suffixes="bold", extensions=".nii.gz")


@pytest.mark.parametrize(
    "image, confounds, mask",
    [
        (
            "_space-T1w_desc-preproc_bold.nii.gz",
            "_desc-confounds_timeseries.tsv",
            "_space-T1w_desc-brain_mask.nii.gz",
        ),
        (
            "_space-T1w_desc-preproc_bold.nii.gz",
            "_desc-confounds_regressors.tsv",
            "_space-T1w_desc-brain_mask.nii.gz",
        ),
        ("_bold_space-T1w_preproc.nii.gz", "_bold_confounds.tsv", "_bold_space-T1w_brainmask.nii.gz"),
    ],
)
def test_fmriprep_of_every_age(tmp_path, image, confounds, mask):
    path = write_run(tmp_path, "sub-01_task-see_run-01", derivative=image)
    stem = path.parent / "sub-01_task-see_run-01"
    motion = pd.DataFrame({"X": np.arange(40.0), "FramewiseDisplacement": [np.nan, *np.arange(39.0)]})
    motion.to_csv(f"{stem}{confounds}", sep="\t", index=False, na_rep="n/a")
    inside = np.ones(SHAPE, np.uint8)
    inside[0] = 0
    write_volume(stem.with_name(stem.name + mask), inside, np.eye(4))
    config = {"mask": "auto", "confounds": {"columns": ("X", "FramewiseDisplacement")}}
    source = prepare(tmp_path, **config)
    assert source.geometry["01"].n_voxels == 12
    assert source.runs[0].confounds[:3].tolist() == [[0, 0], [1, 0], [2, 1]]
    with pytest.raises(DataError, match=r"no column 'x' .*did you mean|no column 'x'"):
        prepare(tmp_path, **(config | {"confounds": {"columns": ("x",)}}))
    assert prepare(tmp_path, raw=False, derivatives=tmp_path / "derivatives" / "fmriprep", **config).runs


@pytest.mark.parametrize(
    "strategy, option, few, many",
    [
        ("motion", "motion", ("basic", 6), ("full", 24)),
        ("wm_csf", "wm_csf", ("basic", 2), ("derivatives", 4)),
        ("global_signal", "global_signal", ("basic", 1), ("power2", 2)),
        ("compcor", "n_compcor", (2, 2 + 1), (None, 3 + 1)),  # and the cosine of the filter
    ],
)
def test_families_of_confounds_are_expanded_as_asked(tmp_path, strategy, option, few, many):
    path = write_run(tmp_path, "sub-01_task-see_run-01", derivative="_space-T1w_desc-preproc_bold.nii.gz")
    movements = [f"{kind}_{axis}" for kind in ("trans", "rot") for axis in "xyz"]
    names = [
        name + end
        for name in (*movements, "csf", "white_matter", "global_signal")
        for end in ("", "_derivative1", "_power2", "_derivative1_power2")
    ]
    components = [f"a_comp_cor_{number:02d}" for number in range(3)]
    names += ["cosine00", *components]
    table = pd.DataFrame(np.random.default_rng(0).normal(size=(40, len(names))), columns=names)
    stem = path.with_name("sub-01_task-see_run-01_desc-confounds_timeseries")
    table.to_csv(stem.with_suffix(".tsv"), sep="\t", index=False)
    about = {"Method": "aCompCor", "Mask": "combined", "Retained": True}
    stem.with_suffix(".json").write_text(json.dumps(dict.fromkeys(components, about)))
    families = (strategy, "high_pass") if strategy == "compcor" else (strategy,)
    for value, n in (few, many):
        confounds = {"strategy": families, option: value}
        assert prepare(tmp_path, confounds=confounds).runs[0].confounds.shape == (40, n)
    changed = few[0] if option == "n_compcor" else many[0]
    with pytest.raises(ValidationError, match=f"{option} is .*strategy does not name {strategy}; leave"):
        make_config(tmp_path, confounds={"strategy": ("high_pass",), option: changed})


def test_spaces_must_be_chosen_from(tmp_path):
    for space in ("T1w", "MNI152NLin2009cAsym"):
        write_run(tmp_path, "sub-01_task-see_run-01", derivative=f"_space-{space}_desc-preproc_bold.nii.gz")
    with pytest.raises(ConfigError, match="in the spaces MNI152NLin2009cAsym, T1w; choose one"):
        prepare(tmp_path)
    assert "space-T1w" in prepare(tmp_path, space="T1w").runs[0].image.name
    with pytest.raises(ConfigError, match="none in the space T2w"):
        prepare(tmp_path, space="T2w")
    write_run(tmp_path, "sub-01_task-see_run-01", derivative="_space-T1w_res-2_desc-preproc_bold.nii.gz")
    with pytest.raises(DataError, match="are the same run"):
        prepare(tmp_path, space="T1w")


def test_events_may_be_inherited(tmp_path):
    """One table for all runs is in the upper folder; a run's own wins."""
    for run in ("01", "02"):
        write_run(tmp_path, f"sub-01_task-see_run-{run}")
    (tmp_path / "sub-01/func/sub-01_task-see_run-01_events.tsv").unlink()
    write_events(tmp_path / "task-see_events.tsv", n=2)
    assert [len(run.trials) for run in prepare(tmp_path).runs] == [2, 4]


def test_subjects_by_label_or_number(tmp_path):
    for label in ("01", "02"):
        write_run(tmp_path, f"sub-{label}_task-see_run-01")
    assert {run.subject for run in prepare(tmp_path, subjects=["02"]).runs} == {"02"}
    assert {run.subject for run in prepare(tmp_path, subjects=[1]).runs} == {"01"}
    with pytest.raises(DataError, match="no image with sub-03"):
        prepare(tmp_path, subjects=["03"])


def test_missing_images_and_events_are_named(tmp_path):
    write_run(tmp_path, "sub-01_ses-1_task-see_run-01")
    lost = write_run(tmp_path, "sub-01_ses-2_task-see_run-01")
    lost.unlink()
    with pytest.raises(DataError, match=r"sub-01_ses-2_task-see_run-01_events.tsv lists .* image is missing"):
        prepare(tmp_path)
    assert len(prepare(tmp_path, skip=["ses-2_task-see_run-01"]).runs) == 1
    assert len(prepare(tmp_path, sessions=["1"]).runs) == 1
    with pytest.raises(DataError, match=r"no run of .* has this in its name"):
        prepare(tmp_path, skip=["run-99"])
    next(tmp_path.rglob("*ses-1*_events.tsv")).unlink()
    with pytest.raises(DataError, match=r"session 1, run 01, .* has no events table"):
        prepare(tmp_path, sessions=["1"])
    with pytest.raises(DataError, match="is a level too low: sub-01 is in"):
        prepare(tmp_path / "sub-01")
    (tmp_path.parent / "none").mkdir(exist_ok=True)
    with pytest.raises(DataError, match="holds no raw"):
        prepare(tmp_path.parent / "none")


def test_which_trials_test(tmp_path):
    kinds = {"trial_type": ["exp", "exp", "test", "catch"]}
    for session in ("train1", "test1"):
        write_run(tmp_path, f"sub-01_ses-{session}_task-see_run-01", **kinds)
    source = prepare(tmp_path, trial_types=["exp"], test_types=["test"])
    assert source.runs[0].trials["split"].tolist() == ["train", "train", "test"]
    assert source.runs[0].others["trial_type"].tolist() == ["catch"]
    with pytest.raises(DataError, match="3 stimuli are both trained on and tested"):
        prepare(tmp_path, trial_types=["exp", "test"], test_sessions="test.*")
    listed = tmp_path / "list.txt"
    listed.write_text("bee_01.jpg\n\nnowhere.jpg\n")
    source = prepare(tmp_path, test_list=listed)
    assert source.runs[1].trials["split"].tolist() == ["train", "test", "train", "train"]
    assert "test_list" in make_config(tmp_path, test_list=listed).hash_inputs()
    listed.write_text("other.jpg\n")
    with pytest.raises(DataError, match="none of the 1 pictures"):
        prepare(tmp_path, test_list=listed)
    assert set(prepare(tmp_path, min_test_repetitions=3).runs[0].trials["split"]) == {"train"}
    assert set(prepare(tmp_path, min_test_repetitions=2).runs[0].trials["split"]) == {"test"}
    with pytest.raises(ValidationError, match="give one of"):
        make_config(tmp_path, min_test_repetitions=2, test_types=("test",))


def test_recipes_that_do_not_fit_are_named(tmp_path):
    path = write_run(tmp_path, "sub-01_task-see_run-01")
    with pytest.raises(ConfigError, match=r"no column 'stim_fil' \(did you mean 'stim_file'"):
        prepare(tmp_path, stimulus_column="stim_fil")
    with pytest.raises(ConfigError, match=r"finds no concept in 'ant/ant_01.jpg'"):
        prepare(tmp_path, concept_pattern=r"^(\d+)")
    with pytest.raises(DataError, match="is missing the column"):
        prepare(tmp_path, trial_types=["exp"])
    with pytest.raises(ValidationError, match="not a regular expression"):
        make_config(tmp_path, concept_pattern="(")
    with pytest.raises(ValidationError, match="needs a group"):
        make_config(tmp_path, concept_pattern="a")
    events = path.with_name("sub-01_task-see_run-01_events.tsv")
    write_events(events, names=["a.jpg", "b/a.jpg", "c.jpg", "d.jpg"])
    with pytest.raises(DataError, match=r"'a' is listed as 'a' at 'a.jpg' and as 'a' at 'b/a.jpg'"):
        prepare(tmp_path, concept_pattern=None)
    write_events(events, names=[None] * 4)
    with pytest.raises(DataError, match="none is a trial"):
        prepare(tmp_path)
    events.write_text(events.read_text().replace("14.0", "n/a"))
    with pytest.raises(DataError, match="has '' in the column onset, line 3"):
        prepare(tmp_path)


def test_onsets_in_milliseconds_are_noticed(tmp_path):
    path = write_run(tmp_path, "sub-01_task-see_run-01")
    events = path.with_name("sub-01_task-see_run-01_events.tsv")
    table = pd.read_csv(events, sep="\t")
    table.assign(onset=table["onset"] * 1000).to_csv(events, sep="\t", index=False)
    with pytest.raises(DataError, match="4 of 4 trials start after the end of the run at 80 s"):
        prepare(tmp_path)


def test_timing_and_grids_must_agree(tmp_path):
    write_run(tmp_path, "sub-01_task-see_run-01")
    sidecar = tmp_path / "task-see_bold.json"
    sidecar.write_text(json.dumps({"RepetitionTime": 1.5}))
    with pytest.raises(DataError, match=r"1.5 s in its sidecar, but 2 s in its header"):
        prepare(tmp_path)
    assert prepare(tmp_path, t_r=1.5).runs[0].frame_times[:2].tolist() == [0, 1.5]
    for damaged in ({"RepetitionTime": {"s": 2}}, {"RepetitionTime": 2.0, "StartTime": "early"}):
        sidecar.write_text(json.dumps(damaged))
        with pytest.raises(DataError, match="which is not a time in s"):
            prepare(tmp_path)
    for damaged in ("{", '{"a":{' * 3000):  # the second is nested without end
        sidecar.write_text(damaged)
        with pytest.raises(DataError, match="is not valid JSON"):
            prepare(tmp_path)
    sidecar.unlink()
    write_run(tmp_path, "sub-01_task-see_run-02")
    moved = np.eye(4)
    moved[2, 3] = 3
    write_noise(tmp_path / "sub-01/func/sub-01_task-see_run-02_bold.nii.gz", 40, SHAPE, affine=moved)
    with pytest.raises(DataError, match=r"is up to 3.00 mm away"):
        prepare(tmp_path)
    write_noise(tmp_path / "sub-01/func/sub-01_task-see_run-02_bold.nii.gz", 40, (3, 3, 3))
    with pytest.raises(DataError, match="different spaces"):
        prepare(tmp_path)


def test_images_are_looked_up_or_left_out(tmp_path):
    from PIL import Image

    write_run(tmp_path, "sub-01_task-see_run-01")
    assert prepare(tmp_path).stimuli.root is None
    for name in ("ant", "bee", "cat"):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.new("RGB", (2, 2)).save(tmp_path / "pictures" / f"{name}_01.jpg")
    with pytest.raises(DataError, match=r"1 of 4 images are not below .* first dog/dog_01.jpg"):
        prepare(tmp_path, images=tmp_path / "pictures")
    (tmp_path / "pictures" / "deep").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "pictures" / "deep" / "dog_01.JPG", format="JPEG")
    stimuli = prepare(tmp_path, images=tmp_path / "pictures").stimuli
    assert stimuli.read_image("dog_01").shape == (2, 2, 3)


def test_inputs_are_hashed_by_content(tmp_path):
    write_run(tmp_path, "sub-01_task-see_run-01")
    config = make_config(tmp_path)
    before = config.hash_inputs()
    assert set(before) == {"sub-01_task-see_run-01_bold.nii.gz", "sub-01_task-see_run-01_events.tsv"}
    write_noise(tmp_path / "sub-01/func/sub-01_task-see_run-01_bold.nii.gz", 40, SHAPE, seed=1)
    assert config.hash_inputs() != before
    assert "root" not in config.hashed_fields()
    mask = write_volume(tmp_path / "mask.nii.gz", np.ones(SHAPE, np.uint8), np.eye(4))
    assert make_config(tmp_path, mask=mask).hashed_fields()["mask"] == "file"
    assert "mask" in make_config(tmp_path, mask=mask).hash_inputs()


def copy_real(shared, name, tmp_path, n_volumes, t_r, pattern="*"):
    """Real event tables and sidecars; the images beside them are synthetic."""
    root = tmp_path / name
    shutil.copytree(shared / "data/bids_metadata" / name, root)
    for events in sorted(root.rglob(f"{pattern}_events.tsv")):
        image = events.with_name(events.name.replace("_events.tsv", "_bold.nii.gz"))
        write_noise(image, n_volumes, t_r=t_r)
    return root


@pytest.mark.shared
def test_real_god_events(shared, tmp_path):
    root = copy_real(shared, "ds001246", tmp_path, 178, 3.0, "*task-perception*")
    recipe = {
        "task": "perception", "stimulus_column": "stimulus_name", "trial_type_column": "event_type",
        "trial_types": ("stimulus",), "test_sessions": "perceptionTest.*", "concept_pattern": r"(n\d+)_",
    }  # fmt: skip
    source = prepare(root, **recipe)
    trials = pd.concat([run.trials for run in source.runs])
    assert len(source.runs) == 20
    assert trials["split"].value_counts().to_dict() == {"train": 550, "test": 550}
    assert trials[trials["split"] == "test"]["stimulus_id"].nunique() == 50
    assert source.runs[0].t_r == 3.0
    assert not len(source.runs[0].others)  # rest is not modelled
    assert trials["concept"].str.fullmatch(r"n\d{8}").all()


@pytest.mark.shared
def test_real_things_events(shared, tmp_path):
    root = copy_real(shared, "ds004192", tmp_path, 284, 1.5, "*ses-things01_task-things*")
    for path in root.rglob("*ses-things02*_events.tsv"):
        path.unlink()
    recipe = {
        "task": "things", "stimulus_column": "file_path", "trial_types": ("exp",), "test_types": ("test",),
        "concept_pattern": r"/([^/]+)_\d+[a-z]*\.jpg",
    }  # fmt: skip
    source = prepare(root, **recipe)
    trials = pd.concat([run.trials for run in source.runs])
    assert trials["split"].value_counts().to_dict() == {"train": 720, "test": 100}
    assert trials.set_index("stimulus_id")["concept"].loc["dog_12s"] == "dog"
    assert {kind for run in source.runs for kind in run.others["trial_type"]} == {"catch"}
    findings = make_config(root, **recipe).check()
    assert len(findings) == 11
    assert findings[1].message == "284 volumes of 1.5 s; trials: 10 test, 72 train"


def test_find_runs_ignores_what_is_no_run(tmp_path):
    path = write_run(tmp_path, "sub-01_task-see_run-01")
    for end in ("sbref", "boldref", "desc-preproc_bold"):
        shutil.copy(path, path.with_name(f"sub-01_task-see_run-01_{end}.nii.gz"))
    runs = find_runs(tmp_path, derivatives=None, space=None, entities={})
    assert [run.image.name for run in runs] == ["sub-01_task-see_run-01_bold.nii.gz"]
