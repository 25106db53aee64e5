"""NSD-Imagery on a phantom: trained on core sessions, tested on what was seen and imagined."""

import pickle

import numpy as np
import pytest
from PIL import Image

from braindecode_vis.base import store
from braindecode_vis.base.checks import DataError
from braindecode_vis.datasets.nsd.imagery_dataset import NsdImageryConfig
from braindecode_vis.parts.phantom.formats.file_writers import write_volumes
from braindecode_vis.preprocessing.betas import write_fmri
from tests.datasets.nsd_phantom import AFFINE, SHAPE, find_general, write_root
from tests.datasets.reading import refuse_changes

EXPS = ["visA"] * 6 + ["attA"] * 4 + ["imgA_1"] * 6 + ["visB"] * 6 + ["imgB_2"] * 6
CUES = list("ABCABC") + list("ABCA") + list("AABBCC") + list("DEFDEF") + list("FEDFED")
IMAGE_MAP = {"A": 0, "B": 1, "C": 2, "D": 3, "E": 4, "F": "scene"}
NAMES = ["00", "01", "02", "03", "04", "scene"]


def write_stimuli(path, exps=EXPS, cues=CUES, image_map=IMAGE_MAP):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        pickle.dump(
            {"exps": np.array(exps), "cues": np.array(cues), "image_map": image_map}, file, protocol=3
        )


@pytest.fixture
def betas():
    return np.random.default_rng(7).standard_normal((len(EXPS), *SHAPE)) * 3 + 2


@pytest.fixture
def root(tmp_path, betas):
    root = write_root(tmp_path / "nsd", sessions=(1, 2))
    folder = root / "nsddata_betas/ppdata/subj01/func1pt8mm/nsdimagerybetas_fithrf_GLMdenoise_RR"
    stored = (np.rint(volume * 300) for volume in betas)
    write_volumes(
        folder / "betas_nsdimagery.nii.gz",
        stored,
        shape=SHAPE,
        n_volumes=len(EXPS),
        affine=AFFINE,
        dtype=np.int16,
    )
    write_stimuli(root / "nsddata_stimuli/stimuli/nsdimagery_stimuli.pkl3")
    images = tmp_path / "images"
    images.mkdir()
    for number, name in enumerate(NAMES):
        Image.fromarray(np.full((50, 60, 3), number * 10, np.uint8)).save(images / f"{name}.png")
    return root


def make(root, **options):
    options = {"sessions": 2, "imagery_images": root.parent / "images"} | options
    return NsdImageryConfig(root=root, **options)


def test_core_trains_and_imagery_is_tested(root, betas, tmp_path):
    write_fmri(make(root, zscore="none"), tmp_path / "out")
    responses = store.read_responses(tmp_path / "out/responses")
    trials = responses.trials
    tested = trials["split"] == "test"
    kept = np.array([not e.startswith("att") for e in EXPS])
    mask = find_general()
    np.testing.assert_allclose(responses.data[tested], (np.rint(betas * 300) / 300)[kept][:, mask], atol=1e-5)
    assert (
        trials.loc[tested, "task"].tolist()
        == np.repeat(["vision", "imagery", "vision", "imagery"], 6).tolist()
    )
    assert trials.loc[tested, "stimulus_set"].tolist() == ["simple"] * 12 + ["complex"] * 12
    assert trials.loc[tested, "run"].tolist() == np.repeat(["01", "03", "04", "05"], 6).tolist()
    names = [f"imagery_{IMAGE_MAP[c]:02d}" if c != "F" else "imagery_scene" for c in np.array(CUES)[kept]]
    assert trials.loc[tested, "stimulus_id"].tolist() == names
    assert trials.loc[tested].groupby("stimulus_id")["repetition"].max().eq(3).all()
    # The shared images of the core sessions are neither trained on nor tested.
    assert not set(trials.loc[~tested, "stimulus_id"]) & set(names)
    assert 0 < (~tested).sum() < 60
    protocol = store.read_json(tmp_path / "out/responses/meta.json")["provenance"]["protocol"]
    assert "tested zero-shot on 6 stimuli in 24 vision and imagery trials" in protocol
    stimuli = store.read_stimuli(tmp_path / "out/stimuli")
    assert stimuli.pixels.shape[1:] == (40, 40, 3)
    assert (stimuli.read_image("imagery_scene") == 50).all()
    assert (stimuli.read_image("imagery_01") == 10).all()


@pytest.mark.parametrize(
    ("untrained", "words"), [("pooled", "with the core sessions"), ("own", "(transductive)")]
)
def test_the_imagery_session_is_standardised_as_the_protocol_says(root, tmp_path, untrained, words):
    summary = write_fmri(make(root, untrained=untrained, with_images=False), tmp_path / "out")
    assert words in summary["protocol"]
    responses = store.read_responses(tmp_path / "out/responses")
    tested = responses.data[responses.trials["split"] == "test"]
    centred = np.abs(tested.mean(axis=0)).max() < 1e-4
    assert centred == (untrained == "own")


def test_one_task_alone(root):
    source = make(root, tasks=("imagery",), with_images=False).open_betas()
    assert source.parts[-1].trials["task"].unique().tolist() == ["imagery"]
    write_stimuli(root / "nsddata_stimuli/stimuli/nsdimagery_stimuli.pkl3", exps=["visA"] * len(EXPS))
    with pytest.raises(DataError, match="no trial of the requested kind"):
        make(root, tasks=("imagery",), with_images=False).open_betas()


def test_check_counts_the_stimuli(root):
    findings = {finding.item: finding for finding in make(root).check()}
    assert findings["betas"].ok
    assert findings["n_stimuli"].message == "6, declared 18"
    assert not make(root, tasks=("imagery",), stimuli=root / "none").check()[0].ok


def test_hashes_see_betas_and_images(root):
    names = set(make(root).hash_inputs())
    assert {"betas_nsdimagery.nii.gz", "nsdimagery_stimuli.pkl3", "scene.png"} <= names


def test_what_is_odd_or_missing_is_named(root):
    listed = root / "nsddata_stimuli/stimuli/nsdimagery_stimuli.pkl3"
    refuse_changes(
        make(root),
        (DataError, r"lists 27 experiments and 27 cues, but .* has 28 betas",
         lambda: write_stimuli(listed, exps=EXPS[:-1], cues=CUES[:-1])),
        (DataError, "names the experiment 'seeA'", lambda: write_stimuli(listed, exps=["seeA", *EXPS[1:]])),
        (DataError, "maps no stimulus to the cue 'Z'", lambda: write_stimuli(listed, cues=["Z", *CUES[1:]])),
        (DataError, "is missing cues, image_map", lambda: listed.write_bytes(pickle.dumps({"exps": []}))),
        (DataError, r"1 of 6 imagery images are not in .*, first 'scene'",
         lambda: (write_stimuli(listed), (root.parent / "images/scene.png").unlink())),
        (DataError, r"betas_nsdimagery\.nii\.gz does not exist",
         lambda: next(root.glob("**/betas_nsdimagery.nii.gz")).unlink()),
    )  # fmt: skip


def test_places_that_are_not_there_are_named(root):
    for words, options in (
        (r"dataset\.imagery_images=DIR", {"imagery_images": None}),
        (r"dataset\.stimuli=FILE", {"stimuli": root / "none.pkl3"}),
    ):
        with pytest.raises(DataError, match=words):
            make(root, **options).open_betas()
