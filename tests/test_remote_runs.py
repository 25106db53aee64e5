"""A data set that lies on a server gives the run that it gives from a folder, bit for bit."""

import shutil

import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base import remote
from braindecode_vis.parts.phantom import SIZES, PhantomConfig, make_phantom
from braindecode_vis.pipeline.runs import read_scores
from tests.datasets.test_file_damage import LOADERS, configure, preprocess
from tests.parts.phantom.tiny import embed

FEW = ("--set", "evaluation.n_bootstrap=100", "--set", "evaluation.n_permutations=100")


def make(form, folder):
    make_phantom(form, folder, size=SIZES[form]["tiny"], config=PhantomConfig(snr=1.0), embed=embed)
    return folder


def read_tree(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def compare(form, bucket, tmp_path):
    """Preprocess from a folder and from a bucket; what is written may differ in the names of places alone."""
    here = make(form, tmp_path / "data")
    there = remote.take_address(bucket.fill(here, "data"))
    names = []
    for root, out in ((here, tmp_path / "here"), (there, tmp_path / "there")):
        config = configure(form, root)
        names.append(config.hash_inputs())
        out.mkdir()
        preprocess(config, out)
    assert len(names[0]) == len(names[1])
    found, expected = read_tree(tmp_path / "there"), read_tree(tmp_path / "here")
    assert set(found) == set(expected)
    differ = {name for name in found if found[name] != expected[name]}
    assert differ <= {"stimuli/stimuli.json", "responses/meta.json"}
    return tmp_path / "here", tmp_path / "there"


@pytest.mark.slow
@pytest.mark.parametrize("form", LOADERS)
def test_every_layout_is_read_from_a_bucket(form, bucket, tmp_path):
    compare(form, bucket, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "config"), [("bids-eeg", "bids_meeg_ridge"), ("nsd", "nsd_ridge")])
def test_a_whole_run_from_a_bucket_equals_the_local_one(
    form, config, bucket, tmp_path, command_line, monkeypatch
):
    """Through a cache that holds a part of the data set, so that files come and go while the run reads them."""
    here = make(form, tmp_path / "data")
    address = bucket.fill(here, "data")
    sizes = [
        path.stat().st_size for path in here.rglob("*") if path.is_file() and "phantom_truth" not in str(path)
    ]
    monkeypatch.setenv("BRAINDECODE_VIS_REMOTE_GIB", str(max(3 * max(sizes), sum(sizes) // 3) / 2**30))
    for root, out in ((here, "here"), (address, "there")):
        said = command_line("run", config, "--root", root, "--out", tmp_path / out, *FEW)
        assert said.returncode == 0, said.stderr
    assert "on servers by what they say of them" in said.stdout
    scores = [pd.DataFrame(read_scores(tmp_path / out)) for out in ("here", "there")]
    assert set(scores[0].pop("fingerprint")).isdisjoint(scores[1].pop("fingerprint"))  # of the inputs too
    pd.testing.assert_frame_equal(*scores, check_exact=True)
    predictions = [sorted((tmp_path / out).rglob("retrieve/*/*.npy")) for out in ("here", "there")]
    for one, other in zip(*predictions, strict=True):
        assert np.array_equal(np.load(one), np.load(other))
    # Finished stages are taken as they are, with nothing in the cache.
    shutil.rmtree(tmp_path / "remote")
    stages = set((tmp_path / "there/stages").glob("*/*"))
    assert command_line("run", config, "--root", address, "--out", tmp_path / "there", *FEW).returncode == 0
    assert set((tmp_path / "there/stages").glob("*/*")) == stages
    # Not the address itself, but the run folder asks: that needs consent, and what reads no data set does not.
    refused = command_line("run", tmp_path / "there", *FEW)
    assert (refused.returncode, "pass --allow-download" in refused.stderr) == (2, True)
