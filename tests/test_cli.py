"""The command as a user meets it: every error one sentence, exit code 2, nothing lost."""

import gc
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import typer
import yaml
from scipy.io import loadmat, savemat

from braindecode_vis.base.checks import ConfigError
from braindecode_vis.cli import EXAMPLES, app, show
from braindecode_vis.cli.show import _report_earlier_run
from braindecode_vis.config import dump_config, read_config
from braindecode_vis.datasets.manifests import find_package_data
from braindecode_vis.embeddings.efficientnet import EfficientNetEncoder
from braindecode_vis.pipeline import progress

SMALL = [
    "--set", "dataset.n_train=60", "--set", "dataset.n_test=12",
    "--set", "evaluation.n_bootstrap=200", "--set", "evaluation.n_permutations=200",
]  # fmt: skip


@pytest.fixture
def call(command_line):
    return command_line


def call_anew(*arguments, **options):
    """Call the command as a process of its own."""
    command = [sys.executable, "-m", "braindecode_vis", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def check_refusal(done, *fragments):
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    sentence = done.stderr.strip().splitlines()[-1]
    assert sentence.startswith("error: ")
    for fragment in fragments:
        assert fragment in sentence, sentence
    return sentence


def test_help_imports_nothing_heavy():
    heavy = ("numpy", "torch", "pydantic", "mne")
    code = f"import sys, braindecode_vis.cli; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    done = call_anew("--help")
    assert done.returncode == 0
    for verb in ("datasets", "check", "preprocess", "embed", "train", "retrieve", "reconstruct", "evaluate", "report",
                 "run", "phantom", "demo"):  # fmt: skip
        assert f"  {verb} " in done.stdout


def test_help_groups_all_verbs_and_cuts_no_line(call):
    _, *lines = call("--help").stdout.splitlines()
    verbs = [line.split()[0] for line in lines[lines.index("Data:") :] if line.startswith("  ")]
    assert sorted(verbs) == sorted(EXAMPLES)
    assert [line for line in lines if line.endswith(":")][1:] == [
        "Data:", "Run:", "Ask:", "Live:", "Scale:", "Models:",
    ]  # fmt: skip
    assert not [line for line in lines if len(line) > 80 or line.endswith("...")]


#: Commands that print a list or refuse a typo; they took 1 to 5 s, when they built all settings, parsed all manifests
#: and loaded pandas and open_clip before.
QUICK = [
    "datasets", "datasets nsd", "configs", "describe things_eeg2_ridge", "run digits69_rigde",
    "run things_eeg2_ridge --set encoder.alfas=1", "run nsd_ridge --set evaluation.n_bootstrap=few",
    "run things_eeg2_atm_vith --root . --set target.architecture=ViT-H-41",
    "run things_eeg2_atm_vith --root . --set target.pretrained=laion2b",
]  # fmt: skip
LOADED = """
import contextlib, io, json, sys
from braindecode_vis.cli import main

heavy = ("ssl", "pandas", "pyarrow", "scipy", "sklearn", "torch", "mne", "nilearn", "matplotlib", "transformers")
found = {}
for line in sys.argv[1:]:
    sys.argv = ["braindecode-vis", *line.split()]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        with contextlib.suppress(SystemExit):
            main()
    found[line] = [name for name in heavy if name in sys.modules]
print(json.dumps(found))
"""


def test_a_command_loads_nothing_heavy_before_it_needs_it(call, tmp_path):
    """Each in turn in one process, which names what is loaded after it.

    A run of which all is there took 1.1 s of processor time, two thirds of it to load pandas and read tables that are
    shown as they were. Where weights may lie is the business of huggingface_hub, which loads ssl; open_clip took 5 s.
    """
    assert call("run", "synthetic_digits", "--out", tmp_path, *SMALL).returncode == 0
    asks_for_weights = ["describe things_eeg2_atm_joint", "run things_eeg2_atm_vith --root ."]
    lines = [*QUICK, f"run {tmp_path}", *asks_for_weights]
    done = subprocess.run([sys.executable, "-c", LOADED, *lines], capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert list(found) == lines, done.stderr
    assert {line: names for line, names in found.items() if names} == {
        key: ["ssl"] for key in asks_for_weights
    }


def test_version_is_printed(call):
    assert call("--version").stdout.startswith("braindecode-vis 0.")


def test_datasets_are_listed_for_people_and_programs(call):
    assert "digits69" in call("datasets").stdout
    listed = json.loads(call("datasets", "--json").stdout)
    assert {"digits69", "synthetic_digits"} <= {entry["name"] for entry in listed["datasets"]}


def test_a_narrow_terminal_shows_where_data_lie(call, tmp_path, monkeypatch):
    folder = tmp_path / "muse_n170" / "recordings"
    folder.mkdir(parents=True)
    (folder / "data_2017-09-13-15.30.01.csv.gz").touch()
    monkeypatch.setenv("COLUMNS", "80")
    listed = call("datasets", "--root", tmp_path).stdout
    assert "muse_n170  eeg  1  1 of 6 files" in listed
    assert listed.count("nothing needed") == 1
    assert max(map(len, listed.splitlines())) <= 80
    one = call("datasets", "muse_n170", "--root", tmp_path).stdout
    assert f"on disk: 1 of 6 files in {folder}" in one
    assert (
        "on disk: no list of files; try: braindecode-vis check alljoined1"
        in call("datasets", "alljoined1").stdout
    )


def test_the_data_sets_fit_on_a_screen(call, monkeypatch):
    """The list took 180 lines of a terminal."""
    monkeypatch.setenv("COLUMNS", "80")
    assert len(call("datasets").stdout.splitlines()) <= 44


def test_a_data_set_is_told_in_full(call):
    told = call("datasets", "god").stdout
    for start in (
        "god: Generic Object Decoding", "licence: raw data CC0", "cite: Horikawa",
        "configurations: god_in_context, god_ridge",
        "without its files: braindecode-vis phantom god", "settings: braindecode-vis describe dataset.god",
        "command: braindecode-vis fetch god --subject 1 --root DIR",
    ):  # fmt: skip
        assert start in told
    check_refusal(call("datasets", "gdo"), "did you mean 'god'")


def test_configurations_are_found_by_modality_data_set_and_paper(call):
    def list_names(*given):
        return {entry["name"] for entry in json.loads(call("configs", *given, "--json").stdout)["configs"]}

    assert {"things_eeg2_ridge", "nsd_ridge"} <= list_names()
    assert all(name.startswith(("things_meg", "nod_meg")) for name in list_names("--modality", "meg"))
    assert list_names("--dataset", "god") == {"god_in_context", "god_ridge"}
    assert "things_eeg2_atm_vith" in list_names("--paper", "2403.07721")
    check_refusal(call("configs", "--modality", "eeeg"), "did you mean 'eeg'")
    check_refusal(call("configs", "--paper", "Nobody 1850"), "no configuration follows a paper that names")
    written = call("configs", "god_ridge").stdout
    assert yaml.safe_load(written)["dataset"]["kind"] == "god"


def test_kinds_and_roles_are_described(call):
    assert "atm_s" in call("describe", "network").stdout
    told = call("describe", "atm_s").stdout
    assert told.startswith("network.atm_s: ATM-S")
    assert "unknown_probability: number (>= 0, < 1), by default 0.1" in told
    assert call("describe", "network.atm_s").stdout == told
    both = json.loads(call("describe", "braindecode", "--json").stdout)["explained"]
    assert [entry["name"] for entry in both] == ["network.braindecode", "augmentation.braindecode"]
    assert "alphas" in call("describe", "encoder.ridge").stdout
    assert "seed" in call("describe", "run").stdout
    assert "rois" in call("describe", "SelectionConfig").stdout
    assert "network" in call("describe").stdout
    check_refusal(call("describe", "atm_x"), "did you mean 'atm_s'")
    ends = call("describe", "god_ridge").stdout
    assert "data: braindecode-vis datasets god\n" in ends
    assert "to run: braindecode-vis run god_ridge --root DIR\n" in ends


@pytest.mark.parametrize(
    ("word", "verb"),
    [("decode", "run"), ("download", "fetch"), ("slurm", "run NAME --cluster slurm"), ("help", "--help")],
)
def test_a_word_that_is_no_verb_leads_to_the_verb(call, word, verb):
    check_refusal(call(word), f"no verb is called {word}: use braindecode-vis {verb}.")


def test_words_that_lead_to_verbs_are_none(call):
    """A verb that is added under such a name must not be hidden."""
    from braindecode_vis.cli import _SAID_OTHERWISE, _VERBS

    assert not set(_SAID_OTHERWISE) & set(_VERBS)
    assert {said.split()[0].strip(",") for said in _SAID_OTHERWISE.values()} <= {*_VERBS, "--help"}


@pytest.mark.parametrize(
    ("key", "first", "option"),
    [
        ("repeats", "repeats: Whether the repetitions", "test"),
        ("repeats.test", "repeats.test: a setting of RepeatsConfig.", "test"),
        ("encoder.alphas", "encoder.alphas: a setting of encoder.ridge.", "alphas"),
        ("encoder.ridge.alphas", "encoder.ridge.alphas: a setting of encoder.ridge.", "alphas"),
        ("subject_alignment", "subject_alignment: a setting of encoder.ridge,", "subject_alignment"),
        ("target.weights", "target.weights: a setting of target.efficientnet-lite0.", "weights"),
    ],
)
def test_a_key_is_described_as_set_takes_it(call, key, first, option):
    """A key that a configuration holds was unknown to `describe`, which knew the class that declares it alone."""
    shown = call("describe", key).stdout
    assert shown.startswith(first)
    assert f"\n{option}: " in shown
    check_refusal(call("describe", f"{key}.nothing"), "nothing is called")
    check_refusal(call("describe", "here/nothing.yaml"), "was not found")


def test_a_file_without_a_header_is_not_explained(call, tmp_path):
    (tmp_path / "plain.yaml").write_text("encoder: {kind: ridge}\n")
    check_refusal(call("describe", tmp_path / "plain.yaml"), "has no header that explains it")


def test_a_folder_that_does_not_exist_yet_holds_no_data_set(call, tmp_path):
    assert "absent" in call("datasets", "--root", tmp_path / "later").stdout
    (tmp_path / "file").touch()
    check_refusal(call("datasets", "--root", tmp_path / "file"), "is a file")


def test_analyses_are_listed_without_a_run(call):
    assert "time_generalization" in call("analyze", "--list").stdout
    assert "rsa" in json.loads(call("analyze", "--list", "--json").stdout)["analyses"]
    check_refusal(call("analyze"), "analyze needs a configuration")


def test_every_help_page_ends_with_examples_that_the_verb_takes():
    commands = typer.main.get_command(app).commands
    assert set(EXAMPLES) == set(commands)
    for verb, lines in EXAMPLES.items():
        for line in lines:
            name, *words = line.partition(" > ")[0].split()
            assert name == verb
            with commands[verb].make_context(verb, words, resilient_parsing=False) as context:
                assert "Examples:" in commands[verb].get_help(context)
            shipped = [word for word in words if re.fullmatch(r"(things|nsd|digits|bold)\w+", word)]
            assert all((find_package_data("configs") / f"{w}.yaml").is_file()
                       or (find_package_data("data_manifests") / f"{w}.yaml").is_file() for w in shipped)  # fmt: skip


def test_names_are_completed():
    assert "things_eeg2_ridge" in show.complete_configs("things_eeg2_r")
    assert show.complete_datasets("go") == ["god"]
    assert show.complete_analyses("time_g") == ["time_generalization"]
    assert show.complete_weights("taesdx") == ["taesdxl"]


def test_the_schema_takes_every_shipped_configuration_and_names_what_is_wrong(call):
    import jsonschema

    schema = json.loads(call("configs", "--schema").stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    look = jsonschema.Draft202012Validator(schema)
    for path in sorted(find_package_data("configs").glob("*.yaml")):
        assert [error.message for error in look.iter_errors(yaml.safe_load(path.read_text()))] == [], path
    content = yaml.safe_load((find_package_data("configs") / "synthetic_digits.yaml").read_text())
    encoders = [{"encoder": {"kind": "rigde"}}, {"encoder": {"kind": "ridge", "alfas": []}}]
    for change in ({"sede": 1}, {"seed": "one"}, *encoders):
        assert not look.is_valid({**content, **change}), change
    assert look.is_valid({**content, "encoder": {"kind": "mine.tools:Encoder", "width": 3}})
    # What has no effect is refused.
    check_refusal(call("configs", "--schema", "nod_ridge"), "every configuration", "leave nod_ridge out")
    check_refusal(call("configs", "nod_ridge", "--modality", "eeg"), "--modality", "leave one of the two out")
    check_refusal(call("analyze", "nod_ridge", "--list"), "--list only lists", "leave the other options out")


def test_stages_one_by_one_and_json(call, tmp_path):
    out = tmp_path / "run"
    done = call("preprocess", "synthetic_digits", "--out", out, *SMALL, "--json")
    assert json.loads(done.stdout) == {"run_folder": str(out), "scores": []}
    for verb in ("embed", "train", "retrieve", "reconstruct"):
        assert call(verb, out).returncode == 0
    profile = json.loads(call("train", out, "--json", "--profile").stdout)["profile"]
    assert [row["stage"] for row in profile] == ["preprocess", "embed", "train fold00"]
    assert all({"seconds", "cpu_seconds"} <= row.keys() for row in profile)
    assert "train fold00" in call("train", out, "--profile").stdout
    done = call("evaluate", out, "--json")
    content = json.loads(done.stdout)
    assert content["scores"] == json.loads((out / "scores.json").read_text())
    assert len(content["scores"]) > 10
    assert "train fold00       reused" in done.stderr
    done = call("report", out)
    assert f"report: {out / 'report.html'}" in done.stdout
    assert (out / "report.html").is_file()


def test_a_folder_of_another_run(call, tmp_path):
    """Other data are refused; other settings go on, as with the run folder itself, and are named."""
    out = tmp_path / "run"
    arrays = [tmp_path / name for name in ("one", "two")]
    for seed, folder in enumerate(arrays):
        folder.mkdir()
        np.save(folder / "data.npy", np.random.default_rng(seed).normal(size=(12, 5)))
        np.save(folder / "labels.npy", np.tile(["a", "b"], 6))
        assert call("new", folder).returncode == 0
    asked = ["preprocess", arrays[0] / "decode.yaml", "--out", out]
    assert "other settings" not in call(*asked, "--root", arrays[0]).stderr
    done = call(*asked, "--root", arrays[0], "--set", "seed=3")
    assert done.returncode == 0
    assert "holds a run with other settings, which change now: seed (0, now 3)" in done.stderr
    check_refusal(call(*asked, "--root", arrays[1]), "holds a run of other data", "another folder with --out")
    arrays[0].rename(tmp_path / "moved")
    assert (
        call("preprocess", arrays[1] / "decode.yaml", "--root", tmp_path / "moved", "--out", out).returncode
        == 0
    )


def test_unknown_names_are_answered_with_the_known_ones(call, tmp_path):
    check_refusal(call("run", "digits96"), "shipped configurations", "did you mean 'digits69'")
    check_refusal(call("check", "digits6"), "must be one of", "did you mean 'digits69'")
    done = call("run", "synthetic_digits", "--out", tmp_path, "--set", "encoder.alfas=[1]")
    check_refusal(done, "unknown key encoder.alfas", "known here are kind, alphas", "did you mean 'alphas'")
    assert call("run", "synthetic_digits", "--nonsense").returncode == 2


def test_a_missing_caption_bank_is_refused_before_anything_runs(call, tmp_path):
    bank = ("--set", f"evaluation.captions.bank={tmp_path / 'no.csv'}")
    done = call("run", "synthetic_digits", "--out", tmp_path / "run", *SMALL, *bank)
    check_refusal(done, "evaluation.captions.bank names", "does not exist")
    assert not (tmp_path / "run" / "stages").exists()


def test_debug_shows_the_traceback():
    done = call_anew("run", "digits96", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_wrong_root_is_named(call, tmp_path):
    check_refusal(call("run", "digits69_ridge", "--out", tmp_path / "o"), "pass it with --root")
    check_refusal(
        call("run", "digits69_ridge", "--root", tmp_path / "absent", "--out", tmp_path / "o"), "absent"
    )
    check_refusal(call("check", "digits69", "--root", tmp_path), "digit69_28x28.mat", "is missing")


def test_a_log_file_gets_lines_instead_of_bars(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_SECONDS_A_LINE", 0)
    listener = progress.ConsoleListener()
    with listener.watch("train:") as tell:
        tell(1, 10, "epoch 1/10")
        tell(0, 0, "a message")
    with listener.progress("scoring", 4) as advance:
        advance(1)
    with listener.progress("encoding", None) as advance:
        advance(7)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "train: 10%, about 0 s left, epoch 1/10", "train: a message", "scoring: 25%, about 0 s left",
        "encoding: 7 done",
    ]  # fmt: skip


@pytest.fixture
def copied(shared, tmp_path):
    root = tmp_path / "digits69"
    root.mkdir()
    shutil.copyfile(shared / "data/digits69/digit69_28x28.mat", root / "digit69_28x28.mat")
    return root


@pytest.mark.shared
def test_a_truncated_file_is_named_with_its_checksum(call, copied, tmp_path):
    path = copied / "digit69_28x28.mat"
    path.write_bytes(path.read_bytes()[:1_000_000])
    expected = "44513e09ad2398566aedd550088b817a3c0bf9cd7873f87078ecd7fdf170b22d"
    check_refusal(
        call("check", "digits69", "--root", copied), "truncated: 1000000 of 2390173 bytes", expected
    )
    check_refusal(call("run", "digits69", "--root", copied, "--out", tmp_path / "o"), "truncated", expected)


@pytest.mark.shared
def test_a_nan_voxel_names_its_trial(call, copied, tmp_path):
    content = {k: v for k, v in loadmat(copied / "digit69_28x28.mat").items() if not k.startswith("__")}
    content["fmriTrn"][17, 5] = np.nan
    savemat(copied / "digit69_28x28.mat", content)
    done = call("run", "digits69", "--root", copied, "--out", tmp_path / "o")
    check_refusal(done, "trial 17", "train_17_six")


def test_an_output_that_cannot_be_a_folder_is_named(call, tmp_path):
    (tmp_path / "file").touch()
    check_refusal(call("run", "synthetic_digits", "--out", tmp_path / "file"), "cannot be written", "--out")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB of our own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    gc.collect()  # arrays of a run that was left are mapped from its files until their cycles are collected
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_loses_nothing(call, small_disk, tmp_path):
    filler = small_disk / "filler"
    filler.write_bytes(b"0" * 1_900_000)
    arguments = ["run", "synthetic_digits", "--out", small_disk / "run", *SMALL]
    check_refusal(call(*arguments), "the disk is full", "run the same command again")
    assert not list(small_disk.rglob(".tmp-*"))
    filler.unlink()
    assert call(*arguments).returncode == 0
    elsewhere = call("run", "synthetic_digits", "--out", tmp_path / "other", *SMALL, "--json")
    assert (
        json.loads((small_disk / "run" / "scores.json").read_text()) == json.loads(elsewhere.stdout)["scores"]
    )


def test_a_read_only_output_is_named(call, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    check_refusal(
        call("run", "synthetic_digits", "--out", small_disk / "run"), "cannot be written", "Read-only"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(call, tmp_path):
    tmp_path.chmod(0o500)
    check_refusal(
        call("run", "synthetic_digits", "--out", tmp_path / "run"), "cannot be written", "Permission"
    )


def test_the_time_left_after_a_resume_is_at_the_pace_of_now(monkeypatch):
    """Images that an earlier call had kept counted as if they had been made just now, so that 3 minutes were 0."""
    now = SimpleNamespace(s=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now.s))
    clock = progress._Clock(is_drawn=False)
    now.s = 30.0  # what is fitted before
    assert not clock.strikes(900)
    now.s = 120.0
    assert clock.strikes(930)
    assert clock.describe(930, 1000) == "93%, about 4 min left"  # 30 images in 90 s, and 70 to come
    # A recording of gigabytes of which a megabyte was read was said to take 679 hours.
    assert progress._Clock(is_drawn=False).describe(10**6, 10**10) == "0%, time left not known yet"


def test_help_and_pages_name_every_format_of_the_phantom(call):
    """And every format belongs to a data set, of which `datasets` says how to try it without its files."""
    from braindecode_vis.datasets.manifests import read_manifests
    from braindecode_vis.parts.phantom import DRIVES, FORMATS, UNLABELLED
    from braindecode_vis.parts.phantom.verbs import PHANTOM_DRIVES, PHANTOM_FORMATS

    assert set(PHANTOM_FORMATS) == set(FORMATS)
    assert tuple(DRIVES) == PHANTOM_DRIVES
    page = (Path(__file__).parents[1] / "docs" / "research" / "PHANTOM.md").read_text()
    assert [name for name in FORMATS if f"`{name}`" not in page] == []
    assert {name for manifest in read_manifests().values() for name in manifest.phantoms} == set(
        FORMATS
    ) - set(UNLABELLED)
    assert "braindecode-vis phantom eeg-imagenet --out DIR" in call("datasets", "eeg_imagenet").stdout


def test_a_phantom_says_what_it_costs_before_it_starts(call, tmp_path, monkeypatch):
    # A clock that the encoder alone moves: what a busy machine takes for the same was twice as much at times.
    clock = SimpleNamespace(now=0.0, image_s=0.01)

    def encode(self, images):
        clock.now += clock.image_s * len(images)
        return np.eye(len(images))

    def read_clock():
        clock.now += 0.1
        return clock.now

    monkeypatch.setattr(
        "braindecode_vis.parts.phantom.simulate.time", SimpleNamespace(process_time=read_clock)
    )
    monkeypatch.setattr(EfficientNetEncoder, "encode", encode)
    done = call("phantom", "things-eeg2", "--size", "full", "--out", tmp_path, "--dry-run", "--json")
    estimate = json.loads(done.stdout)["estimate"]
    assert estimate["n_bytes"] > 1e11
    assert "MB on disk" in done.stderr
    # The image encoder was left out, which was half of the time of a small phantom.
    clock.image_s = 0.31
    slower = call("phantom", "things-eeg2", "--size", "full", "--out", tmp_path, "--dry-run", "--json")
    added = json.loads(slower.stdout)["estimate"]["seconds"] - estimate["seconds"]
    assert added == pytest.approx(0.3 * estimate["n_images"])
    assert not list(tmp_path.iterdir())
    check_refusal(
        call("phantom", "things-eeg3", "--out", tmp_path), "must be one of things-eeg2", "did you mean"
    )
    grid = ["phantom", "nsd", "--size", "tiny", "--voxel-mm", "1.8", "--betas", "all", "--out", tmp_path]
    check_refusal(call(*grid, "--dry-run", "--beta-form", "mat"), "form of the betas", "nii.gz, hdf5")
    assert "MB on disk" in call(*grid, "--dry-run", "--beta-form", "hdf5").stderr
    check_refusal(call("phantom", "nsd", "--size", "huge", "--out", tmp_path), "--size is 'huge'", "tiny")


def test_no_number_is_cut_in_a_narrow_window(capsys, monkeypatch):
    """Long names of metrics once left every number one character, an ellipsis behind it."""
    monkeypatch.setenv("COLUMNS", "80")
    row = {
        "method": "decoded",
        "metric": "best_of_2_50_way_top1_semantic_accuracy@efficientnet-lite0",
        "subject": "01",
    }
    numbers = {
        "value": 0.366,
        "ci_low": 0.1,
        "ci_high": 0.913,
        "chance": 0.35,
        "p_value": 0.4478,
        "n_queries": 200,
    }
    show.print_scores([row | numbers])
    shown = capsys.readouterr().out
    for text in ("0.366", "0.100-0.913", "0.350", "0.45", "200"):
        assert text in shown


def test_scores_of_groups_of_trials_name_their_group(monkeypatch, capsys):
    """Blocks of the same metrics followed each other, and nothing said which group each was of."""
    monkeypatch.setenv("COLUMNS", "120")
    row = {"metric": "top1", "subject": "01", "ci_low": 0.1, "ci_high": 0.3, "p_value": 0.5, "n_queries": 9}
    rows = [
        row | {"method": method, "split": split, "value": value, "chance": 0.1}
        for split, value in (("test", 0.21), ("test, texture", 0.22))
        for method, value in (("decoded", value), ("nearest", value + 0.5))
    ]
    show.print_scores(rows)
    lines = capsys.readouterr().out.splitlines()
    for split, value, control in (("test ", "0.210", "0.710"), ("test, texture", "0.220", "0.720")):
        assert any(split in line and value in line and f"nearest {control}" in line for line in lines), lines


def test_a_run_is_gone_on_with_though_weights_of_a_later_stage_are_not_there(tmp_path, capsys):
    """Pretraining was refused when the same command was given again."""
    config = read_config("synthetic_digits", ["target={kind: openclip}", "generator={kind: nearest}"])
    with pytest.raises(ConfigError, match="no weights were given"):
        config.hashed_fields()
    (tmp_path / "config.yaml").write_text(dump_config(config))
    _report_earlier_run(tmp_path, config.model_copy(update={"seed": 7}))
    assert "seed (0, now 7)" in " ".join(capsys.readouterr().err.split())
