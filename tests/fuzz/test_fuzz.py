"""A few of the cases of ``make fuzz``, settings and arrays drawn by hypothesis, and that a case can be made again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as drawn

import braindecode_vis as bdv
from braindecode_vis.base.checks import BraindecodeVisError
from braindecode_vis.config import read_config
from tests.fuzz.examine import Examiner, make_base, names_finding
from tests.fuzz.mutator import mutate
from tests.fuzz.surfaces import MAKERS, SURFACES, list_loaders

# Reading is cheap in these; `make fuzz` goes through all of them.
FAST = ("god/read", "bold5000-betas", "score", "new", "configs")
BOUNDED = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.slow  # `make fuzz` draws thousands
def test_damage_is_told_or_changes_nothing():
    chosen = [word for name in FAST for word in ("--surface", name)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--cases", "25", "--jobs", "1", *chosen],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "25 cases" in done.stdout


def test_every_loader_is_given_what_it_reads_besides_its_folder():
    """The data set mosaic was listed without its atlas, so that no case of any surface could be made."""
    for (dataset, form), more in list_loaders().items():
        config = read_config(dataset, more[1::2])
        atlas = getattr(config.dataset, "atlas", None)
        assert atlas is None or atlas.files, (dataset, form)


@pytest.mark.parametrize(
    "base", [pytest.param(base, marks=[] if base == "digits" else [pytest.mark.slow]) for base in MAKERS]
)
def test_every_surface_ends_well_without_damage(tmp_path, base):
    """What fails before it was damaged ends the whole call; the cheapest run folder is looked at every day."""
    (tmp_path / "bases").mkdir()
    surfaces = [surface for surface in SURFACES.values() if surface.base == base]
    make_base(tmp_path / "bases", base)
    examiner = Examiner(tmp_path / "bases", tmp_path / "work")
    for surface in surfaces:
        (file, *_) = surface.list_files(tmp_path / "bases" / base)
        examiner.run_intact(surface, file)


@pytest.mark.parametrize("number", range(40))
def test_a_number_makes_the_same_damage_again(tmp_path, number):
    made = []
    for name in ("a", "b"):
        path = tmp_path / name / "table.csv"
        path.parent.mkdir()
        path.write_text("stimulus_id,onset\n" + "".join(f"p{n},{n / 10}\n" for n in range(30)))
        damage = mutate(path, np.random.default_rng(number))
        made.append(
            (damage, path.read_bytes() if path.is_file() else sorted(p.name for p in path.parent.iterdir()))
        )
    assert made[0] == made[1]


def test_an_audit_tells_only_with_a_finding_of_its_own():
    """Any other output once counted as reported, were it the path of a file alone."""

    def write(*levels):
        return json.dumps({"findings": [{"check": str(n), "level": level} for n, level in enumerate(levels)]})

    assert names_finding(write("ok", "leak"), write("ok", "ok"))
    assert not names_finding(write("ok", "ok", "ok"), write("ok", "ok"))
    assert not names_finding(write("ok", "warning"), write("ok", "warning"))


def check_sentence(error):
    assert str(error).strip()


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = (
    "seed", "name", "dataset", "dataset.n_train", "dataset.snr", "dataset.root", "split", "split.kind", "target",
    "repeats", "encoder", "encoder.kind", "encoder.alphas", "encoder.n_features", "prior", "generator", "evaluation",
    "evaluation.metrics", "evaluation.n_bootstrap", "evaluation.protocols", "retrieval", "analyses", "a.b.c", "",
)  # fmt: skip


@BOUNDED
@given(st.sampled_from(KEYS), PLAIN)
def test_a_setting_is_taken_or_refused(key, value):
    try:
        text = yaml.safe_dump(value, default_flow_style=True, width=10**6).split("\n...")[0].strip()
        config = read_config("synthetic_digits", [f"{key}={text}"])
    except BraindecodeVisError as error:
        check_sentence(error)
    else:
        assert config.dataset.kind


def test_a_key_of_two_lines_is_told_in_one(command_line):
    done = command_line("describe", "no\nname")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


@BOUNDED
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")))
def test_a_configuration_file_is_read_or_refused(tmp_path, content):
    path = tmp_path / "it.yaml"
    path.write_bytes(content)
    with pytest.raises(BraindecodeVisError):
        read_config(path)


TRIALS = drawn.arrays(
    st.sampled_from(
        [np.float32, np.float64, np.int16, np.uint8, np.bool_, np.complex64, "U3", "datetime64[s]"]
    ),
    drawn.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6),
)


@BOUNDED
@given(TRIALS, st.lists(st.text(max_size=3) | st.none() | st.integers(0, 3) | st.floats(), max_size=7))
def test_arrays_are_taken_or_refused(trials, labels):
    try:
        data = bdv.from_arrays(trials, labels=labels)
    except BraindecodeVisError as error:
        check_sentence(error)
    else:
        assert len(data.responses.data) == len(labels)
        assert np.isfinite(np.asarray(data.responses.data, dtype=float)).all()


@settings(BOUNDED, max_examples=30)
@given(TRIALS, TRIALS)
def test_outputs_are_scored_or_refused(predictions, targets):
    try:
        found = bdv.score(predictions, targets, n_bootstrap=20, n_permutations=20)
    except BraindecodeVisError as error:
        check_sentence(error)
    else:
        assert all(np.isfinite(row["value"]) for row in found.list_rows())
