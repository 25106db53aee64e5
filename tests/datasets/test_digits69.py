import numpy as np
import pytest
from scipy.io import savemat

from braindecode_vis.base.checks import DataError
from braindecode_vis.datasets.digits69 import FILE_NAME, Digits69Config, read_digits69
from braindecode_vis.datasets.manifests import read_manifest


def make_phantom_file(path, n_train=90, n_test=10, **changes):
    """Write random numbers in the very format of the published file."""
    generator = np.random.default_rng(0)
    content = {}
    for suffix, n in (("Trn", n_train), ("Test", n_test)):
        content[f"fmri{suffix}"] = generator.normal(scale=0.02, size=(n, 3092))
        content[f"stim{suffix}"] = generator.integers(0, 256, size=(n, 784), dtype=np.uint8)
        content[f"label{suffix}"] = np.repeat([1, 2], n // 2)[:, None].astype(np.uint8)
    content.update(changes)
    savemat(path, {key: value for key, value in content.items() if value is not None})
    return content


def test_the_phantom_file_is_read_row_by_row(tmp_path):
    content = make_phantom_file(tmp_path / FILE_NAME)
    responses, stimuli = read_digits69(tmp_path / FILE_NAME)
    assert responses.data.shape == (100, 3092)
    np.testing.assert_array_equal(responses.data[90:], content["fmriTest"].astype(np.float32))
    assert (responses.trials["split"] == ["train"] * 90 + ["test"] * 10).all()
    assert stimuli.table["stimulus_id"].iloc[[0, 89, 95]].tolist() == [
        "train_00_six",
        "train_89_nine",
        "test_05_nine",
    ]
    upright = content["stimTrn"][3].reshape(28, 28).T
    np.testing.assert_array_equal(stimuli.pixels[3], np.repeat(upright[..., None], 3, -1))


def test_a_copy_that_is_not_the_published_one_is_refused_unless_accepted(tmp_path):
    make_phantom_file(tmp_path / FILE_NAME)
    with pytest.raises(
        DataError, match=r"not the published file: sha256 .* expected 44513e09.*dataset\.verify=false"
    ):
        Digits69Config(root=tmp_path).write(tmp_path / "out", seed=0)
    Digits69Config(root=tmp_path, verify=False).write(tmp_path / "out", seed=0)
    assert (tmp_path / "out" / "responses" / "data.npy").is_file()


def test_the_first_bad_trial_is_named(tmp_path):
    content = make_phantom_file(tmp_path / FILE_NAME)
    content["fmriTrn"][41, 7] = np.nan
    savemat(tmp_path / FILE_NAME, content)
    with pytest.raises(DataError, match=r"non-finite value\(s\) in trial 41 .*train_41_six"):
        Digits69Config(root=tmp_path).write(tmp_path / "out", seed=0)
    findings = Digits69Config(root=tmp_path).check()
    assert any("trial 41" in finding.message for finding in findings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stimTest": None}, "is missing the variable stimTest"),
        ({"labelTrn": np.full((90, 1), 3, np.uint8)}, "labelTrn holds the code 3; 1 to 2 are known"),
        (
            {"labelTest": np.ones((9, 1), np.uint8)},
            "labelTest has the length 9 along test trial",
        ),
        (
            {"stimTrn": np.zeros((90, 100), np.uint8), "stimTest": np.zeros((10, 100), np.uint8)},
            "100 pixels instead of 28 x 28",
        ),
    ],
)
def test_other_content_is_named(tmp_path, changes, message):
    make_phantom_file(tmp_path / FILE_NAME, **changes)
    with pytest.raises(DataError, match=message):
        read_digits69(tmp_path / FILE_NAME)


def test_a_truncated_file_names_its_checksum(tmp_path):
    make_phantom_file(tmp_path / FILE_NAME)
    whole = (tmp_path / FILE_NAME).read_bytes()
    (tmp_path / FILE_NAME).write_bytes(whole[: len(whole) // 3])
    with pytest.raises(DataError, match=r"damaged or truncated: sha256 [0-9a-f]{64}, expected 44513e09"):
        Digits69Config(root=tmp_path).write(tmp_path / "out", seed=0)


@pytest.mark.parametrize(
    ("root", "message"),
    [(None, "pass it with --root"), ("absent", "is not a folder"), ("", "was not found at")],
)
def test_a_wrong_root_says_what_to_pass(tmp_path, root, message):
    config = Digits69Config(root=None if root is None else tmp_path / root)
    with pytest.raises(DataError, match=message):
        config.hash_inputs()


@pytest.mark.shared
def test_the_published_file_is_as_declared(shared):
    config = Digits69Config(
        root=shared / "digits69" if (shared / "digits69").exists() else shared / "data/digits69"
    )
    findings = config.check()
    assert all(finding.ok for finding in findings), findings
    assert len(findings) == 1 + len(read_manifest("digits69").facts)


@pytest.mark.shared
def test_the_digits_stand_upright(shared):
    """The loop of a six is below and makes it wider there, that of a nine above: true only when upright."""
    _, stimuli = read_digits69(shared / "data/digits69" / FILE_NAME)
    inked = stimuli.pixels[..., 0] > 100
    wider_below = inked[:, 14:].any(1).sum(1) - inked[:, :14].any(1).sum(1)  # columns
    concepts = stimuli.table["concept"].to_numpy()
    assert wider_below[concepts == "six"].mean() > 1
    assert wider_below[concepts == "nine"].mean() < -1
