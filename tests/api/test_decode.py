"""From arrays to scores, images and a report in a few lines, in memory and from the command line alike."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import braindecode_vis as bdv

N_PICTURES, N_REPEATS, N_FEATURES = 30, 2, 60
FEW = {"evaluation.n_permutations": 200, "evaluation.n_bootstrap": 200}


def make_experiment(seed=0, noise=0.3):
    rng = np.random.default_rng(seed)
    pictures = rng.random((N_PICTURES, 6, 6))
    shown = np.repeat(np.arange(N_PICTURES), N_REPEATS)
    X = pictures.reshape(N_PICTURES, -1)[shown] @ rng.normal(size=(36, N_FEATURES))
    return (X + noise * rng.normal(size=X.shape)).astype(np.float32), pictures, shown


def get_score(run, metric, method="decoded"):
    scores = run.scores
    return scores[(scores["metric"] == metric) & (scores["method"] == method)]["value"].item()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    X, pictures, shown = make_experiment()
    data = bdv.from_arrays(
        X, images=pictures, shown=shown, title="Mine", unit="microvolt", citation="Me (2026)"
    )
    return bdv.decode(data, split=5, out=tmp_path_factory.mktemp("run"), settings=FEW)


def test_import_is_light():
    """Nothing heavy is loaded before a name is used."""
    code = "import sys, braindecode_vis; print([m for m in ('numpy', 'torch', 'pandas') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_public_names_are_few_and_all_there():
    assert set(dir(bdv)) == set(bdv.__all__)
    assert len(bdv.__all__) < 36
    for name in bdv.__all__:
        assert getattr(bdv, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'form_arrays'"):
        bdv.form_arrays  # noqa: B018


def test_stub_names_what_the_package_exports():
    """The types of the lazily loaded names are in a stub, which must not fall behind."""
    import ast

    tree = ast.parse(Path(bdv.__file__).with_suffix(".pyi").read_text())
    names = {alias.asname for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert names | {"__version__"} == set(bdv.__all__)


def test_a_run_answers_with_scores_predictions_images_and_a_page(run):
    assert get_score(run, "top1") > 0.5
    assert len(run.predictions) == N_PICTURES  # repetitions are averaged
    assert run.reconstructions["decoded"].shape == (N_PICTURES, 6, 6, 3)
    assert len(run.ranks) == N_PICTURES
    page = run.report().read_text()
    assert "Mine" in page
    assert "Me (2026)" in page
    assert "microvolt" in page
    # what is printed are the scores of the decoder, and not those of its controls
    assert len(run.scores.query("metric == 'top1'")) > 1
    (row,) = (line.split() for line in str(run).splitlines() if line.split()[:1] == ["top1"])
    assert float(row[1]) == pytest.approx(get_score(run, "top1"), abs=5e-4)
    assert run._repr_html_().count("<td>top1</td>") == 1


def test_an_opened_run_gives_the_same(run):
    again = bdv.open_run(str(run.folder))
    pd.testing.assert_frame_equal(
        again.scores.drop(columns="fingerprint"), run.scores.drop(columns="fingerprint")
    )
    np.testing.assert_array_equal(again.predictions.vectors, run.predictions.vectors)


@pytest.mark.parametrize("kind", ["pictures", "classes"])
def test_the_same_from_a_folder_gives_the_same_to_the_last_digit(kind, tmp_path, command_line):
    """The folder had a grid, repetitions and folds of its own: top-1 .150 where `decode` gave .200."""
    X, pictures, shown = make_experiment()
    folder = tmp_path / "folder"
    folder.mkdir()
    np.save(folder / "data.npy", X)
    runs = np.arange(len(X)) % 3
    if kind == "pictures":
        np.save(folder / "images.npy", pictures)
        (folder / "meta.yaml").write_text("first_id: 0\n")
        pd.DataFrame({"stimulus_id": shown, "run": runs}).to_csv(folder / "trials.csv", index=False)
        data = bdv.from_arrays(X, images=pictures, shown=shown, run=runs)
    else:
        labels = np.array(["face", "house"])[shown % 2]
        pd.DataFrame({"concept": labels, "run": runs}).to_csv(folder / "trials.csv", index=False)
        data = bdv.from_arrays(X, labels=labels, run=runs)
    expected = bdv.decode(data, settings=FEW)
    assert command_line("new", folder).returncode == 0
    sets = [part for key, value in FEW.items() for part in ("--set", f"{key}={value}")]
    configs = [folder / "decode.yaml"] + (["arrays_ridge"] if kind == "pictures" else [])
    for config in configs:
        out = tmp_path / f"out-{getattr(config, 'stem', config)}"
        done = command_line("run", config, "--root", folder, "--out", out, *sets)
        assert done.returncode == 0, done.stderr
        found = bdv.open_run(out)
        pd.testing.assert_frame_equal(
            found.scores.drop(columns="fingerprint"),
            expected.scores.drop(columns="fingerprint"),
            check_exact=True,
        )
        ours, theirs = (
            run.config.model_dump(mode="json", exclude={"name", "dataset"}) for run in (found, expected)
        )
        assert ours == theirs
    # And so does a folder that `save` wrote.
    data.save(tmp_path / "saved")
    out = tmp_path / "out-saved"
    done = command_line("run", configs[0], "--root", tmp_path / "saved", "--out", out, *sets)
    assert done.returncode == 0, done.stderr
    pd.testing.assert_frame_equal(
        bdv.open_run(out).scores.drop(columns="fingerprint"),
        expected.scores.drop(columns="fingerprint"),
        check_exact=True,
    )


def test_figures_are_matplotlib_objects(run, tmp_path):
    from matplotlib.figure import Figure

    for figure in (
        run.gallery(),
        bdv.plot_gallery(run, n_items=3),
        bdv.plot_ranks(run),
        bdv.plot_scores(run),
    ):
        assert isinstance(figure, Figure)
        assert figure._repr_png_().startswith(
            b"\x89PNG"
        )  # notebooks showed "<Figure size 900x459 with 45 Axes>"
    run.gallery(rows=["decoded"]).savefig(tmp_path / "gallery.png")
    seen, decoded = run.reconstructions["seen"], run.reconstructions["decoded"]
    assert isinstance(bdv.plot_gallery(seen=seen, decoded=decoded), Figure)
    with pytest.raises(bdv.ConfigError, match="metric is 'pixcor'"):
        run.gallery(metric="pixcor")
    with pytest.raises(bdv.DataError, match="belong together"):
        bdv.plot_gallery(seen=seen, decoded=decoded[1:])


def test_audit_and_compare(run, tmp_path):
    found = run.audit()
    assert not (found["level"] == "leak").any()
    X, pictures, shown = make_experiment()
    noise = np.random.default_rng(1).normal(size=X.shape)
    data = bdv.from_arrays(X + 3 * noise, images=pictures, shown=shown)
    other = bdv.decode(data, split=5, out=tmp_path, settings=FEW)
    table = run.compare(other)
    assert table.set_index("metric").loc["pixcorr", "difference"] < 0


def test_noise_is_at_chance():
    _, pictures, shown = make_experiment()
    X = np.random.default_rng(5).normal(size=(len(shown), N_FEATURES))
    run = bdv.decode(
        bdv.from_arrays(X, images=pictures, shown=shown), split=5, settings={"evaluation.n_permutations": 200}
    )
    row = run.scores.query("metric == '2_way' and method == 'decoded'").iloc[0]
    assert row["ci_low"] < 0.5 < row["ci_high"]


@pytest.mark.further
def test_a_picture_under_two_ids_is_split_as_one():
    """Such a picture was trained on and tested: pixel correlation 0.963 instead of 0.85 without a word."""
    X, pictures, shown = make_experiment(noise=30.0)
    doubled = np.concatenate([pictures, pictures])  # the second presentation has an id of its own
    other = shown.copy()
    other[1::2] += N_PICTURES
    data = bdv.from_arrays(X, images=doubled, shown=other)
    assert len(data.stimuli) == N_PICTURES
    assert any("became one" in note for note in data.notes)
    both = bdv.decode(data, split=5, settings=FEW)
    one = bdv.decode(bdv.from_arrays(X, images=pictures, shown=shown), split=5, settings=FEW)
    assert get_score(both, "pixcorr") == pytest.approx(get_score(one, "pixcorr"), abs=0.02)


@pytest.mark.further
def test_leave_one_image_out_and_groups():
    X, pictures, shown = make_experiment()
    X, shown = X[shown < 15], shown[shown < 15]
    data = bdv.from_arrays(X, images=pictures[:15], shown=shown, group=np.arange(30) // 6)
    few = {**FEW, "evaluation.n_permutations": 100, "encoder.alphas": [1.0]}  # each is a refit
    one = bdv.decode(data, split="leave-one-image-out", settings=few)
    assert one.scores["protocol"].str.contains(r"leave one image out \(15 images\)").all()
    assert get_score(one, "top1") > 0.5
    groups = bdv.decode(data, split={"kind": "group_kfold", "n_folds": 5, "images": True}, settings=few)
    assert groups.scores["protocol"].str.contains("5-fold over 5 groups").all()


def test_classes_without_pictures_across_subjects_folds_and_groups():
    rng = np.random.default_rng(0)
    labels = np.tile(["face", "house"], 60)
    X = rng.normal(size=(120, 20)) + (labels == "face")[:, None] * 0.8
    data = bdv.from_arrays(
        X, labels=labels, subject=np.repeat(["a", "b", "c"], 40), run=np.tile(np.repeat([1, 2], 20), 3),
        group=np.arange(120) // 10,
    )  # fmt: skip
    for split in ("leave-one-subject-out", "leave-one-run-out", 4, "leave-one-group-out", None):
        run = bdv.decode(data, encoder="lda", split=split, settings=FEW)
        assert run.decodes_categories
        values = run.scores.query("metric == 'accuracy' and method == 'decoded'")["value"]
        assert values.mean() > 0.8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda X, p, s: bdv.from_arrays(X), "nothing says what the trials showed"),
        (
            lambda X, p, s: bdv.from_arrays(X, images=p, shown=s[:-1]),
            "shown has 59 entries, but X has 60 trials",
        ),
        (lambda X, p, s: bdv.from_arrays(X, images=p, shown=p), "must hold one id per trial"),
        (
            lambda X, p, s: bdv.from_arrays(X, images=p),
            "30 pictures and 60 trials: say which picture each trial",
        ),
        (lambda X, p, s: bdv.from_arrays(X, images=p, shown=s + 1), r"dict\(enumerate\(pictures, 1\)\)"),
        (
            lambda X, p, s: bdv.from_arrays(X, images=p, trials={"stimulus_id": s}),
            r"dict\(enumerate\(pictures, 0\)\)",
        ),
        (lambda X, p, s: bdv.from_arrays(5, images=p), "must be an array of trials"),
        (lambda X, p, s: bdv.decode(X), "takes data made by from_arrays"),
        (lambda X, p, s: bdv.decode(bdv.from_arrays(X, images=p, shown=s), target="pixel"), "pixels"),
        (lambda X, p, s: bdv.decode(bdv.from_arrays(X, images=p, shown=s), encoder="rigde"), "ridge"),
        (
            lambda X, p, s: bdv.decode(bdv.from_arrays(X, images=p, shown=s), split="published"),
            "no train/test",
        ),
        (lambda X, p, s: bdv.decode(bdv.from_arrays(X, images=p, shown=s), split=1000), "only 30 images"),
        (lambda X, p, s: bdv.load("things_eeg3"), "things_eeg2"),
        # In the words of Python: the command line has --root, --set and split.kind.
        (lambda X, p, s: bdv.load("things_eeg2").responses, "pass it as root"),
        (
            lambda X, p, s: bdv.decode(
                bdv.from_arrays(X, images=p, shown=s, split="train"), split="published"
            ),
            'all trials are train.*; pass split="kfold"',
        ),
        (lambda X, p, s: bdv.decode(bdv.from_arrays(X, labels=s), encoder="ridge"), "pass encoder='lda'"),
        (
            lambda X, p, s: bdv.decode(bdv.from_arrays(X, images=p, shown=s), encoder="lda"),
            "no class of the test trials is shown in training",
        ),
        (
            lambda X, p, s: bdv.decode(bdv.from_arrays(X, labels=["a", *"bc" * 29, "b"]), split=3),
            "the class 'a' has only one trial",
        ),
        (
            lambda X, p, s: bdv.decode(bdv.from_arrays(X, labels=s), prior="spread", target="pca"),
            "takes no target and no prior; leave them out",
        ),
        (
            lambda X, p, s: bdv.decode(bdv.from_arrays(X, labels=s), settings={"repeats.train": "averaged"}),
            "categories are decoded trial by trial",
        ),
        (
            lambda X, p, s: bdv.decode(bdv.from_arrays(X[:6], images=dict(enumerate(p)), shown=s[:6])),
            "show only 2 images; set encoder.n_inner_folds to 2",
        ),
        (
            lambda X, p, s: bdv.decode(bdv.from_arrays(X, images=np.ones_like(p), shown=s)),
            "only one picture .29 picture.s. are the same",
        ),
        (lambda X, p, s: bdv.decode(bdv.from_arrays(X, images=p, shown=s), split=2.5), "split is 2.5"),
        (
            lambda X, p, s: bdv.decode(bdv.from_arrays(X, images=p, shown=s), encoder=object()),
            "encoder is <object",
        ),
        (
            lambda X, p, s: bdv.from_arrays(X, images=p, shown=s, trials={"stimulus_id": s[::-1]}),
            "given twice",
        ),
        (lambda X, p, s: bdv.from_arrays(np.ma.masked_greater(X, 1), images=p, shown=s), "masked values"),
        (lambda X, p, s: bdv.from_epochs(X), "from_epochs takes mne.Epochs, not ndarray"),
        (lambda X, p, s: bdv.from_nifti(X, {}, mask_img=X), "must be a NIfTI image"),
        (lambda X, p, s: bdv.describe("encoder", "foo"), "ridge"),
        (lambda X, p, s: bdv.plot_gallery(3), "not int"),
        (lambda X, p, s: bdv.plot_ranks(3), "takes a run that finds pictures, not int"),
        (lambda X, p, s: bdv.open_run(None), "takes the folder of a run, not NoneType"),
        (
            lambda X, p, s: bdv.from_arrays(X, trials="trials.csv"),
            "a DataFrame or a mapping of columns, not str",
        ),
        (lambda X, p, s: bdv.from_arrays(X, labels=s, modality="ecog"), "modality is 'ecog'"),
        (lambda X, p, s: bdv.from_arrays(X, labels=s, repetition="a"), "repetition must be whole numbers"),
        (lambda X, p, s: bdv.decode(bdv.from_arrays(X, images=p, shown=s), target=None), "target is None"),
        (
            lambda X, p, s: bdv.decode(bdv.from_arrays(X, images=p, shown=s), settings=["a"]),
            "must be a mapping",
        ),
        (lambda X, p, s: bdv.open_run("/nowhere"), "is not a run folder"),
        (lambda X, p, s: bdv.Decoder.from_run("/runs/mine"), "is not a run folder: it holds no config.yaml"),
        (lambda X, p, s: bdv.Decoder.from_run(3), "or the folder of one, not int"),
        (lambda X, p, s: bdv.describe("encodr"), "encoder"),
    ],
)
def test_bad_input_is_one_sentence_in_the_packages_own_exception(call, message):
    X, pictures, shown = make_experiment()
    with pytest.raises(bdv.BraindecodeVisError, match=message):
        call(X, pictures, shown)


def test_the_lines_of_the_readme_run(tmp_path, monkeypatch, capsys):
    """README shows how arrays become a report; what it shows must work unchanged."""
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    block, following = re.findall(r"```python\n(.*?)```", text, re.S)[:2]
    X, pictures, ids = make_experiment()
    monkeypatch.chdir(tmp_path)
    names = {"X": X, "pictures": pictures, "ids": ids, "X_new": X[:4]}
    exec(block, names)
    assert len([line for line in block.splitlines() if line]) <= 5
    assert (tmp_path / "gallery.png").stat().st_size > 1000
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
    # What is printed holds the numbers, which a table of pandas would cut off in a terminal.
    first, *rows = capsys.readouterr().out.splitlines()
    assert first.split() == ["metric", "value", "ci_low", "ci_high", "chance", "p_value", "n_queries"]
    assert rows[0].split()[0] == "top1"
    assert "Intervals resample images" in "\n".join(rows)
    exec(following, names)
    assert (tmp_path / "predictions" / "monday" / "predict.html").is_file()


def test_the_lines_of_troubleshooting_run(run):
    """They say which row is which image."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "TROUBLESHOOTING.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(block.replace('bdv.open_run("runs/mine")', "done"), {"bdv": bdv, "done": run})


def test_known_things_are_tables():
    assert "arrays_ridge" in set(bdv.list_configs()["name"])
    assert {"ridge", "network", "lda"} <= set(bdv.describe("encoder")["kind"])
    table = bdv.describe("encoder", "ridge")
    assert table.set_index("setting").loc["alphas", "about"]


def test_another_run_in_the_same_folder_is_refused(tmp_path):
    """Data and scores of the earlier run were overwritten without a word."""
    X, pictures, shown = make_experiment()
    quick = {**FEW, "encoder.alphas": [1.0]}

    def decode(factor=1.0, title=None, **options):
        data = bdv.from_arrays(X * factor, images=pictures, shown=shown, title=title)
        return bdv.decode(data, **{"split": 3, "settings": quick, "out": tmp_path / "run", **options})

    first = decode()
    array = tmp_path / "run/data/responses/data.npy"
    written = array.stat().st_mtime_ns
    again = decode(title="Named later")
    assert get_score(again, "top1") == get_score(first, "top1")
    assert "Named later" in again.report().read_text()
    assert array.stat().st_mtime_ns == written
    with pytest.raises(bdv.ConfigError, match=r"other settings: seed \(0, now 3\); choose another out"):
        decode(seed=3)
    with pytest.raises(
        bdv.ConfigError, match=r"split.n_folds \(3, now 4\), encoder.alphas \(\[1.0\], now \[2.0\]"
    ):
        decode(split=4, settings={**quick, "encoder.alphas": [2.0]})
    with pytest.raises(bdv.ConfigError, match=r"dataset.kind \(arrays, now synthetic_digits\)"):
        bdv.decode(bdv.load("synthetic_digits"), split=3, settings=quick, out=tmp_path / "run")
    with pytest.raises(bdv.ConfigError, match="holds a run of other data"):
        decode(factor=2.0)
    assert array.stat().st_mtime_ns == written
    (tmp_path / "run/data/responses/meta.json").unlink()  # as of a run that was killed while it wrote
    assert not bdv.from_arrays(X, images=pictures, shown=shown).are_in(tmp_path / "run/data")


def test_times_that_are_not_even_are_said():
    """Chosen windows are no mistake, but a sampling rate from them was."""
    X, labels = np.random.default_rng(0).normal(size=(6, 2, 4)), list("aabbcc")
    data = bdv.from_arrays(X, labels=labels, times=[0.0, 0.1, 0.2, 2.0])
    assert any("steps of 100 to 1800 ms, and after 0.2 s comes 2 s" in note for note in data.notes)
    assert "sfreq" not in data.responses.coords
    rounded = bdv.from_arrays(X, labels=labels, times=[0.0, 0.002, 0.004, 0.005])  # 512 Hz in whole ms
    assert not any("evenly" in note for note in rounded.notes)
    assert rounded.responses.coords["sfreq"] == pytest.approx(500)


def test_pictures_that_groups_share_are_a_leak_that_says_what_to_do():
    X, pictures, shown = make_experiment()
    data = bdv.from_arrays(X, images=pictures, shown=shown, group=np.arange(len(shown)) % 3)
    quick = {**FEW, "encoder.alphas": [1.0]}
    with pytest.warns(bdv.LeakWarning, match="set split.images to true"):
        bdv.decode(data, split="leave-one-group-out", settings=quick)


def test_what_score_refuses_speaks_of_arguments(monkeypatch):
    from braindecode_vis.base.checks import DataError

    def refuse(*args):
        raise DataError("give the folder with --out.")

    monkeypatch.setattr("braindecode_vis.parts.studies.score_outputs.read_given", refuse)
    with pytest.raises(bdv.DataError, match="give the folder as out"):
        bdv.score(np.eye(3))
