"""LAION-fMRI: the phantom in the published files, their traps, and what is refused."""

import json
import re
import shutil

import h5py
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.config import read_config
from braindecode_vis.datasets import hosts, transfer
from braindecode_vis.datasets.fetching import make_plan
from braindecode_vis.datasets.laion_fmri import LAYOUT, OWNERS, LaionFmriConfig, find_regions, read_split
from braindecode_vis.datasets.manifests import read_manifest
from braindecode_vis.embeddings.caption_bank import read_caption_bank
from braindecode_vis.embeddings.imported import ImportedConfig
from braindecode_vis.parts.audit.run import audit_run
from braindecode_vis.pipeline.reporting import run_all
from braindecode_vis.pipeline.runs import open_run, read_scores
from tests.datasets.loopback import serve
from tests.datasets.reading import refusals
from tests.datasets.test_hosts import write_bucket
from tests.parts.phantom.tiny import make_tiny
from tests.references import assert_close


@pytest.fixture(scope="module")
def shared_root(tmp_path_factory):
    """A phantom of two people that no test changes."""
    return make_tiny("laion-fmri", tmp_path_factory.mktemp("laion") / "data", snr=1.0, n_subjects=2)


@pytest.fixture
def root(shared_root, tmp_path):
    return shutil.copytree(shared_root, tmp_path / "data")


def open_one(root, **settings):
    return LaionFmriConfig(root=root, **{"subjects": ("01",), **settings}).open_betas()


def read_all(source):
    return np.concatenate([part.read(0, len(part.trials)) for part in source.parts])


def test_trials_of_the_split_are_read_through_the_mask(shared_root):
    source = open_one(shared_root)
    mask = nib.load(LAYOUT.find(shared_root, "mask", subject="01")).get_fdata() > 0
    geometry = source.find_geometry("01")
    assert geometry.n_voxels == mask.sum() - 2  # two are NaN in the last session
    sides = read_split(LAYOUT.find(shared_root, "split", pool="sub-01", split="tau"))
    for part, session in zip(source.parts, ("01", "02"), strict=True):
        labels = LAYOUT.read_table(
            LAYOUT.find(shared_root, "trials", subject="01", session=session), "trials"
        )["label"]
        kept = labels.isin(sides).to_numpy()
        assert part.trials["stimulus_id"].tolist() == labels[kept].tolist()
        assert part.trials["split"].tolist() == labels[kept].map(sides).tolist()
        whole = nib.load(LAYOUT.find(shared_root, "betas", subject="01", session=session)).get_fdata()
        assert_close(part.read(0, len(part.trials)), whole[geometry.mask].T[kept])
    assert set(geometry.maps) == {"noise_ceiling_4rep", "noise_ceiling_12rep", "noise_ceiling_Allrep"}
    assert (geometry.maps["noise_ceiling_12rep"] >= geometry.maps["noise_ceiling_4rep"]).all()
    assert [len(voxels) for voxels in source.notes["nan_voxels"].values()] == [2]
    assert "240 of the pictures" in source.notes["warnings"][0]
    assert "copies of training pictures" in open_one(shared_root, split="random_0").notes["warnings"][-1]
    assert re.search(
        r"2 voxels of subject 01, session 02 are NaN .*: \(\d+, \d+, \d+\)", source.notes["warnings"][1]
    )


def test_a_moved_data_set_is_the_same_one(root):
    before = LaionFmriConfig(root=root).hash_inputs()
    assert LaionFmriConfig(root=root.rename(root.with_name("moved"))).hash_inputs() == before


def test_regions_of_both_releases_are_read(root):
    later = find_regions(root, "01")
    chosen = open_one(root, mask="V1v,FFA-1")
    mine = open_one(root, mask_file=later["V1v"])
    assert mine.find_geometry("01").n_voxels == chosen.find_geometry("01").rois["V1v"].labels.sum()
    first = LAYOUT.place(root, "early_region", subject="01", roi="x").parent
    first.mkdir(parents=True)
    for name, path in later.items():
        path.rename(first / f"{name}.nii.gz")
    assert set(find_regions(root, "01")) == set(later)
    again = open_one(root, mask="V1v,FFA1")
    assert {"V1v", "FFA1"} <= set(again.find_geometry("01").rois)
    np.testing.assert_array_equal(read_all(again), read_all(chosen))


def test_several_people_share_a_split_only_of_shared_pictures(shared_root):
    both = open_one(shared_root, subjects=("1", "sub-03"), pool="shared", pad_subjects=True)
    assert both.subjects == ("01", "03")
    assert set(both.stimuli.table["stimulus_id"].str.partition("_")[0]) == {"shared"}
    own = open_one(shared_root, subjects=None, pad_subjects=True)
    assert own.stimuli.table["stimulus_id"].str.startswith("unique_").any()


def test_pictures_are_as_on_the_screen(root):
    """A PNG with transparent places was shown on grey; the rows follow the list, not the trials."""
    source = open_one(root, split="ood", image_size=32)
    table = source.stimuli.table
    row = int(np.flatnonzero(table["split"] == "test")[0])
    names = pd.read_csv(LAYOUT.find(root, "index"))["image_name"]
    content = root.parent / "clear.png"
    Image.fromarray(np.zeros((32, 32, 4), np.uint8)).save(content)
    with h5py.File(LAYOUT.find(root, "pictures"), "r+") as file:
        place = names.tolist().index(table["stimulus_id"][row])
        file["images"][place] = np.frombuffer(content.read_bytes(), np.uint8)
    assert (source.read_image(row) == 128).all()
    other = source.read_image(int(np.flatnonzero(table["split"] == "train")[0]))
    assert other.shape == (32, 32, 3)
    assert other.std() > 10
    assert open_one(root, with_images=False).read_image is None


def test_shipped_embeddings_and_captions_are_targets_without_pictures(shared_root, tmp_path):
    """Whoever has not signed the form decodes the published vectors; kinds out of distribution are scored by group."""
    file = LAYOUT.place(shared_root, "embeddings", model="CLIP")
    target = f"target={{kind: imported, layout: rows, network: CLIP, files: {file}, ids: {file}}}"
    few = "evaluation={n_bootstrap: 100, n_permutations: 100, conditions: [ood_kind]}"
    changes = [target, few, "dataset.with_images=false", "encoder.alphas=[1]"]
    run = open_run(read_config("laion_fmri_ood_ridge", changes, root=shared_root), tmp_path / "run")
    run_all(run)
    rows = [
        row
        for row in read_scores(tmp_path / "run")
        if row["metric"] == "2_way" and row["method"] == "decoded"
    ]
    assert {row["split"] for row in rows} >= {"test, shape", "test, relations", "test, unusual"}
    found = [
        finding.message for finding in audit_run(tmp_path / "run").findings if finding.level == "warning"
    ]
    assert any("a model that was trained or chosen on NSD has seen them" in text for text in found)
    pictures = LAYOUT.place(shared_root, "pictures")
    wrong = ImportedConfig(layout="rows", network="CLIP", files=file, ids=pictures)
    with pytest.raises(ConfigError, match="which holds 0 lists of texts; one is needed"):
        wrong.build().embed(open_one(shared_root).stimuli, (), None)
    captions = read_caption_bank(LAYOUT.place(shared_root, "captions"))
    assert set(open_one(shared_root).stimuli.ids) <= set(captions)


def change_table(root, **cells):
    """Change cells of the first row of a table of trials."""
    path = LAYOUT.find(root, "trials", subject="01", session="01")
    table = pd.read_csv(path, sep="\t", dtype=str)
    for name, value in cells.items():
        table.loc[0, name] = value
    table.to_csv(path, sep="\t", index=False)


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ({"label": "shared_12rep_LAION_unknown.jpg"}, None),
        ({"label": "unique_LAION_initial_cluster_1_i0_p02.jpg"}, "only subject 06 saw: the files of subject 01"),
        ({"label": ""}, "has trials without a label"),
        ({"run": "x"}, "has trials without a number of the run"),
        ({"session": "ses-02"}, "has trials of session '2'; it is not the table of session 01"),
        ({"beta_index": "1"}, "each once.*: fetch both again"),
    ],
)  # fmt: skip
def test_a_table_of_trials_that_does_not_fit_is_named(root, cells, said):
    change_table(root, **cells)
    if said is None:  # a label that the split does not name is not read; one that it names needs a picture
        path = LAYOUT.find(root, "split", pool="sub-01", split="tau")
        content = json.loads(path.read_text())
        content["variants"][0]["train_ids"].append(cells["label"])
        path.write_text(json.dumps(content))
        said = "1 labels of trials have no picture in .*first 'shared_12rep_LAION_unknown.jpg'"
    refusals(LaionFmriConfig, root=root, subjects=("01",))(DataError, said)


def test_folders_of_closed_or_renamed_sessions_are_not_read_and_named(root):
    """Sessions 31 to 34 are held back: files of them that lie on disk were read as any other."""
    before = LaionFmriConfig(root=root, subjects=("01",)).hash_inputs()
    for name in ("betas", "trials"):
        first, later = (LAYOUT.place(root, name, subject="01", session=session) for session in ("01", "31"))
        later.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(first, later)
    assert LaionFmriConfig(root=root, subjects=("01",)).hash_inputs() == before
    folder = LAYOUT.place(root, "betas", subject="01", session="02").parent.parent
    folder.rename(folder.with_name("ses-2"))
    source = open_one(root)
    assert {part.group[1] for part in source.parts} == {"01"}
    assert source.notes["warnings"][-1] == (
        "not read of subject 01: ses-2, ses-31. Only ses-01 to ses-30 with betas of the same name are read; "
        "correct the name of a folder that was renamed."
    )
    # As the real data set, whose sessions must all be there.
    (root / "phantom_truth").rename(root.with_name("truth"))
    found = [finding for finding in LaionFmriConfig(root=root, subjects=("01",)).check() if not finding.ok]
    assert any("1 of 30 declared sessions are read, without 02, 03" in finding.message for finding in found)


def test_settings_that_nothing_fits_are_named(root):
    refuse = refusals(LaionFmriConfig, root=root)
    for sessions in (31, [2, 34], 0, []):
        with pytest.raises(ValueError, match="the bucket denies 31 to 34, which the authors hold back"):
            LaionFmriConfig(root=root, sessions=sessions)
    refuse(ConfigError, "dataset.split .*did you mean 'tau'", split="tao")
    refuse(ConfigError, "dataset.mask of subject 01 .*brain", mask="V9")
    refuse(DataError, "subject 01, session 03 is not there", sessions=[3])
    # The shell and YAML turn 02 into a number, as --subject 2 is one.
    for label in ("02", 2):
        refuse(DataError, "subject 0?2 is not there; found 01, 03", subjects=(label,))
    assert open_one(root, subjects=(3,)).parts[0].trials["subject"].iloc[0] == "03"
    refuse(ConfigError, "dataset.subjects lists none; name some of 01, 03, or leave it out", subjects=())
    refuse(ConfigError, "do not correspond: read one subject at a time")
    for pool in ("sub-01", "sub-03"):
        path = LAYOUT.find(root, "split", pool=pool, split="tau")
        variant = json.loads(path.read_text())["variants"][0]
        sides = (variant["train_ids"], variant["test_ids"]) if pool == "sub-01" else (variant["test_ids"], [])
        path.write_text(json.dumps({"variants": [dict(zip(("train_ids", "test_ids"), sides, strict=True))]}))
    refuse(DataError, "both trained on and tested.*set dataset.pool=shared", pad_subjects=True)
    path.write_text(json.dumps({"variants": [{"train_ids": ["a"], "test_ids": ["a"]}]}))
    refuse(DataError, "1 pictures on both sides, first 'a'", subjects=("03",))
    path.write_text("{}")
    refuse(DataError, "it is no split of LAION-fMRI", subjects=("03",))
    path.write_bytes(b"\xff")
    refuse(DataError, "it is no split of LAION-fMRI.*fetch it again", subjects=("03",))
    index = LAYOUT.place(root, "index")
    first, second, _, *rest = index.read_text().splitlines(keepends=True)
    index.write_text("".join((first, second, second, *rest)))
    refuse(DataError, "more than once; fetch list and pictures again", subjects=("01",))
    LAYOUT.place(root, "pictures").unlink()
    refuse(DataError, "ask for it with the form", subjects=("01",))


def test_a_part_of_the_bucket_is_planned(monkeypatch, tmp_path):
    """By subject, session and region; the plan says that the pictures need a form."""
    manifest = read_manifest("laion_fmri")
    keys = {
        LAYOUT.place(tmp_path, "region", subject="01", set="face", roi=roi)
        .relative_to(tmp_path)
        .as_posix(): b"r"
        for roi in ("FFA-1", "OFA")
    }
    for session in ("01", "12", "25", "30", "31"):
        for name in ("betas", "trials"):
            path = LAYOUT.place(tmp_path, name, subject="01", session=session).relative_to(tmp_path)
            keys[path.as_posix()] = b"b"
    assert len([file for part in manifest.parts for file in part.files]) == 72
    assert sorted(OWNERS.values()) == list(manifest.parts[0].subjects)
    with serve() as server:
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(transfer, "ALLOW_LOOPBACK", True)
        monkeypatch.setitem(hosts.BASES, "s3", f"{server.url}/s3/{{place}}")
        write_bucket(server, "/s3/laion-fmri", keys)
        plan = make_plan(
            manifest, tmp_path, subjects=["1"], parts=["betas", "regions", "images"],
            only={"session": ["30"], "region": ["FFA1"]},
        )  # fmt: skip
        assert len(plan.files) == 3
        assert all("ses-30" in file.path or "FFA-1" in file.path for file in plan.files)
        assert any("hebartlab.com/request" in line for line in plan.describe())
        with pytest.raises(
            ConfigError, match="--session names 31; laion_fmri has the sessions 01, 12, 25, 30"
        ):
            make_plan(manifest, tmp_path, subjects=["1"], parts=["betas"], only={"session": ["31"]})


def test_a_dry_run_without_the_list_of_the_bucket_refuses_closed_sessions(monkeypatch, tmp_path):
    """The patterns of the manifest name 01 to 30 only; a session that they allow waits for the list."""
    monkeypatch.setitem(hosts.BASES, "s3", "http://127.0.0.1:9/{place}")
    monkeypatch.setattr(transfer, "ALLOW_LOOPBACK", True)
    manifest, betas = read_manifest("laion_fmri"), {"parts": ["betas"], "only_look": True}
    for session in ("31", "34", "prf"):
        with pytest.raises(
            ConfigError, match=f"names {session}; laion_fmri has only files like ses-0.*ses-30"
        ):
            make_plan(manifest, tmp_path, only={"session": [session]}, **betas)
    for session in ("1", "12", "30"):
        assert list(make_plan(manifest, tmp_path, only={"session": [session]}, **betas).unlisted) == ["betas"]
