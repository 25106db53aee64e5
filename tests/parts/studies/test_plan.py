"""What a run will take: sizes of data that are here or were published, pieces that grow, runs that share."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.cli import main
from braindecode_vis.config import read_config
from braindecode_vis.datasets import trial_values
from braindecode_vis.datasets.manifests import find_manifest
from braindecode_vis.parts.studies import plan, plan_pictures, plan_pieces
from braindecode_vis.parts.studies.plan import RunPlan, plan_runs
from braindecode_vis.parts.studies.plan_pieces import PieceCost, Step, extrapolate
from braindecode_vis.parts.studies.run_sizes import RunSizes, find_sizes
from tests.datasets.test_bids_fmri import write_run
from tests.parts.phantom.tiny import make_tiny

QUICK = [
    "evaluation.n_bootstrap=100",
    "evaluation.n_permutations=100",
    "dataset.n_train=40",
    "dataset.n_test=20",
]


def test_sizes_come_from_the_data_where_they_are_there():
    sizes, _ = find_sizes(read_config("synthetic_digits", QUICK))
    assert sizes.is_there
    assert (sizes.n_stored, sizes.shape, sizes.n_train, sizes.n_test, sizes.n_folds) == (
        60,
        (300,),
        40,
        20,
        1,
    )


def test_sizes_of_time_series_are_those_of_the_responses_that_will_be_computed(tmp_path):
    """A plan of time series ended in a traceback, as those have runs and no parts until they are modelled."""
    for run in ("01", "02"):
        write_run(tmp_path, f"sub-01_task-look_run-{run}")
    options = ["dataset.mask=varying", "dataset.concept_pattern='^(\\w+)/'", "dataset.zscore=none"]
    split = ["split.kind=kfold", "split.n_folds=2"]
    config = read_config("bids_fmri_ridge", [*options, *split], root=tmp_path)
    sizes, source = find_sizes(config)
    assert (sizes.n_stored, sizes.shape, sizes.n_images, sizes.n_folds) == (8, (18,), 4, 2)
    step = plan._plan_preprocess(config, sizes, source, lambda words: None)
    assert "measured 4 trials" in step.how
    assert step.disk == 8 * 18 * 4


def test_sizes_come_from_what_was_published_without_data(tmp_path):
    sizes, source = find_sizes(read_config("things_eeg2_ridge", ["dataset.subjects=[1, 2]"]))
    assert source is None
    assert not sizes.is_there
    assert sizes.shape == (17, 250)
    assert sizes.n_stored == 2 * (16540 * 4 + 200 * 80)
    assert (sizes.n_train, sizes.n_train_images, sizes.n_test, sizes.n_images) == (33080, 16540, 400, 16740)
    single, _ = find_sizes(read_config("things_eeg2_atm_vith", ["dataset.subjects=[8]"]))
    assert (single.shape, single.n_train, single.n_test) == ((63, 250), 66160, 200)
    nsd, _ = find_sizes(read_config("nsd_ridge"))
    assert (nsd.shape, nsd.n_stored, nsd.n_images, nsd.image_px) == ((15724,), 30000, 10000, 425)
    # A run of published data has one subject, unless it leaves out one at a time or all are asked for.
    whole = ["things_eeg2_atm_vith", "things_eeg2_loso_tsconv", "nsd_ridge", "mosaic_wave"]
    counted = [
        [len(find_sizes(read_config(name), every_subject=n)[0].subjects) for n in (False, True)]
        for name in whole
    ]
    # Parcels are the same in all people. An atlas that is named later has some hundred regions, and no voxels.
    assert counted == [[1, 10], [10, 10], [1, 1], [93, 93]]
    parcels = find_sizes(read_config("mosaic_wave"))[0]
    assert (parcels.shape, "; 400 regions" in parcels.origin) == ((400,), True)
    assert find_sizes(read_config("god_in_context"))[0].n_train == 4 * 1200
    with pytest.raises(ConfigError, match=r"cannot be opened.*does not give number and shape"):
        find_sizes(read_config("nsd_ridge", ["dataset.mask=cortex"]))


def test_a_range_is_no_wider_than_a_factor_of_four_unless_the_power_of_a_fit_is_not_known():
    """Ranges of a factor of ten and more said nothing, and those of early stopping a factor of 40."""
    for seconds in (0.01, 0.5, 2.0, 30.0):
        for ratio in (1.0, 8.0, 1e3, 1e6):
            pieces = [PieceCost(1.0, seconds / 2), PieceCost(2.0, seconds)]
            step = plan_pieces.make_step("embed", pieces, 2.0 * ratio, "pieces")
            assert step.low <= step.seconds <= step.high <= 4.001 * step.low
    half = plan_pieces.make_step("train", [PieceCost(0.25, 1.0), PieceCost(0.5, 5.0)], 1.0, "half", power=3.0)
    assert half.low <= half.seconds <= half.high <= 4.001 * half.low
    small = plan_pieces.make_step(
        "train", [PieceCost(1 / 16, 1.0), PieceCost(1 / 8, 5.0)], 1.0, "eighth", power=3.0
    )
    assert small.high > 8 * small.low
    # Steps of a network take the same time, or grow in proportion.
    steps = plan_pieces.make_step(
        "train", [PieceCost(1 / 16, 20.0), PieceCost(1 / 8, 21.0)], 1.0, "", power=1.0
    )
    assert 21.0 < steps.seconds < 8 * 21.0 < steps.high


def test_larger_pieces_of_a_fit_are_measured_where_its_power_is_not_known():
    said = []
    run = lambda size: PieceCost(size, 40.0 * size**2)  # noqa: E731
    scales = [1 / 8, 1 / 4, 1 / 2, 1.0]
    pieces = plan_pieces.grow(scales, run, 10.0, power=3.0, wanted=0.5, tell=said.append)
    assert [piece.size for piece in pieces] == [1 / 8, 1 / 4, 1 / 2]
    assert said == ["measuring a larger piece, about 10 s"]
    assert len(plan_pieces.grow(scales, run, 3.0, power=3.0, wanted=0.5)) == 2  # too long even so


def test_waiting_for_other_programs_does_not_end_the_measuring():
    """On a machine with a load of 30 a ridge was planned from a copy of 1/16, at an eighth of its time."""
    sizes = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    pieces = plan_pieces.grow(sizes, lambda s: PieceCost(s, 160 * s**2, 16 * s**2), 5.0, power=3.0)
    assert pieces[-1].size == 1 / 4


def test_what_a_network_computes_before_its_training_is_measured_in_part_and_counted_whole(monkeypatch):
    """Thousands of steps before each of several measured fits would take longer than what is planned."""
    config = read_config("synthetic_digits", ["encoder={kind: network, epochs: 10, batch_size: 32}"])
    network = {"kind": "voxel_clusters", "n_clusters": 8, "code_updates": 5000}
    encoder = type(config.encoder).model_validate({**config.encoder.model_dump(), "network": network})
    seen = []

    def fit(config, settings, sizes, n, shape, target, marks):
        seen.append(settings.network.code_updates)
        before, step = 0.1 * settings.network.code_updates, 0.01 * settings.batch_size
        per_epoch = -(-n // settings.batch_size)
        marks.times += [(before + (k + 1) * step,) * 2 for k in range(2 * per_epoch)]
        return PieceCost(n, before + 2 * per_epoch * step)

    monkeypatch.setattr(plan, "_fit_random", fit)
    sizes = SimpleNamespace(n_train=320, n_folds=2, shape=(300,))
    step, _ = plan._plan_epochs(
        config.model_copy(update={"encoder": encoder}), sizes, (1280,), 60.0, tell=lambda text: None
    )
    assert step.seconds == pytest.approx(2 * (0.1 * 5000 + 0.01 * 320 * 10))
    assert max(seen) < 100


def test_trials_of_a_network_need_no_more_memory_than_may_lie_on_the_device(monkeypatch):
    """Four subjects of THINGS-MEG are 17 GB: more than may lie in memory (4 GB), so all are read from their file."""
    config = read_config("synthetic_digits", ["encoder={kind: network, epochs: 1, batch_size: 32}"])
    monkeypatch.setattr(plan, "_fit_random", lambda *given: PieceCost(given[3], 0.01 * given[3], memory=1e9))
    monkeypatch.setattr(plan, "read_memory", lambda name: 0.0)
    for n_train, wanted in ((1000, 1e9 + 4.0 * 1000 * 54_200), (79_392, 1e9)):
        sizes = SimpleNamespace(n_train=n_train, n_folds=1, shape=(271, 200))
        step, _ = plan._plan_epochs(config, sizes, (768,), 60.0, tell=lambda text: None)
        assert step.memory == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("per_trial", "measured", "epoch"),
    [
        (0.001, 4096, 4 * (0.2 + 1.024)),  # whole batches, four of them
        (1.0, 16, 4 * (0.2 + 1024.0)),  # two of 1024 would take an hour
    ],
)
def test_batches_that_take_longer_than_the_budget_are_measured_in_smaller_ones(per_trial, measured, epoch):
    """A plan measured eight batches of 1024 trials whatever they took, and did not end."""
    spent = 0.0

    def fit(n):
        nonlocal spent
        if n < 16 and per_trial < 1:
            raise DataError("an objective needs more trials than these")
        seconds = 0.2 * -(-n // 1024) + per_trial * n  # a step of the optimiser, and what each trial takes
        spent += 2 * seconds
        return PieceCost(n, seconds, memory=1e9 + 1e6 * min(n, 1024))

    pieces, found = plan_pieces.measure_training(fit, 1024, 4096, budget=20.0)
    assert pieces[-1].size == measured
    assert found.seconds == pytest.approx(epoch)
    assert found.memory == pytest.approx(1e9 + 1e6 * 1024)
    assert spent < 3 * 20.0


def test_pictures_of_a_large_network_are_counted_and_not_computed(monkeypatch):
    """Nine pictures of ViT-bigG took minutes, and its random weights 8 GB, which ended the process."""
    from torchvision.models import vgg11

    asked = {"kind": "torchvision", "architecture": "vgg11", "weights": "random"}
    changes = [f"target={json.dumps(asked)}", "generator={kind: nearest}"]
    config = read_config("synthetic_digits", [*QUICK, *changes])
    found = plan_pictures._count_network(config.target)
    assert found.shape == (4096,)
    n = sum(one.numel() for one in vgg11(init_weights=False).parameters()) - 4096 * 1000 - 1000
    assert found.n_bytes == 4 * n
    # torchvision's 7.61 GFLOPS count a product and its sum as one.
    assert found.tera_operations == pytest.approx(0.0152, rel=0.02)
    monkeypatch.setattr(plan_pictures, "_measure_tera", lambda: PieceCost(1.0, 1000.0, 900.0))
    sizes, _ = find_sizes(config)
    steps, dims, _ = plan_pictures.plan_pictures(config, sizes, None, 20.0)
    assert dims == (4096,)
    bare = plan_pictures._add_network(Step("embed", 0.0), found, PieceCost(1.0, 1000.0, 900.0), 60)
    assert bare.seconds == pytest.approx(60 * 1000 * found.tera_operations)
    assert bare.seconds < steps[0].seconds
    assert bare.cpu_seconds == pytest.approx(0.9 * bare.seconds)
    assert "computed from 15 billion operations for a picture, 1 billion a second" in steps[0].how
    assert [step.name for step in steps] == ["embed", "retrieve", "reconstruct", "evaluate", "report"]
    assert all(step.seconds is not None for step in steps)


def test_an_epoch_is_distinguished_from_what_comes_before():
    marks = plan_pieces.Marks()
    marks(0, 0, "a message")
    assert marks.split(PieceCost(8, 10.0, 6.0)) == PieceCost(8, 5.0, 3.0)  # no progress was shown
    marks.times = [(100.0 + k, 50.0 + k / 2) for k in range(4)]
    assert marks.split(PieceCost(8, 10.0, 6.0)) == PieceCost(
        8, 2.0, 1.0, before=4.0
    )  # of 6 s of the processor


@pytest.mark.parametrize(
    ("name", "changes", "left_out"),
    [
        ("things_eeg2_atm_vith", {"target": "random"}, ""),
        ("things_eeg2_ubp_rn50", {"target.encoder": "random"}, ""),
        (
            "things_eeg2_atm_generation",
            {"target": "random"},
            "sdxl_turbo, ip_adapter, sdxl_vae, git_large_coco",
        ),
        ("synthetic_digits", {}, ""),
        ("things_eeg2_samga_internvit", {"target": None}, ""),  # its folder says how large it is
    ],
)
def test_networks_whose_weights_are_missing_are_measured_with_random_ones(
    name, changes, left_out, monkeypatch, tmp_path
):
    """A plan of ATM without its weights had no estimate at all, and advised a job of ten minutes."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    small, without = plan._stand_in(read_config(name))
    known = dict(small.walk())
    assert {key: known[key].weights for key in changes} == changes
    assert without == left_out
    assert (small.generator.kind == "nearest") == (bool(left_out) or name.startswith("things"))


def test_nothing_is_advised_without_an_estimate(monkeypatch, capsys):
    sizes = RunSizes("published", 10, (5,), 4, 10, 8, 1, 8, 8, 2, ("01",))
    known = [
        Step("preprocess", 10.0, 5.0, 20.0, 8.0, 1e9, 100.0),
        Step("embed", 4.0, 2.0, 8.0, 4.0, 2e9, 10.0),
    ]
    no_time = [Step("preprocess", None, disk=100.0, how="no data"), Step("embed", None, how="no weights")]
    for steps, sentence, advised in (
        (
            known,
            "one run: 14.0 s (7.0 s to 28.0 s), 0.00333 CPU hours, 2.0 GB of memory, 110 bytes on disk",
            True,
        ),
        ([known[0], no_time[1]], "note: no estimate of time for embed; the sums are without it", False),
        (no_time, "one run: no estimate of time, 100 bytes on disk\n", False),
    ):
        monkeypatch.setattr(plan, "plan_run", lambda config, steps=steps, **asked: RunPlan(sizes, steps))
        code, said = call(capsys, "plan", "synthetic_digits", monkeypatch=monkeypatch)
        assert code == 0, said.err
        assert sentence in said.out
        assert ("a job with enough resources: --cluster slurm" in said.out) == advised
        code, said = call(capsys, "plan", "things_eeg2_atm_vith", "--json", monkeypatch=monkeypatch)
        content = json.loads(said.out)
        assert bool(content["ask"]) == advised
        assert content["weights"][0]["name"] == "clip_vit_h14"


def test_published_sizes_are_the_facts_of_the_manifest():
    for name in ("things_eeg2", "nsd"):
        manifest = find_manifest(name)
        for key in set(manifest.facts) & {"n_train_images", "n_test_images", "train_repetitions", "test_repetitions",
                                          "n_channels"}:  # fmt: skip
            assert getattr(manifest.size, key) == manifest.facts[key], (name, key)
    facts = find_manifest("nsd").facts
    assert (
        find_manifest("nsd").size.n_train_images == max(facts["images_seen_per_subject"]) - facts["n_shared"]
    )


def test_a_piece_is_a_constant_and_parts_that_grow_and_the_largest_is_met_exactly():
    """A fit of half the size was planned at half: a power between two small copies is not that of large ones."""
    pieces = [PieceCost(1.0, 3.0), PieceCost(2.0, 5.0)]
    assert extrapolate(pieces, "seconds", 4.0) == pytest.approx(9.0)
    fits = [PieceCost(s, 0.2 + 3 * s**2 + 20 * s**3) for s in (1 / 8, 1 / 4, 1 / 2)]
    assert extrapolate(fits, "seconds", 1.0, power=3.0) == pytest.approx(23.2)
    noisy = [*fits[:2], PieceCost(0.5, 1.1 * fits[2].seconds)]
    assert extrapolate(noisy, "seconds", 0.5, power=3.0) == pytest.approx(noisy[2].seconds)
    assert extrapolate(noisy, "seconds", 1.0, power=3.0) == pytest.approx(1.1 * 23.2, rel=0.15)
    # Noise is no speed, and no constant is less than nothing.
    assert extrapolate([PieceCost(1.0, 2.0), PieceCost(2.0, 1.0)], "seconds", 4.0) == pytest.approx(1.0)
    assert extrapolate([PieceCost(1.0, 1.0), PieceCost(2.0, 5.0)], "seconds", 4.0) == pytest.approx(10.0)
    assert extrapolate([PieceCost(2.0, 5.0)], "seconds", 4.0) == pytest.approx(10.0)
    assert extrapolate([PieceCost(1.0, 1.0), PieceCost(2.0, 0.0)], "seconds", 4.0) == 0.0


def test_runs_that_share_an_artifact_compute_it_once(monkeypatch):
    sizes = RunSizes("published", 10, (5,), 4, 10, 8, 1, 8, 8, 2, ("01",))
    steps = [
        Step("preprocess", 10.0, 5.0, 20.0, 8.0, 1e9, 100.0),
        Step("embed", 4.0, 2.0, 8.0, 4.0, 2e9, 10.0),
        Step("train", 1.0, 0.5, 2.0, 1.0, 3e9, 1.0, on_gpu=True),
        Step("evaluate", None, how="no weights"),
    ]
    monkeypatch.setattr(plan, "plan_run", lambda config, **asked: RunPlan(sizes, steps))
    configs = [
        read_config("synthetic_digits", [f"seed={s}", f"encoder.alphas=[{a}]"])
        for s in (0, 1)
        for a in (1, 2, 3)
    ]
    found = plan_runs(configs)
    assert found.counts == {"start": 1, "preprocess": 2, "embed": 2}
    assert found.total("seconds") == pytest.approx(2 * 10 + 2 * 4 + 6)
    assert found.total("memory") == 3e9
    assert found.count_gpu_hours() == pytest.approx(6 / 3600)
    assert sum(n for _, n in found.plans) == 6
    assert found.plans[0][0].unknown == ["evaluate"]
    # The same pictures of all subjects and seeds are encoded once, and lie in every folder.
    shared = plan_runs(
        [
            read_config("things_eeg2_ridge", [f"seed={s}", f"dataset.subjects=[{n}]"])
            for s in (0, 1)
            for n in (1, 2)
        ]
    )
    assert (shared.counts["embed"], shared.n_encoded) == (4, 1)
    assert shared.total("seconds") == pytest.approx(4 * 10 + 1 * 4 + 4 * 1)
    assert shared.total("disk") == pytest.approx(4 * 111)


def call(capsys, *words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["braindecode-vis", *words])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code, capsys.readouterr()


def test_what_would_be_sent_is_shown_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    pytest.importorskip("submitit")
    out = tmp_path / "out"
    words = ["sweep", "synthetic_digits", "--over", "seed=0..29", "--out", str(out), "--dry-run"]
    more = ["--cluster", "slurm", "--cluster-set", "memory=4", "--cluster-set", "parallel=5"]
    code, said = call(capsys, *words, *more, monkeypatch=monkeypatch)
    assert code == 0
    assert "#SBATCH --array=0-29%5" in said.out
    assert "#SBATCH --mem=4096M" in said.out
    assert f"seed-29: braindecode-vis run {out}/seed-29" in said.out
    assert "nothing was sent" in said.out
    words = [
        "run",
        "synthetic_digits",
        "--set",
        "split.kind=kfold",
        "--set",
        "split.n_folds=3",
        "--out",
        str(out),
    ]
    code, said = call(capsys, *words, "--cluster", "slurm", "--dry-run", "--json", monkeypatch=monkeypatch)
    content = json.loads(said.out)
    assert len(content["jobs"]) > 3
    assert "afterany:JOB_OF_SUBMISSION_1" in content["script"]
    assert not any("--dry-run" in job["words"] for job in content["jobs"])
    assert not out.exists()
    code, said = call(capsys, *words, "--cluster", "debug", "--dry-run", monkeypatch=monkeypatch)
    assert (code, "has none" in said.err) == (2, True)
    code, said = call(capsys, *words, "--dry-run", monkeypatch=monkeypatch)
    assert (code, "--dry-run applies to jobs only" in said.err) == (2, True)


@pytest.mark.slow
def test_a_plan_of_a_network_and_a_ridge_says_what_it_measured(monkeypatch, capsys):
    for more in ((), ("--set", "encoder.kind=network", "--set", "encoder.epochs=3")):
        words = ["plan", "synthetic_digits", "--budget", "2", "--json", *more]
        for text in QUICK:
            words += ["--set", text]
        code, said = call(capsys, *words, monkeypatch=monkeypatch)
        assert code == 0, said.err
        content = json.loads(said.out)
        steps = {step["name"]: step for step in content["plans"][0]["steps"]}
        assert list(steps) == [
            "start",
            "preprocess",
            "embed",
            "train",
            "retrieve",
            "reconstruct",
            "evaluate",
            "report",
        ]
        assert all(step["low"] <= step["seconds"] <= step["high"] for step in steps.values())
        assert all(np.isfinite(step["disk"]) for step in steps.values())
        assert "measured" in steps["train"]["how"]
        assert any("GPU hours are not known" in note for note in content["notes"])
        assert content["ask"]["memory"] >= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["things_eeg2_ridge", "nsd_ridge"])
def test_preprocessing_of_data_that_are_not_here_is_measured_on_a_small_phantom(name):
    said, config = [], read_config(name)
    sizes, source = find_sizes(config)
    assert source is None
    step = plan._plan_preprocess(config, sizes, source, said.append)
    assert "simulated trials, as the data are not here" in step.how
    assert 0 < step.low <= step.seconds <= step.high <= 4.001 * step.low
    assert said[0].startswith("simulating a small ")


@pytest.mark.parametrize(
    ("name", "form", "block"),
    # Blocks of 32 MiB hold 141 trials of 59 385 vertices; published epochs are read 256 at a time.
    [("mosaic_ridge", "mosaic", 141), ("things_meg_ridge_small", "things-meg", 256)],
)
def test_streamed_trials_need_no_more_memory_than_one_block(name, form, block, tmp_path, monkeypatch):
    """A line through two small pieces would give gigabytes to a person with many trials."""
    config = read_config(name, root=make_tiny(form, tmp_path / form))
    sizes, source = find_sizes(config)
    monkeypatch.setattr(plan, "_preprocess_start", lambda source, n: PieceCost(n, 1.0, 1.0, 1e6 * n, 1.0))
    monkeypatch.setattr(plan, "_measure_ceilings", lambda sizes: PieceCost(10, 1.0, 1.0))
    monkeypatch.setattr(plan, "read_memory", lambda name: 0.0)
    few, many = (
        plan._plan_preprocess(config, replace(sizes, n_stored=n), source, lambda words: None).memory
        for n in (100, 100_000)
    )
    assert (few, many) == (pytest.approx(100e6), pytest.approx(1e6 * block))


def test_recordings_are_opened_cut_and_given_ceilings_and_a_longer_one_needs_no_more_memory(
    tmp_path, monkeypatch
):
    """Half of the time was not planned: opening all files and the noise ceilings; memory grew with all trials."""
    config = read_config("things_eeg2_ridge", root=make_tiny("things-eeg2", tmp_path / "eeg"))
    sizes, source = find_sizes(config)
    trials = pd.concat([part.trials for part in source.parts])
    shown = trials.groupby(["split", "stimulus_id"]).size()
    assert sizes.n_repeated == shown[shown > 1].sum() > 0
    monkeypatch.setattr(plan, "_preprocess_start", lambda source, n: PieceCost(n, 1.0, 1.0, 1e6 * n, 1.0))
    monkeypatch.setattr(plan, "_measure_ceilings", lambda sizes: PieceCost(10, 5.0, 5.0, 7e6))
    monkeypatch.setattr(plan, "read_memory", lambda name: 0.0)

    def count(n, n_repeated, opened):
        larger = replace(sizes, n_stored=n, n_repeated=n_repeated)
        return plan._plan_preprocess(config, larger, source, lambda words: None, 1.0, opened)

    bare = count(100, 0, None)
    whole = count(100, 50, PieceCost(1.0, 3.0, 2.0))
    assert whole.seconds - bare.seconds == pytest.approx(3 + 50 / 10 * 5)
    assert whole.cpu_seconds - bare.cpu_seconds == pytest.approx(2 + 50 / 10 * 5)
    assert whole.low < whole.seconds < whole.high
    assert count(100_000, 0, None).memory == count(1_000_000, 0, None).memory == pytest.approx(256e6)


def test_pieces_of_a_recording_grow_until_they_show_its_time():
    """Thirty and sixty trials take as long as what a session costs beside its trials."""
    part = SimpleNamespace(trials=range(700), is_computed=False)
    assert plan._list_pieces(SimpleNamespace(modality="eeg", parts=[part])) == [256, 512, 700]
    pieces = plan._list_pieces(SimpleNamespace(modality="fmri", parts=[part]))
    assert pieces == [32, 64, 128, 256, 512, 700]
    assert {type(n) for n in pieces} == {int}  # they cut tables of trials
    part.is_computed = True
    assert plan._list_pieces(SimpleNamespace(modality="fmri", parts=[part])) == [700]


def test_pictures_of_the_data_stay_in_their_files_and_repetitions_are_read_and_averaged(tmp_path):
    """Random pictures in memory took half of what those of a data set take, and a fit began with averaged trials."""
    config = read_config("things_eeg2_ridge", root=make_tiny("things-eeg2", tmp_path / "eeg"))
    sizes, source = find_sizes(config)
    assert (sizes.n_train_trials, sizes.n_test_trials) == (2 * sizes.n_train, 4 * sizes.n_test)
    assert not sizes.tests_known_concepts

    def take(source, name):
        return plan_pictures._take_pictures(config, sizes, source, 4, tmp_path / name)

    own = take(source, "own")
    assert own.ids.tolist() == source.stimuli.ids[:4].tolist()
    assert own.read_image(own.ids[0]).shape == (32, 32, 3)
    published = take(None, "published")  # drawn, and as files too
    assert published.pixels is None
    assert published.read_image("image3").shape == (32, 32, 3)
    rows = source.stimuli.select_pictured()  # copied by preprocessing, into one array
    copied = SimpleNamespace(read_image=lambda row: rows.read_image(rows.ids[row]), stimuli=rows)
    assert (take(copied, "copied").pixels[3] == rows.read_image(rows.ids[3])).all()

    read, predicted = PieceCost(1.0, 10.0, 5.0), PieceCost(2.0, 6.0, 4.0, 1e9)
    added = {
        name: plan._add_data(Step(name, 1.0, 0.5, 2.0, 1.0, 7e6), config, sizes, (5,), read, predicted)
        for name in ("embed", "train", "retrieve", "reconstruct", "evaluate")
    }
    assert added["embed"].seconds == added["evaluate"].seconds == 1.0
    assert added["train"].seconds > 1.0
    assert added["retrieve"].seconds > 1.0 + 3.0 * sizes.n_test
    assert added["retrieve"].memory > 1e9
    assert added["reconstruct"].cpu_seconds == 1.0 + 5.0 * sizes.n_train_images  # the mean image
    classes = replace(sizes, tests_known_concepts=True)
    step = plan._add_data(
        Step("reconstruct", 1.0, 0.5, 2.0, 1.0, 7e6), config, classes, (5,), read, predicted
    )
    assert step.cpu_seconds == 1.0 + 5.0 * 2 * sizes.n_train_images


def test_the_check_for_leaks_reads_all_trials_and_pictures_up_to_a_bound(monkeypatch):
    """`report` of NSD was planned at 1.7 s, as if a page of a few items and its checks were all."""
    sizes = RunSizes("here", 3000, (40,), 4, 400, 16, 1, 300, 300, 100, ("01",))
    step, digest, asked = Step("report", 1.0, 0.5, 2.0, 1.0, 7e6), PieceCost(1e6, 2.0, 1.0), []
    monkeypatch.setattr(trial_values, "find_copied_trials", lambda data: asked.append(len(data)) or [])
    bare = plan._add_leaks(step, sizes, 480e3, 0.0, digest)
    assert len(asked) == 1
    assert bare.seconds > 1.0
    hashed = plan._add_leaks(step, sizes, 3e9, 5e6, digest)  # many trials are compared by equality alone
    assert len(asked) == 1
    assert hashed.cpu_seconds > 1.0 + 5 * 1.0
    assert plan._add_leaks(step, sizes, 3e9, 5e9, digest).cpu_seconds < 1.0 + 5 * 1.0
    assert plan._add_leaks(replace(step, name="train"), sizes, 3e9, 5e6, digest).seconds == 1.0


def test_sessions_that_are_there_stand_for_those_that_are_not(tmp_path):
    """With 2 of 40 files missing, a phantom was measured, and 18 times the truth was planned."""
    config = read_config("nsd_ridge", root=make_tiny("nsd", tmp_path / "nsd"))
    whole, source = find_sizes(config)
    source.parts[-1].files[0].unlink()
    part, rest = find_sizes(config)
    assert part.is_there
    assert len(rest.parts) == len(source.parts) - 1
    assert f"{len(rest.parts)} sessions on disk, of {len(source.parts)}" in part.origin
    assert (part.n_stored, part.shape) == (whole.n_stored, whole.shape)
    assert whole.n_images <= part.n_images <= 2 * whole.n_images  # sessions repeat pictures of others


def test_a_counted_network_has_an_estimate_where_its_small_run_fails(monkeypatch):
    def fail(*given):
        raise DataError("this run needs more pictures")

    network = plan_pictures._CountedNetwork((8,), 100.0, 1e9)
    monkeypatch.setattr(plan_pictures, "_run_pictures", fail)
    monkeypatch.setattr(plan_pictures, "_count_network", lambda target: network)
    monkeypatch.setattr(plan_pictures, "_measure_tera", lambda: PieceCost(1.0, 2.0, 1.0))
    sizes = RunSizes("here", 500, (3,), 4, 400, 16, 1, 300, 300, 100, ("01",))
    steps, dims, _ = plan_pictures.plan_pictures(read_config("synthetic_digits", QUICK), sizes)
    assert (steps[0].name, steps[0].seconds, dims) == ("embed", 400 * 100 * 2.0, (8,))
    assert "reading: not measured: this run needs more pictures" in steps[0].how
    assert all(step.seconds is None for step in steps[1:])


def test_categories_are_planned_trial_by_trial_and_with_their_scores():
    """A plan of categories counted averaged trials, which no decoder gets, and ended with the fit."""
    config = read_config(
        "synthetic_digits", [*QUICK, "encoder={kind: lda}", "split={kind: kfold, n_folds: 2}"]
    )
    sizes, _ = find_sizes(config)
    assert (sizes.n_train, sizes.n_test) == (30, 60)
    steps, dims, _ = plan_pictures.plan_pictures(config, sizes, None, 0.1)
    assert [step.name for step in steps] == ["evaluate", "report"]
    assert all(step.seconds > 0 for step in steps)
    assert dims == ()


def test_sizes_of_published_data_follow_the_window_and_the_folds():
    """Of three subjects, each fold of leave-one-subject-out trains on the trials of two (`_read_published`)."""
    whole, _ = find_sizes(read_config("things_eeg2_ridge", ["dataset.subjects=[1, 2, 3]"]))
    late = ["dataset.window=[0.1, 0.6]", "split={kind: leave_one_subject_out}", "dataset.subjects=[1, 2, 3]"]
    sizes, _ = find_sizes(read_config("things_eeg2_ridge", late))
    assert sizes.shape == (17, 125)
    assert (sizes.n_folds, whole.n_folds) == (3, 1)
    assert sizes.n_train == 2 * whole.n_train // 3
    assert (sizes.n_test, sizes.n_stored) == (whole.n_test, whole.n_stored)


def test_pictures_are_embedded_all_and_other_stages_grow_with_the_test_rows(monkeypatch):
    """A second takes each stage for 10 pictures or test rows that a small run has.

    Loading a network of 6 s was once multiplied by the pictures, so that 9 minutes were planned as 6 hours.
    """

    def run(config, sizes, source, n_train, n_test):
        cost = {"embed": n_train + n_test, **dict.fromkeys(("retrieve", "reconstruct", "evaluate"), n_test)}
        # The first run takes 50 s more in each stage, which is no reason to measure no other.
        load = 50.0 * (n_test == plan_pictures.FIRST_PICTURES[1])
        found = {name: PieceCost(1.0, n / 10 + load, n / 10 + load, 1e6, 8.0 * n) for name, n in cost.items()}
        found["report"] = PieceCost(1.0, 2.0, 2.0, 1e6, 1e5)
        return {**found, "read": PieceCost(1.0, 3.0)}, (7,)

    monkeypatch.setattr(plan_pictures, "_run_pictures", run)
    sizes = RunSizes("here", 500, (3,), 4, 400, 16, 1, 300, 300, 100, ("01",))
    steps, dims, first = plan_pictures.plan_pictures(read_config("synthetic_digits", QUICK), sizes)
    assert (dims, first["read"].seconds) == ((7,), 3.0)
    seconds = {step.name: step.seconds for step in steps}
    assert seconds["report"] == pytest.approx(2.0)
    assert seconds["embed"] == pytest.approx(40.0 + 49.6)
    for name in ("retrieve", "reconstruct", "evaluate"):
        assert seconds[name] == pytest.approx(10.0 + 49.9), name
    told = {step.name: step.how for step in steps}
    assert "108 pictures of 16 px" in told["embed"]
    assert "60 test rows" in told["retrieve"]
    assert [step.disk for step in steps[:2]] == [pytest.approx(3200), pytest.approx(800)]


def test_memory_of_a_fit_grows_with_the_square_and_of_other_steps_in_proportion():
    """A fit of trials times trials; batches need as much however many there are."""
    pieces = [PieceCost(10, 1.0, 1.0, 100.0, 100.0), PieceCost(20, 8.0, 8.0, 400.0, 400.0)]
    wanted = {(None, False): 800, (3.0, False): 400 * 4, (None, True): 400, (3.0, True): 400}
    for (power, in_batches), memory in wanted.items():
        step = plan_pieces.make_step(
            "train", pieces, 40.0, "pieces", power=power, in_batches=in_batches, more=7.0
        )
        assert step.memory == pytest.approx(7 + memory), (power, in_batches)
        assert step.disk == pytest.approx(800 if power is None else 1600)
