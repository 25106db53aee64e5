import gzip
import shutil

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.store import read_json, read_responses, read_stimuli
from braindecode_vis.datasets.manifests import read_manifest
from braindecode_vis.datasets.muse_n170 import MuseN170Config, estimate_rate, find_runs, hash_text, read_run
from braindecode_vis.encoders.category_decoders import LdaConfig
from braindecode_vis.preprocessing.meeg import write_meeg
from braindecode_vis.preprocessing.splits import LeaveOneRunOutConfig
from tests.constants import replace_constants
from tests.datasets.reading import refusals

N_EVENTS = 24


def make_run(path, *, seconds=20, blink=(), rate=256, seed=0, **columns):
    """Write one run in the very format of the published files, microvolt and time stamps of 1 ms."""
    generator = np.random.default_rng(seed)
    n = seconds * 256
    marker = np.zeros(n, int)
    onsets = 200 + 190 * np.arange(N_EVENTS)
    codes = 1 + generator.permutation(np.arange(N_EVENTS) % 2)
    marker[onsets] = codes
    table = {"timestamps": np.round(149958.124 + np.arange(n) / rate, 3)}
    for name in ("TP9", "AF7", "AF8", "TP10"):
        table[name] = 5 * generator.normal(size=n) + 30
        for onset, code in zip(onsets, codes, strict=True):
            if code == 2:  # an N170 of faces
                table[name][onset + 36 : onset + 52] -= 15
    for event in blink:
        table["AF7"][onsets[event] + 40 : onsets[event] + 90] += 500
    table["Right AUX"] = 1e4 * generator.normal(size=n)
    table["Marker0"] = marker
    table.update(columns)
    frame = pd.DataFrame({name: value for name, value in table.items() if value is not None})
    frame.round(3).to_csv(path, index=False)
    return onsets, codes


def make_runs(folder, n_runs=3, **options):
    return [make_run(folder / f"data_2017-09-13-15.3{i}.01.csv", seed=i, **options) for i in range(n_runs)]


def test_runs_become_trials_of_two_categories(tmp_path):
    made = make_runs(tmp_path)
    summary = write_meeg(MuseN170Config(root=tmp_path, runs=(1, 2, 3)), tmp_path / "out")
    responses, stimuli = read_responses(tmp_path / "out/responses"), read_stimuli(tmp_path / "out/stimuli")
    assert summary["n_trials"] == 3 * N_EVENTS
    assert responses.data.shape == (72, 4, 58)
    assert responses.unit == "V"
    assert responses.trials["run"].unique().tolist() == ["01", "02", "03"]
    names = [("house", "face")[code - 1] for _, codes in made for code in codes]
    assert responses.trials["stimulus_id"].tolist() == names
    assert responses.trials["concept"].tolist() == names
    faces = responses.trials[responses.trials["concept"] == "face"]
    assert faces["repetition"].tolist() == list(range(36))
    assert stimuli.ids.tolist() == ["face", "house"]
    assert stimuli.root is None
    assert stimuli.table["sha256"].str.len().eq(64).all()
    with pytest.raises(DataError, match="not available"):
        stimuli.read_image("face")
    mean = {name: responses.data[np.array(names) == name].mean(axis=0) for name in ("face", "house")}
    times = responses.coords["times"]
    difference = (mean["face"] - mean["house"]).mean(axis=0)
    assert difference.min() == pytest.approx(-15e-6, rel=0.25)  # in V, smoothed by the 30 Hz low-pass
    assert 0.14 < times[difference.argmin()] < 0.21
    notes = read_json(tmp_path / "out/responses/meta.json")["provenance"]
    assert notes["filter"] == "band-pass 1 to 30 Hz per run, zero-phase FIR"
    assert "zero-phase" in notes["filter"]


def test_large_epochs_are_left_out_counted_and_bounded(tmp_path):
    make_runs(tmp_path, n_runs=2, blink=(3, 7))
    write_meeg(MuseN170Config(root=tmp_path, runs=(1, 2)), tmp_path / "out")
    notes = read_json(tmp_path / "out/responses/meta.json")["provenance"]
    assert [row["run"] for row in notes["rejected"]] == ["01", "02"]
    n_rejected = sum(row["n_rejected"] for row in notes["rejected"])
    assert 4 <= n_rejected <= 8  # a neighbour's epoch may reach into the artefact
    assert len(read_responses(tmp_path / "out/responses").trials) == 2 * N_EVENTS - n_rejected
    with pytest.raises(DataError, match=r"run 01, file .*epochs exceed 150 microvolt .* limit of 5%"):
        replace_constants(MuseN170Config, max_rejected=0.05)(root=tmp_path).open_epochs()
    kept = replace_constants(MuseN170Config, max_rejected=0.0)(root=tmp_path, reject=None).open_epochs()
    assert kept.n_trials == 2 * N_EVENTS


def test_the_rate_is_that_of_the_device_not_of_the_rounded_stamps():
    stamps = np.round(np.arange(30732) / 256, 3)
    assert 1 / np.median(np.diff(stamps)) == pytest.approx(250)
    assert estimate_rate(stamps) == pytest.approx(256, rel=1e-4)


def test_gzip_changes_nothing(tmp_path):
    make_run(tmp_path / "data_a.csv")
    plain = MuseN170Config(root=tmp_path).hash_inputs()
    (tmp_path / "recordings").mkdir()
    with gzip.open(tmp_path / "recordings/data_a.csv.gz", "wb") as file:
        file.write((tmp_path / "data_a.csv").read_bytes())
    (tmp_path / "data_a.csv").unlink()
    assert MuseN170Config(root=tmp_path).hash_inputs() == plain
    shutil.copy(tmp_path / "recordings/data_a.csv.gz", tmp_path / "recordings/b")
    with gzip.open(tmp_path / "recordings/b") as file:
        (tmp_path / "recordings/data_a.csv").write_bytes(file.read())
    with pytest.raises(DataError, match="both packed and unpacked"):
        find_runs(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 250}, r"250\.0\d Hz, but a Muse records at 256 Hz"),
        ({"TP10": None}, r"is missing the column\(s\) TP10"),
        ({"AF8": np.full(20 * 256, np.nan)}, "non-finite values in AF8"),
        ({"Marker0": np.full(20 * 256, 3)}, "has the marker 3; 0 .none., 1 .house. and 2 .face. are known"),
        ({"Marker0": np.zeros(20 * 256, int)}, "no marker of a face or house"),
    ],
)
def test_other_content_is_named(tmp_path, options, message):
    make_run(tmp_path / "data_a.csv", **options)
    with pytest.raises(DataError, match=message):
        MuseN170Config(root=tmp_path).open_epochs()


def test_damage_and_misuse_are_told(tmp_path):
    refuse = refusals(MuseN170Config, root=tmp_path)
    refuse(DataError, r"expected data_\*\.csv")
    (tmp_path / "data_a.csv").write_text("")
    refuse(DataError, "cannot be read as a table")
    (tmp_path / "data_a.csv").unlink()
    make_run(tmp_path / "data_a.csv")
    packed = gzip.compress((tmp_path / "data_a.csv").read_bytes())
    (tmp_path / "data_a.csv").unlink()
    (tmp_path / "data_a.csv.gz").write_bytes(packed[: len(packed) // 2])
    refuse(DataError, "cannot be read as a table")
    with pytest.raises(DataError, match="cannot be unpacked"):
        hash_text(tmp_path / "data_a.csv.gz")
    refuse(ConfigError, "some of TP9, AF7, AF8, TP10, not Right AUX", channels=("Right AUX",))
    refuse(ConfigError, r"not 30 and 1\.", l_freq=30, h_freq=1)
    findings = MuseN170Config(root=tmp_path).check()
    assert not findings[0].ok


@pytest.mark.shared
def test_the_published_runs_are_as_declared(shared):
    findings = MuseN170Config(root=shared / "data/muse_n170").check()
    assert all(finding.ok for finding in findings), findings
    assert len(findings) == 6 + len(read_manifest("muse_n170").facts)
    stamps = pd.read_csv(find_runs(shared / "data/muse_n170")[0])["timestamps"].to_numpy()
    assert estimate_rate(stamps) == pytest.approx(256, rel=1e-3)
    samples, _, _ = read_run(find_runs(shared / "data/muse_n170")[0], ("TP9",))
    assert 1e-6 < samples.std() < 1e-3


@pytest.mark.shared
def test_a_missing_run_is_refused_by_its_own_number(shared, tmp_path):
    """Five of the six runs were read without a word; a run keeps its number where one before it is missing."""
    root = shutil.copytree(shared / "data/muse_n170/recordings", tmp_path / "muse")
    next(root.glob("*15.32.50*")).unlink()
    with pytest.raises(
        DataError, match=r"5 of 6 declared runs of session 01 are read, without 02, .*dataset.runs"
    ):
        write_meeg(MuseN170Config(root=root), tmp_path / "out")
    findings = MuseN170Config(root=root).check()
    assert next(f.message for f in findings if not f.ok).endswith("without 02")
    chosen = MuseN170Config(root=root, runs=(1, 3, 4, 5, 6))
    assert all(finding.ok for finding in chosen.check())
    assert [part.recording.run for part in chosen.open_epochs().parts] == ["01", "03", "04", "05", "06"]


@pytest.mark.shared
def test_faces_are_told_from_houses_in_runs_never_seen(shared, tmp_path):
    """The bar is the AUC of a shrinkage LDA on these runs, 0.667 as a mean over left-out runs."""
    write_meeg(MuseN170Config(root=shared / "data/muse_n170"), tmp_path)
    responses = read_responses(tmp_path / "responses")
    assert responses.n_trials == 1143
    labels = responses.trials["concept"].to_numpy(dtype=object)
    assert (labels == "face").sum() == 569
    split = LeaveOneRunOutConfig().make(responses.trials, labels, seed=0)
    held_out, decided = [], np.zeros(len(labels))
    for fold in split.folds:
        decoder = LdaConfig().build(seed=0).fit(responses.select(fold.train), labels[fold.train])
        decided[fold.test] = decoder.decision(responses.select(fold.test))[:, decoder.classes.index("face")]
        held_out.append(roc_auc_score(labels[fold.test] == "face", decided[fold.test]))
    assert len(held_out) == 6
    assert np.mean(held_out) >= 0.667
    generator = np.random.default_rng(0)
    null = []
    for _ in range(40):
        runs = []
        for fold in split.folds:
            runs.append(roc_auc_score(generator.permutation(labels[fold.test] == "face"), decided[fold.test]))
        null.append(np.mean(runs))
    assert abs(np.mean(null) - 0.5) < 0.02
    assert max(null) < 0.6
