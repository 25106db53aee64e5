"""A scan decoded while it runs: as the run decodes a scan that ended there, and what differs is named."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.config import read_config
from braindecode_vis.datasets.bids.fmri_dataset import BidsFmriConfig
from braindecode_vis.datasets.sources.bold_source import GlmByVoxelConfig, GlmConfig, WindowConfig
from braindecode_vis.parts.live.opening import open_session
from braindecode_vis.parts.live.recording import BidsRecorder
from braindecode_vis.parts.live.stream_roles import Chunk, Listener, Marker, StreamInfo
from braindecode_vis.parts.live.volume_decoder import VolumeDecoder, _describe_differences
from braindecode_vis.parts.live.volumes import find_scan, write_volumes
from braindecode_vis.parts.phantom.formats import bids_fmri as phantom
from braindecode_vis.pipeline.finished_run import open_finished
from braindecode_vis.pipeline.learning import train
from braindecode_vis.pipeline.new_trials import read_new
from braindecode_vis.pipeline.predicting import predict
from braindecode_vis.pipeline.runs import open_run
from braindecode_vis.preprocessing.glm import make_regressors
from tests.parts.live.scripted import ChunkSource

AFFINE = np.array([[-4.0, 0, 0, 20], [0, 4, 0, -30], [0, 0, 4, -10], [0, 0, 0, 1]])
SHAPE, T_R, SIDE, N_TRAIN, N_TEST, SOA = (6, 6, 5), 2.0, 6, 24, 6, 8.0
MASK = np.zeros(SHAPE, bool)
MASK[1:-1, 1:-1, 1:-1] = True
DRAW = np.random.default_rng(3)
PIXELS = DRAW.integers(0, 256, (N_TRAIN + N_TEST, SIDE, SIDE, 1)).repeat(3, axis=3).astype(np.uint8)
WEIGHTS = DRAW.normal(size=(SIDE * SIDE, int(MASK.sum())))


def make_scan(pictures, seed):
    draw = np.random.default_rng(seed)
    onsets = 6.0 + SOA * np.arange(len(pictures)) + draw.uniform(0, 1, len(pictures)).round(1)
    events = pd.DataFrame({"onset": onsets, "duration": 1.0, "trial_type": "picture"})
    events["stimulus_id"] = [f"p{n:02d}" for n in pictures]
    events["stim_file"] = events["stimulus_id"] + ".png"
    n = int(np.ceil((onsets[-1] + 16) / T_R))
    values = (PIXELS[pictures][..., 0].reshape(len(pictures), -1) / 255 - 0.5) @ WEIGHTS
    series = 1000 + 10 * make_regressors(events, T_R * np.arange(n)) @ values
    series += 5 * np.cos(np.pi * np.arange(n)[:, None] / n) + draw.normal(size=series.shape)
    volumes = np.zeros((n, *SHAPE), np.float32)
    volumes[:, MASK] = series
    return volumes, events


def write_scan(root, pictures, seed, run):
    volumes, events = make_scan(pictures, seed)
    return phantom.write_run(
        root, "01", iter(volumes), events, pd.DataFrame({"csf": np.zeros(len(volumes))}), MASK,
        n_volumes=len(volumes), affine=AFFINE, t_r=T_R, run=run,
    )  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    phantom.write_dataset(folder, pd.DataFrame({"participant_id": ["sub-01"]}))
    (folder / "stimuli").mkdir()
    for n, image in enumerate(PIXELS):
        Image.fromarray(image).save(folder / "stimuli" / f"p{n:02d}.png")
    draw = np.random.default_rng(5)
    for number in range(2):
        write_scan(folder, draw.permutation(N_TRAIN), number, f"{number + 1:02d}")
    write_scan(folder, np.tile(N_TRAIN + np.arange(N_TEST), 2), 9, "03")
    (folder / "tested.txt").write_text("\n".join(f"p{N_TRAIN + n:02d}.png" for n in range(N_TEST)))
    return folder


def make_run(root, folder, *settings):
    config = read_config(
        "bids_fmri_ridge",
        [
            "dataset.min_test_repetitions=null", f"dataset.test_list={root / 'tested.txt'}",
            f"target={{kind: pixels, size: {SIDE}}}", "encoder={kind: ridge, alphas: [1.0, 100.0]}",
            "generator={kind: latents}", "repeats.train=averaged", "evaluation.features=null", *settings,
        ],
        root=root,
    )  # fmt: skip
    train(open_run(config, folder))
    return open_finished(folder)


MODELS = {"glm": "dataset.model={kind: glm}", "window": "dataset.model={kind: window, start: 4.0, stop: 8.0}"}


@pytest.fixture(scope="module", params=["glm", "window"])
def run(request, root, tmp_path_factory):
    return make_run(root, tmp_path_factory.mktemp(request.param) / "run", MODELS[request.param])


class Heard(Listener):
    def __init__(self):
        self.decisions, self.told = [], []

    def decide(self, decision):
        self.decisions.append(decision)

    def tell(self, sentence, level="info"):
        self.told.append(sentence)


def test_a_scan_that_is_written_is_decoded_recorded_and_decoded_again(run, root, tmp_path):
    """What the session recorded gives the run's own offline predictions; they agree but for what was not there yet."""
    image = next(root.rglob("*run-03_space-*_bold.nii.gz"))
    table = next(root.rglob("*run-03_events.tsv"))
    assert find_scan(run) == (image, table)
    for _ in write_volumes(image, tmp_path / "scan", events=table, speed=np.inf):
        pass
    heard, told = Heard(), []
    recorder = BidsRecorder.for_run(run, tmp_path / "kept", notify=lambda text, level: told.append(text))
    session = open_session(
        run, str(tmp_path / "scan"), source="folder", listeners=[recorder, heard],
        source_options={"markers": tmp_path / "scan" / "events.tsv", "idle": 0.05, "patience": 0},
    )  # fmt: skip
    summary = session.run()
    assert summary["n_decisions"] == 2 * N_TEST
    assert not summary["n_lost"]
    assert "nothing fitted on it" in summary["protocol"]
    assert summary["scores"]["top1"]["value"] > 0.8, summary["scores"]  # chance is a sixth
    new = read_new(run, tmp_path / "kept", tmp_path / "work")
    offline = predict(run, new)
    assert len(offline.ranks)
    assert (offline.ranks["rank"] == 1).mean() > 0.8
    # Offline, repetitions are averaged as in the run's own test, and the whole scan is known.
    live = np.stack([d.embedding for d in heard.decisions]).reshape(2, N_TEST, -1).mean(axis=0)
    order = [str(i) for i in offline.embeddings.ids]
    expected = np.asarray(offline.embeddings.vectors)[
        [order.index(d.shown) for d in heard.decisions[:N_TEST]]
    ]
    agreement = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(live, expected, strict=True)])
    assert agreement > 0.9, agreement


def test_a_decision_is_that_of_the_scan_that_ended_there(run, root, tmp_path):
    """The same volumes, the run's own preprocessing of them: the same embedding."""
    pictures, heard = N_TRAIN + np.arange(N_TEST), Heard()
    volumes, events = make_scan(pictures, 11)
    decoder = VolumeDecoder(run)
    last = 0 * len(decoder.open(StreamInfo("x", "fmri", (), 1 / T_R, "", "events")))
    for row in events.itertuples():
        last = max(last, decoder.scan.find_last(row.onset, 1.0))
    markers = tuple(Marker(row.onset, row.stimulus_id) for row in events.itertuples())
    chunks = [
        Chunk(volumes[[n]][:, MASK].T, np.array([T_R * n]), markers if n == 0 else ())
        for n in range(last + 1)
    ]
    info = StreamInfo("x", "fmri", (), 1 / T_R, "", "events")
    open_session(run, ChunkSource(info, chunks), listeners=[heard]).run()
    phantom.write_dataset(tmp_path / "cut", pd.DataFrame({"participant_id": ["sub-01"]}))
    phantom.write_run(
        tmp_path / "cut", "01", iter(volumes[: last + 1]), events, pd.DataFrame({"csf": np.zeros(last + 1)}), MASK,
        n_volumes=last + 1, affine=AFFINE, t_r=T_R, session="09",
    )  # fmt: skip
    new = read_new(run, tmp_path / "cut", tmp_path / "work", overrides=["dataset.test_list=null"])
    expected = predict(run, new).embeddings
    shown = heard.decisions[-1]
    assert str(expected.ids[-1]) == shown.shown == "p29"
    np.testing.assert_allclose(
        shown.embedding, expected.vectors[-1], rtol=1e-3, atol=1e-3 * np.abs(expected.vectors).max()
    )


@pytest.mark.parametrize("keep", ["mean", "times"])
def test_a_person_with_fewer_voxels_than_the_run_has_zeros_behind(keep):
    """Responses of several people in one run are as wide as those with the most voxels."""
    rows = np.arange(1.0, 7.0).reshape(2, 3)  # two volumes or rows of three voxels
    stored = SimpleNamespace(own=SimpleNamespace(data=np.zeros((4, 5))))
    decoder = SimpleNamespace(
        model=WindowConfig(keep=keep), geometry=SimpleNamespace(parcels=None), judge=stored
    )
    found = VolumeDecoder.shape_response(decoder, rows)
    if keep == "times":
        found = found[0].T
    np.testing.assert_array_equal(found, [[1, 2, 3, 0, 0], [4, 5, 6, 0, 0]])


def test_what_does_not_fit_is_said_in_a_sentence(run, tmp_path):
    decoder = VolumeDecoder(run)
    with pytest.raises(DataError, match="choose another"):
        decoder.open(StreamInfo("x", "eeg", ("O1",), 100.0))
    with pytest.raises(DataError, match="repetition time of 1 s"):
        decoder.open(StreamInfo("x", "fmri", (), 1.0))
    notes = decoder.open(StreamInfo("x", "fmri", (), 1 / T_R))
    assert any("No events were given" in note for note in notes)
    with pytest.raises(DataError, match="sent 3 voxels"):
        list(decoder.feed(Chunk(np.ones((3, 1)), np.zeros(1))))
    with pytest.raises(ConfigError, match="every applies to streams of channels"):
        open_session(run, str(tmp_path), source="folder", every=1.0)
    values = np.ones((int(MASK.sum()), 1), np.float32)
    marker = Marker(2.0, "p24")
    found = list(decoder.feed(Chunk(values, np.zeros(1), (marker, marker, Marker(3.0, "who")))))
    assert any("came twice" in text for text in found)
    assert any("has no picture" in text for text in found)
    assert any("after one of" in text for text in decoder.feed(Chunk(values, np.zeros(1))))
    lost = list(decoder.flush())
    assert [d.lost.split(":")[0] for d in lost] == ["end", "end"]


def test_a_model_chosen_by_voxel_gives_way_to_a_canonical_response():
    config = BidsFmriConfig(root=".", model=GlmByVoxelConfig())
    notes = _describe_differences(config, GlmConfig())
    assert any("here every voxel has the canonical response" in note for note in notes)
