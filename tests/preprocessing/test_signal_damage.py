"""What no brain and no machine gives is found while trials are read: reported up to a bound, refused above it."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base import store
from braindecode_vis.base.arrays import Recording
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.datasets.bold5000 import Bold5000Config
from braindecode_vis.datasets.haxby_slices import HaxbySlicesConfig
from braindecode_vis.datasets.nod import NodConfig
from braindecode_vis.datasets.sources.betas_source import BetasPart, BetasPlan, FmriSource, Geometry
from braindecode_vis.datasets.sources.cleaning_options import Cleaning
from braindecode_vis.datasets.sources.meeg_source import ContinuousPart, EpochedPart, EpochPlan, MeegSource
from braindecode_vis.datasets.things_eeg2.dataset import ThingsEeg2Config
from braindecode_vis.datasets.things_meg.dataset import ThingsMegConfig
from braindecode_vis.preprocessing.betas import write_fmri_source
from braindecode_vis.preprocessing.meeg import write_meeg, write_source
from braindecode_vis.preprocessing.signal_damage import (
    DamageWatch,
    find_held_runs,
    make_watch,
    settle_blank_images,
    settle_missing,
)

NAMES = ("O1", "Oz", "O2", "Pz", "P3")
N = 200


def list_images(n=N):
    ids = [f"image{i}" for i in range(n)]
    return StimulusSet(pd.DataFrame({"stimulus_id": ids, "concept": ids, "path": "", "sha256": ""}))


def make_table(n=N):
    return pd.DataFrame(
        {"subject": "01", "session": "01", "run": "01", "stimulus_id": [f"image{i}" for i in range(n)],
         "repetition": 0, "split": "train", "concept": [f"image{i}" for i in range(n)]}
    )  # fmt: skip


@pytest.fixture
def recording():
    """200 events of 63 s at 250 Hz in volt: channels that share slow waves."""
    rng = np.random.default_rng(0)
    signal = rng.standard_normal((len(NAMES), 64 * 250)).cumsum(axis=1) * 1e-7
    signal += rng.standard_normal(signal.shape) * 1e-5
    return signal, 250 + 75 * np.arange(N)


def open_recording(signal, onsets, **plan):
    events = make_table(len(onsets)).assign(sample=onsets, onset=onsets / 250.0)
    columns = ["sample", "onset", "stimulus_id", "concept", "split", "repetition"]
    held = Recording("01", "01", "01", "eeg", (Path("raw.vhdr"),), events[columns])
    part = ContinuousPart(held, NAMES, 250.0, signal.shape[1], lambda a, b: signal[:, a:b])
    wanted = EpochPlan(tmin=0.0, tmax=0.4, window=(0.0, 0.4), baseline=None, mvnn="none", **plan)
    return MeegSource("eeg", (part,), list_images(), wanted, "V")


def write_recording(folder, signal, onsets, **plan):
    write_source(
        open_recording(signal, onsets, **plan), folder, scratch=folder / "scratch",
        watch=DamageWatch(most=plan.get("max_dropped", 0.01)),
    )  # fmt: skip
    return read_damage(folder)


def write_epochs(folder, data):
    part = EpochedPart(
        make_table(len(data)), (Path("x.npy"),), NAMES, np.arange(data.shape[2]) / 100, lambda a, b: data[a:b]
    )
    plan = EpochPlan(sfreq=100.0, tmin=0.0, tmax=1.0, window=(0.0, 1.0), baseline=None, mvnn="none")
    write_source(
        MeegSource("eeg", (part,), list_images(), plan, "whitened"), folder, scratch=folder / "scratch"
    )
    return read_damage(folder)


def write_betas(folder, blocks, **plan):
    parts = tuple(
        BetasPart(
            make_table(len(data)).assign(session=f"{n:02d}"), (Path(f"betas{n}.nii"),), data.shape[1],
            lambda a, b, data=data: data[a:b],
        )
        for n, data in enumerate(blocks, start=1)
    )  # fmt: skip
    geometry = Geometry(np.arange(blocks[0].shape[1]))
    write_fmri_source(
        FmriSource(parts, list_images(), BetasPlan(zscore="none"), "percent", geometry), folder,
        watch=DamageWatch(**plan),
    )  # fmt: skip
    return read_damage(folder)


def read_damage(folder):
    meta = store.read_json(folder / "responses" / "meta.json")
    found = meta["provenance"].get("damage", [])
    # Whatever was found is in the report, through the warnings that travel with the trials.
    assert len(meta["coords"].get("warnings", [])) == len(found)
    return found


def test_sound_recordings_pass_without_a_word(tmp_path, recording):
    signal, onsets = recording
    assert write_recording(tmp_path / "a", signal, onsets) == []
    # Digitised, as converters with few bits do, and padded with zeros where no event is.
    coarse = np.round(signal / 5e-6) * 5e-6
    padded = np.concatenate([coarse, np.zeros((len(NAMES), 50_000))], axis=1)
    assert write_recording(tmp_path / "b", padded, onsets) == []
    rng = np.random.default_rng(1)
    assert write_epochs(tmp_path / "c", rng.standard_normal((N, 5, 100)).astype(np.float32)) == []
    assert write_epochs(tmp_path / "d", rng.standard_normal((1, 5, 100)).astype(np.float32)) == []
    assert write_epochs(tmp_path / "e", rng.integers(0, 2, (N, 5, 1)).astype(np.float32)) == []
    betas = rng.standard_normal((60, 400)).astype(np.float32)
    masked = np.where(np.arange(400) % 10, betas, 0)  # a tenth lies outside the brain
    assert [d["refused"] for d in write_betas(tmp_path / "f", [masked])] == [False]
    assert write_betas(tmp_path / "g", [np.round(betas * 2)]) == []
    assert write_betas(tmp_path / "h", [(betas > 0).astype(np.float32)]) == []
    assert write_betas(tmp_path / "i", [betas[:1], betas[1:2], betas[2:]]) == []


def test_half_a_recording_of_zeros_is_refused_and_a_moment_is_told(tmp_path, recording):
    """Half of an official test file was overwritten with zeros, and the run ended with a score."""
    signal, onsets = recording
    damaged = signal.copy()
    damaged[:, 8000:] = 0
    with pytest.raises(
        DataError, match=r"session 01, file raw.vhdr: 9\d of 200 trials .* first image10\d at 3"
    ) as held:
        write_recording(tmp_path / "a", damaged, onsets)
    assert "fetch it again" in str(held.value)
    found = write_recording(tmp_path / "b", damaged, onsets, max_dropped=0.6)
    assert found[0]["n"] > 90
    moment = signal.copy()
    moment[:, 5000:5030] = moment[:, 5000:5001]  # 120 ms of the last value, as when packets are lost
    (told,) = write_recording(tmp_path / "c", moment, onsets, max_dropped=0.02)
    assert told["n"] in (1, 2, 3)
    assert not told["refused"]


def test_filters_hide_nothing(tmp_path, recording):
    """Behind a filter or a reference zeros are no constant any more, so they are looked for before."""
    signal, onsets = recording
    signal[:, 8000:] = 0
    with pytest.raises(DataError, match="do not change in many places"):
        write_recording(tmp_path, signal, onsets, cleaning=Cleaning(l_freq=5.0))


def test_channels_that_end_early_or_are_clipped_are_told(tmp_path, recording):
    signal, onsets = recording
    signal[3, 4000:] = 0
    signal[1] = np.clip(np.sin(np.arange(signal.shape[1]) / 300) * 1e-3, -1e-4, 1e-4)
    found = write_recording(tmp_path, signal, onsets)
    assert [("flat" in f["what"], "clipped" in f["what"]) for f in found] == [(True, False), (False, True)]
    assert re.search(r"1 channel\(s\) .* Pz 7\d\.", found[0]["what"])  # of the time that trials are cut from
    assert "Oz" in found[1]["what"]


def test_how_long_a_channel_may_be_flat_and_clipped():
    """Amplifiers reach their end now and then; a channel that lies still for a tenth of that time is broken."""
    rng = np.random.default_rng(0)
    told = {}
    for n_bad in (1, 3):  # of 20 stretches of two seconds
        watch = DamageWatch()
        for number in range(20):
            signal = rng.standard_normal((3, 500))
            if number < n_bad:
                signal[0] = np.clip(30 * np.sin(np.arange(500) / 20), -1, 1)
                signal[1] = 0
            watch.look_at_samples("a file", ("O1", "Oz", "O2"), signal, number * 500, 250.0)
        watch.settle_channels("a file")
        told[n_bad] = [finding.what for finding in watch.findings]
    flat, clipped = (
        "1 channel(s) are flat for a part of the time: Oz",
        "1 channel(s) are clipped for a part of the time: O1",
    )
    assert told == {1: [f"{flat} 5.0%"], 3: [f"{flat} 15.0%", f"{clipped} 15.0%"]}


def test_settings_of_a_data_set_say_how_much_damage_is_too_much(tmp_path, recording):
    signal, onsets = recording
    signal[:, 8000:] = 0
    for most in (0.6, 0.01):
        config = SimpleNamespace(
            open_epochs=lambda scratch: open_recording(signal, onsets, max_dropped=0.6), max_dropped=most
        )
        if most > 0.5:
            write_meeg(config, tmp_path)
            assert read_damage(tmp_path)[0]["n"] > 90
        else:
            with pytest.raises(DataError, match="do not change in many places"):
                write_meeg(config, tmp_path)


def test_units_that_no_brain_has_are_told(tmp_path, recording):
    signal, onsets = recording
    (found,) = write_recording(tmp_path, signal * 1e6, onsets)
    assert "another unit" in found["what"]


@pytest.mark.parametrize("change, message", [
    (lambda x: x.__setitem__(slice(100, None), 0), "100 of 200 trials .* 100 have one constant value"),
    (lambda x: x.__setitem__((slice(100, None), slice(0, 3)), 0), "100 do not change in many places"),
    (lambda x: x.__setitem__(slice(100, None), x[:100].copy()), r"copies of rows with another image .* "
        r"image100, .* copy of image0"),
    (lambda x: x.__setitem__(slice(150, None), 1e30), "reach more than 10000 times|have one constant value"),
    (lambda x: x[170:].__imul__(1e9), "30 reach more than 10000 times"),
])  # fmt: skip
def test_damaged_epochs_are_refused(tmp_path, change, message):
    data = np.random.default_rng(0).standard_normal((N, 5, 100)).astype(np.float32)
    change(data)
    with pytest.raises(DataError, match=message):
        write_epochs(tmp_path, data)


def test_two_damaged_epochs_are_told(tmp_path):
    data = np.random.default_rng(0).standard_normal((N, 5, 100)).astype(np.float32)
    data[[7, 90]] = 0
    (found,) = write_epochs(tmp_path, data)
    assert (found["n"], found["of"], found["refused"]) == (2, 200, False)
    assert "the first image7, trial 8 of the file, the last image90" in found["what"]


def test_a_single_damaged_epoch_is_named_once(tmp_path):
    data = np.random.default_rng(0).standard_normal((N, 5, 100)).astype(np.float32)
    data[7] = 0
    (found,) = write_epochs(tmp_path, data)
    assert found["what"].endswith("1 have one constant value (the first image7, trial 8 of the file)")


def test_a_channel_that_is_flat_for_a_part_of_a_stretch_is_told():
    """Zeros in 61 % of a channel were reported by nothing, since the stretch that was read did not hold zeros alone."""
    watch = DamageWatch()
    signal = np.random.default_rng(0).standard_normal((3, 5100))
    signal[1, 1200:2300] = 0
    low, high = watch.look_at_samples("a file", ("O1", "Oz", "O2"), signal, 0, 250.0)
    np.testing.assert_array_equal([low, high], [signal.min(axis=1), signal.max(axis=1)])
    watch.settle_channels("a file")
    (found,) = watch.findings
    assert found.what == "1 channel(s) are flat for a part of the time: Oz 20.7%"


def test_a_channel_that_is_flat_at_the_end_of_a_short_recording_is_told():
    """Zeros in 15 of 34 channels for the last 0.8 s of 3 s went untold; whole seconds were looked at."""
    watch = DamageWatch()
    signal = np.random.default_rng(0).standard_normal((3, 620))
    signal[1, 412:] = 0
    watch.look_at_samples("a file", ("O1", "Oz", "O2"), signal, 0, 256.0)
    watch.settle_channels("a file")
    (found,) = watch.findings
    assert found.what.startswith("1 channel(s) are flat for a part of the time: Oz")


def test_a_single_copied_epoch_is_named_with_the_one_that_it_is_of(tmp_path):
    data = np.random.default_rng(0).standard_normal((N, 5, 100)).astype(np.float32)
    data[7] = data[3]
    (found,) = write_epochs(tmp_path, data)
    assert found["what"].endswith("(the first image7, trial 8 of the file, a copy of image3)")


def test_a_channel_that_is_flat_in_some_epochs_is_told_and_in_all_refused(tmp_path):
    data = np.random.default_rng(0).standard_normal((N, 5, 100)).astype(np.float32)
    data[:10, 3] = 0.5  # below the largest values of the others
    (found,) = write_epochs(tmp_path / "some", data)
    assert found["what"] == "1 channel(s) are flat for a part of the trials: Pz 5.0%"
    data[:, 3] = 0.5
    with pytest.raises(DataError, match=r"the channel\(s\) Pz are flat throughout"):
        write_epochs(tmp_path / "all", data)


def test_damaged_betas_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    betas = rng.standard_normal((60, 400)).astype(np.float32)
    zeroed, copied, slab = betas.copy(), betas.copy(), betas.copy()
    zeroed[30:, 100:] = 0
    copied[30:] = betas[:30]
    slab[:, 200:] = 0
    with pytest.raises(DataError, match="30 do not change in many places"):
        write_betas(tmp_path / "a", [zeroed])
    with pytest.raises(DataError, match=r"30 are copies .* image30, trial 31 of the file, a copy of image0"):
        write_betas(tmp_path / "b", [copied])
    with pytest.raises(DataError, match="50% of the features never change: "):
        write_betas(tmp_path / "c", [slab])
    with pytest.raises(
        DataError, match=r"session 02, .* 50% of the features never change here, but do in other"
    ):
        write_betas(tmp_path / "d", [betas, slab + np.where(slab == 0, 0, rng.standard_normal(slab.shape))])
    (found,) = write_betas(tmp_path / "e", [slab], most_constant=1.0)
    assert found["n"] == 200
    few = betas.copy()
    few[:, 100:116] = 0  # zeros over 86 of 1880 voxels of THINGS-fMRI, 4.6 %, were told of by nobody
    (found,) = write_betas(tmp_path / "f", [few])
    assert (found["n"], found["of"], found["refused"]) == (16, 400, False)


def test_averages_that_a_publisher_repeats_are_no_copies(tmp_path):
    betas = np.random.default_rng(0).standard_normal((30, 400)).astype(np.float32)
    parts = [betas, betas]  # both sessions show the same images
    assert write_betas(tmp_path, parts) == []


def test_pictures_of_one_colour_are_refused(tmp_path):
    """A stimulus file whose half was overwritten has black pictures."""
    betas = np.random.default_rng(1).standard_normal((20, 30))
    part = BetasPart(make_table(20), (Path("b.nii"),), 30, lambda a, b: betas[a:b])
    plan, geometry = BetasPlan(zscore="none"), Geometry(np.arange(30))
    source = FmriSource((part,), list_images(20), plan, "percent", geometry)
    pictures = np.random.default_rng(0).integers(0, 255, (20, 8, 8, 3), dtype=np.uint8)
    pictures[10:] = 0
    with pytest.raises(DataError, match="10 of 20 pictures are the same colour"):
        write_fmri_source(replace(source, read_image=lambda row: pictures[row]), tmp_path)


def test_an_experiment_may_show_each_colour_once():
    watch = DamageWatch()
    settle_blank_images([0, 128, 255], 20, watch)
    settle_blank_images([], 20, watch)
    assert watch.findings == []
    settle_blank_images([0, 128, 0], 200, watch)
    assert watch.describe() == ["the pictures: 2 of 200 pictures are the same colour throughout."]


def list_parts(sessions, runs=("01",), subject="01"):
    trials = pd.DataFrame({"run": list(runs)})
    return [SimpleNamespace(group=(subject, session), trials=trials) for session in sessions]


def settle(config, parts, **options):
    watch = DamageWatch(**options)
    settle_missing(config, parts, watch)
    return watch.findings


def test_missing_sessions_of_a_known_set_are_refused():
    """A session that was not fetched left a smaller set, which was reported and trained on."""
    config = ThingsEeg2Config(root=Path("nowhere"))
    parts = list_parts(("01", "02", "04"))
    with pytest.raises(DataError) as caught:
        settle(config, parts)
    assert str(caught.value) == (
        "subject 01 below nowhere: 3 of 4 declared sessions are read, without 03, so the data would be "
        "smaller than THINGS-EEG2; fetch the missing files, or choose what to read with --set dataset.sessions=[...]."
    )
    # A check goes on, to name all that is missing.
    (found,) = settle(config, parts, refuses=False)
    assert (found.n, found.of, found.refused) == (1, 4, True)
    # A choice of sessions stands in the configuration, and what it leaves out in the report.
    (found,) = settle(config.model_copy(update={"sessions": (1, 2, 4)}), parts)
    assert not found.refused
    assert found.describe() == "subject 01: 3 of 4 declared sessions are read, without 03"
    assert settle(config, list_parts(("01", "02", "03", "04"))) == []
    # Published epochs may have lost their sessions, and a subject that is not there is nobody's session.
    assert settle(config, list_parts(("all",))) == []


def test_missing_runs_are_refused_unless_a_choice_leaves_them_out():
    every = [f"{n:02d}" for n in range(1, 16)]
    config = Bold5000Config(root=Path("nowhere"))
    held = list_parts(every, [f"{n:02d}" for n in range(1, 10)], "CSI1")
    found = settle(config, held, refuses=False)
    # Sessions of this subject have nine or ten runs.
    assert [finding.what.split("session ")[1] for finding in found] == [
        f"{session} are read, without 10" for session in ("01", "02", "03", "05", "07", "10", "15")
    ]
    with pytest.raises(DataError, match=r"9 of 10 declared runs of session 01 .* or --set dataset.skip"):
        settle(config, held)
    assert not any(f.refused for f in settle(config.model_copy(update={"skip": ("run-10",)}), held))
    with pytest.raises(DataError, match="without 05"):
        settle(HaxbySlicesConfig(), list_parts(("01",), [str(n) for n in (*range(1, 5), *range(6, 13))]))


def test_only_sessions_of_the_tasks_that_are_read_are_asked_for():
    coco = list_parts(("coco",), [str(n) for n in range(1, 12)], "02")
    assert settle(NodConfig(root=Path("nowhere"), tasks=("coco",)), coco) == []
    with pytest.raises(DataError, match="1 of 5 declared sessions are read, without imagenet01, imagenet02"):
        settle(NodConfig(root=Path("nowhere")), coco)
    single = list_parts(("imagenet01",), [f"{n:02d}" for n in range(1, 11)], "30")
    assert settle(NodConfig(root=Path("nowhere")), single) == []


def test_a_session_whose_trials_are_left_out_is_there():
    """A session may have no trials left."""
    recording = SimpleNamespace(subject="01", session="04", run="01")
    empty = SimpleNamespace(group=("01", "04"), recording=recording, trials=pd.DataFrame())
    assert settle(ThingsEeg2Config(root=Path("nowhere")), [*list_parts(("01", "02", "03")), empty]) == []


def test_a_simulated_set_may_be_smaller(tmp_path):
    (tmp_path / "phantom_truth").mkdir()
    assert settle(ThingsMegConfig(root=tmp_path), list_parts(("01",))) == []


def test_runs_are_found_wherever_they_begin():
    rng = np.random.default_rng(0)
    for start in range(0, 60):
        signal = rng.standard_normal((4, 100))
        signal[:3, start : start + 13] = 1.0  # most channels, not all
        assert find_held_runs(signal, np.zeros(4, bool), 13) == [(start, start + 13)]
        signal[:3, start + 12] = 2.0
        assert find_held_runs(signal, np.zeros(4, bool), 13) == []
    assert find_held_runs(np.zeros((2, 50)), np.ones(2, bool), 8) == [(0, 50)]


@pytest.mark.parametrize(
    ("settings", "most_constant"),
    [
        ({}, 0.25), ({"mask": "none"}, 0.25), ({"mask_file": None, "mask": "box"}, 0.25),
        ({"mask": "brain"}, 1.0), ({"mask": "varying"}, 1.0), ({"mask_file": "mask.nii.gz"}, 1.0),
    ],
)  # fmt: skip
def test_whoever_names_a_mask_may_have_voxels_that_never_change(settings, most_constant):
    assert make_watch(SimpleNamespace(**settings)).most_constant == most_constant


@pytest.mark.parametrize(
    ("fields", "remedy"),
    [
        ((), "fetch it again"),
        (("subjects", "runs"), "fetch it again, or leave it out with --set dataset.runs=[...]"),
        (("subjects", "sessions"), "fetch it again, or leave it out with --set dataset.sessions=[...]"),
        (("max_dropped",), "fetch it again, or keep such trials by increasing dataset.max_dropped"),
    ],
)
def test_a_remedy_is_a_setting_that_the_data_set_has(fields, remedy):
    settings = type("Settings", (), {"model_fields": dict.fromkeys(fields), "max_dropped": 0.2})()
    watch = make_watch(settings, refuses=False)
    assert (watch.remedy, watch.most, watch.refuses) == (remedy, 0.2, False)
    assert make_watch(SimpleNamespace()) == DamageWatch()
