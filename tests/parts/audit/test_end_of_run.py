"""Every run ends with the checks that are cheap; a leak is the first thing that report, shell and notebook say."""

import numpy as np
import pandas as pd
import pytest

import braindecode_vis as bdv
from braindecode_vis.pipeline.leaks.quick import audit_quickly

N_PICTURES, N_FEATURES = 20, 60
QUICK = {"evaluation.n_permutations": 100, "evaluation.n_bootstrap": 100, "encoder.alphas": [10.0]}


def make_experiment(*, copied):
    rng = np.random.default_rng(0)
    pictures = rng.random((N_PICTURES, 6, 6))
    X = pictures.reshape(N_PICTURES, -1) @ rng.normal(size=(36, N_FEATURES))
    X = (X + rng.normal(size=X.shape)).astype(np.float32)
    if copied:
        # Somebody duplicated trials and gave the copies another gain, and another picture.
        X[10:] = 1.7 * X[:10] + 1e-3 * rng.normal(size=(10, N_FEATURES))
    return X, pictures


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return two folders of arrays: a sound one, and one with copies of trials."""
    made = {}
    for name in ("sound", "copied"):
        root = tmp_path_factory.mktemp("own") / name
        root.mkdir()
        X, pictures = make_experiment(copied=name == "copied")
        np.save(root / "data.npy", X)
        np.save(root / "images.npy", pictures)
        split = ["train"] * 10 + ["test"] * 10
        pd.DataFrame({"stimulus_id": range(N_PICTURES), "split": split}).to_csv(
            root / "trials.csv", index=False
        )
        made[name] = root
    return made


def list_words(root, out):
    options = [f"--set={key}={value}" for key, value in QUICK.items()]
    return ["run", "arrays_ridge", "--root", root, "--out", out, "--set=split={kind: published}", *options]


def test_a_leak_ends_the_command_with_2_after_everything_was_written(folders, tmp_path, command_line):
    done = command_line(*list_words(folders["copied"], tmp_path / "run"))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: 1 leak in")
    assert "drop the copies" in done.stderr
    assert "top1" in done.stdout
    page = (tmp_path / "run" / "report.html").read_text()
    assert (tmp_path / "run" / "scores.json").is_file()
    body = page[page.index("<body>") :]
    assert (
        body.index('class="leaks"')
        < body.index("10 trial(s) have a copy on the other side")
        < body.index("<h1>")
    )


def test_a_sound_run_ends_with_0_and_says_what_was_checked(folders, tmp_path, command_line):
    done = command_line(*list_words(folders["sound"], tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert "checked for leaks in" in done.stdout
    assert "0 leak" in done.stdout
    assert 'class="leaks"' not in (tmp_path / "run" / "report.html").read_text()
    found = audit_quickly(tmp_path / "run")
    assert found.leaks == ()
    assert {item.check for item in found.findings} >= {"chain", "trials", "image", "pixels", "copies"}


def test_a_notebook_is_warned():
    X, pictures = make_experiment(copied=True)
    data = bdv.from_arrays(X, images=pictures, split=["train"] * 10 + ["test"] * 10)
    assert any("copies" in note for note in data.notes)
    with pytest.warns(bdv.LeakWarning, match=r"a copy on the other side.*see run\.leaks"):
        run = bdv.decode(data, settings=QUICK)
    assert len(run.leaks) == 1
    assert str(run).startswith("LEAK: ")
    assert run._repr_html_().startswith("<p><strong>LEAK: ")
    assert set(run.audit()["level"]) >= {"leak"}


def test_copies_on_one_side_are_no_leak():
    X, pictures = make_experiment(copied=True)
    side = [("train", "test")[n % 10 >= 7] for n in range(20)]  # a trial and its copy go together
    # A leak would be a warning, which is an error in all tests.
    assert bdv.decode(bdv.from_arrays(X, images=pictures, split=side), settings=QUICK).leaks == ()


def make_people(n_people=12, n_trials=10, n_features=20, effect=1.0, seed=0):
    """Return trials of patients and controls; every person has a pattern of their own beside that of the label."""
    rng = np.random.default_rng(seed)
    who = np.repeat(np.arange(n_people), n_trials)
    patient = np.arange(n_people) % 2
    X = rng.normal(size=(len(who), n_features)) + rng.normal(size=(n_people, n_features))[who]
    X[:, :4] += effect * patient[who][:, None]
    return X.astype(np.float32), np.array(["control", "patient"])[patient][who], who


@pytest.mark.parametrize("column", ["subject", "group"])
def test_recognising_a_person_is_a_leak_and_new_people_are_none(column):
    """Trials of one person in training and test gave .890 where people never seen gave .671, and nothing was said."""
    X, labels, who = make_people(n_people=6, effect=0.0)
    few = {"evaluation.n_permutations": 100, "evaluation.n_bootstrap": 100}
    data = bdv.from_arrays(X, labels=labels, **{column: [f"p{n:02d}" for n in who]})
    with pytest.warns(
        bdv.LeakWarning, match=rf"6 {column}\(s\) in both training and test show one class each"
    ):
        run = bdv.decode(data, split=5, settings=few)
    assert "LEAK: 6" in str(run)
    found = run.audit().set_index("check")["level"]
    assert found["identity"] == "leak"
    assert bdv.decode(data, split=f"leave-one-{column}-out", settings=few).leaks == ()
