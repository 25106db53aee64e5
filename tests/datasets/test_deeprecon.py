"""Deeprecon: phantom BData files of every experiment, under both of their namings."""

import h5py
import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.store import read_responses, read_stimuli
from braindecode_vis.datasets.kamitani.bdata import encode_stimulus_id
from braindecode_vis.datasets.kamitani.deeprecon import FILE_NAME, DeepreconConfig
from braindecode_vis.parts.phantom.formats.kamitani_format import write_bdata
from braindecode_vis.preprocessing.betas import write_fmri

TRAIN = ["n01518878_10042", "n01518878_5958"]
TEST = ["n01621127_19020", "n01443537_22563"]
XYZ = np.array([[2.0, 0, 0], [0, 0, 0], [0, 2, 0]])
FILES = {
    "perceptionNaturalImageTraining": [encode_stimulus_id(n) for n in TRAIN] * 2,
    "perceptionNaturalImageTest": [encode_stimulus_id(n) for n in TEST],
    "perceptionArtificialImage": [1, 2, 11],
    "perceptionLetterImage": [3, 1],
    "imagery": [encode_stimulus_id(TEST[0]), 2],
}


def write_file(root, experiment, codes, variant="original_VC", subject=1, xyz=XYZ, **options):
    labels = pd.DataFrame({"DataType": 1, "stimulus_id": np.asarray(codes, float), "Run": 1, "Block": 1})
    data = np.random.default_rng(len(experiment)).standard_normal((len(codes), len(xyz)))
    rois = {"ROI_VC": np.arange(len(xyz)) < 2}
    path = root / FILE_NAME.format(subject=subject, experiment=experiment, variant=variant)
    return write_bdata(path, [data], labels, rois, voxel_xyz=xyz, naming="dataset", **options), data


@pytest.fixture
def root(tmp_path):
    for experiment, codes in FILES.items():
        write_file(tmp_path, experiment, codes)
    return tmp_path


def test_every_experiment_becomes_trials(root):
    (root / "stimulus_ArtificialImage.tsv").write_text("red_circle\t1\ncyan_cross\t2\nblue_ring\t11\n")
    config = DeepreconConfig(root=root, test=("natural", "shapes", "letters", "imagery"), zscore="none")
    write_fmri(config, root / "out")
    responses, stimuli = read_responses(root / "out" / "responses"), read_stimuli(root / "out" / "stimuli")
    trials = responses.trials
    assert (
        trials["task"].tolist()
        == ["training"] * 4 + ["natural"] * 2 + ["shapes"] * 3 + ["letters"] * 2 + ["imagery"] * 2
    )
    assert trials["split"].tolist() == ["train"] * 4 + ["test"] * 9
    assert trials["stimulus_id"].tolist()[4:] == [
        *TEST, "red_circle", "cyan_cross", "blue_ring", "letter_3", "letter_1", f"imagined_{TEST[0]}",
        "imagined_cyan_cross",
    ]  # fmt: skip
    assert trials["repetition"].tolist()[:4] == [0, 0, 1, 1]
    table = stimuli.table.set_index("stimulus_id")
    assert table.loc["red_circle", "path"] == "red_circle.tiff"
    assert table.loc[f"imagined_{TEST[0]}", ["concept", "path"]].tolist() == ["n01621127", ""]
    assert responses.data.shape == (13, 3)


def test_the_pictures_that_people_had_in_mind_are_listed_without_being_shown(root):
    """Imagery alone left nothing to represent what was imagined by."""
    table = DeepreconConfig(root=root, test=("imagery",)).open_betas().stimuli.table.set_index("stimulus_id")
    assert table.loc[[TEST[0], "shape_2"], "path"].tolist() == [f"{TEST[0]}.JPEG", "shape_2.tiff"]
    assert table.loc["imagined_shape_2", ["concept", "path"]].tolist() == ["shape_2", ""]


def test_names_in_the_file_win_over_numbers(tmp_path):
    """Later releases carry a map from numbers to names."""
    for experiment in ("ImageNetTraining", "ImageNetTest"):
        names = TRAIN if experiment.endswith("Training") else TEST
        path, _ = write_file(tmp_path, experiment, [1, 2], variant="fmriprep_volume_native")
        with h5py.File(path, "a") as file:
            for number, name in enumerate(names, 1):
                file[f"vmap/stimulus_id/{float(number)}"] = name
    trials = pd.concat([part.trials for part in DeepreconConfig(root=tmp_path).open_betas().parts])
    assert trials["stimulus_id"].tolist() == TRAIN + TEST


def test_several_variants_must_be_chosen_from(root):
    write_file(root, "ImageNetTest", FILES["perceptionNaturalImageTest"], variant="fmriprep_volume_native")
    with pytest.raises(ConfigError, match="fmriprep_volume_native, original_VC; choose one"):
        DeepreconConfig(root=root).open_betas()
    assert DeepreconConfig(root=root, variant="original_VC").open_betas().n_trials == 6


def test_bad_input_is_named(root, tmp_path_factory):
    with pytest.raises(DataError, match="holds no file like"):
        DeepreconConfig(root=tmp_path_factory.mktemp("empty")).open_betas()
    write_file(
        root, "perceptionNaturalImageTest", FILES["perceptionNaturalImageTest"], xyz=XYZ + np.array([0, 0, 2])
    )
    with pytest.raises(
        DataError, match="has 3 voxels that are not the 3 of sub-01_perceptionNaturalImageTraining"
    ):
        DeepreconConfig(root=root).open_betas()
    write_file(root, "perceptionNaturalImageTest", [encode_stimulus_id(TRAIN[0])])
    with pytest.raises(DataError, match="both trained on and tested, first n01518878_10042"):
        DeepreconConfig(root=root).open_betas()
    write_file(root, "perceptionNaturalImageTest", FILES["perceptionNaturalImageTest"], dtype="<f4")
    with pytest.raises(DataError, match="single precision"):
        DeepreconConfig(root=root).open_betas()
    with pytest.raises(DataError, match="no training file of subject 02"):
        DeepreconConfig(root=root, subjects=(2,)).open_betas()


def test_check_counts_samples(root):
    findings = DeepreconConfig(root=root).check()
    assert [finding.ok for finding in findings] == [False, False]
    assert "4 samples of 2 stimuli, declared 6000" in findings[0].message
