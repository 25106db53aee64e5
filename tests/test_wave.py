"""A run that pretrains its own encoder: the stage, its place in fingerprints, and what audit and tables know of it."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from braindecode_vis import pipeline
from braindecode_vis.base import store
from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.cli import app
from braindecode_vis.config import validate_config
from braindecode_vis.embeddings import sentence_encoder
from braindecode_vis.parts.analyses.analyze import analyze
from braindecode_vis.parts.audit.run import audit_run
from braindecode_vis.parts.cluster.submitting import read_cluster
from braindecode_vis.parts.cluster.verbs import _share
from braindecode_vis.parts.phantom import SIZES as SIZES_OF
from braindecode_vis.parts.phantom.simulate import make_phantom
from braindecode_vis.parts.studies.plan import plan_run
from braindecode_vis.parts.studies.pretrain import pretrain
from braindecode_vis.parts.studies.settings_table import list_differing
from braindecode_vis.pipeline.preparing import _keep_training, find_shared_subjects
from braindecode_vis.pipeline.runs import list_changes, open_run
from braindecode_vis.preprocessing.splits import Fold
from braindecode_vis.training.pretraining_config import PretrainConfig

SIZES = {"width": 16, "depth": 1, "n_heads": 2, "mlp_ratio": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """36 images seen twice; the four parcels of one network follow the image, those of two others are noise."""
    folder, rng = tmp_path_factory.mktemp("parcels"), np.random.default_rng(0)
    n, shown = 36, np.arange(72) // 2
    pixels = rng.integers(0, 256, (n, 4, 4, 3), dtype=np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    seen = (pixels[:, ::4, ::4].reshape(n, -1) - 128.0) / 74
    data = 0.5 * rng.standard_normal((72, 12, 4))
    data[:, :4] += (seen @ rng.standard_normal((48, 16)) / 7)[shown].reshape(72, 4, 4)
    names = [f"image{number:02d}" for number in range(n)]
    trials = pd.DataFrame(
        {
            "subject": "01", "session": "1", "run": "1", "stimulus_id": np.array(names)[shown],
            "repetition": np.arange(72) % 2, "split": np.where(shown < 28, "train", "test"),
        }
    )  # fmt: skip
    networks = ["Vis"] * 4 + ["Default"] * 4 + ["Limbic"] * 4
    responses = Responses(
        data.astype(np.float32), ("trial", "parcel", "time"), trials, "z", {"parcel_networks": networks}
    )
    store.write_responses(folder / "responses", responses)
    store.write_stimuli(folder / "stimuli", StimulusSet.from_pixels(pixels, names, names))
    return folder


def make_config(root, **changes):
    content = {
        "name": "own", "dataset": {"kind": "arrays", "root": str(root)}, "target": {"kind": "pixels", "size": 4},
        "pretrain": {"encoder": SIZES, "decoder_width": 8, "decoder_depth": 1, "n_epochs": 2},
        "encoder": {
            "kind": "network", "epochs": 2, "batch_size": 16, "selection": {"kind": "last", "hold_out": 0},
            "network": {"kind": "parcels", "pretrained": "pretrain", "projector_hidden": 16, **SIZES},
        },
        "generator": {"kind": "nearest"}, "evaluation": {"n_bootstrap": 100, "n_permutations": 100},
    }  # fmt: skip
    for key, value in changes.items():
        *parts, last = key.split("__")
        inner = content
        for part in parts:
            inner = inner[part]
        inner[last] = value
    return validate_config(content, where="the test")


@pytest.fixture(scope="module")
def done(root, tmp_path_factory):
    run = open_run(make_config(root), tmp_path_factory.mktemp("done"))
    pipeline.run_all(run)
    return run


def list_made(run):
    return [name for name, artifact in run.produced if not artifact.reused]


def test_pretraining_is_a_stage_that_training_hangs_on(done, root):
    assert list_made(done)[:4] == ["preprocess", "embed", "pretrain", "train fold00"]
    (fold,) = pipeline.train(done)
    pretrained = pipeline.preparing.pretrain_fold(done, 0)
    upstream = store.read_provenance(fold.artifact.path / store.PROVENANCE)["upstream"]
    assert upstream["pretrain"] == pretrained.fingerprint
    # The weights that training started from are those that were pretrained.
    encoder = pipeline.preparing.build_encoder(done, 0)
    assert encoder.pretrained == pretrained.path
    rows = json.loads((done.folder.path / "scores.json").read_text())
    assert "encoder pretrained without labels on training trials" in rows[0]["protocol"]
    stages = json.loads((done.folder.path / "provenance.json").read_text())["stages"]
    assert list(stages)[:4] == ["preprocess", "embed", "pretrain", "train fold00"]
    again = open_run(make_config(root), done.folder.path)
    pipeline.run_all(again)
    assert not list_made(again)


def test_other_pretraining_is_another_encoder_of_the_same_images(done, root):
    config = make_config(root, pretrain__n_epochs=1)
    assert list_changes(done.config, config) == ["pretrain.n_epochs (2, now 1)"]
    assert list_differing([done.config.model_dump(mode="json"), config.model_dump(mode="json")]) == [
        "pretrain.n_epochs"
    ]
    run = open_run(config, done.folder.path)
    pipeline.train(run)
    assert list_made(run) == ["pretrain", "train fold00"]
    # What nothing starts from changes nothing.
    idle = [make_config(root, encoder__network__pretrained=None, pretrain__n_epochs=n) for n in (1, 2)]
    assert list_changes(*idle) == []
    assert list_differing([each.model_dump(mode="json") for each in idle]) == []


def test_masks_follow_the_target_or_captions(done, root, tmp_path, monkeypatch):
    """The protocol no longer says that there were no labels, and another caption is another pretraining."""
    run = open_run(make_config(root, pretrain__guide="target"), done.folder.path)
    made = store.read_provenance(pipeline.preparing.pretrain_fold(run, 0).path / store.PROVENANCE)
    assert made["upstream"]["embed"] == pipeline.embed(run)[0].artifact.fingerprint
    words = "encoder pretrained on training trials with masks guided by what they show"
    assert pipeline.preparing.describe_start(run) == words
    monkeypatch.setattr(
        sentence_encoder, "SentenceEncoder",
        lambda folder, device: SimpleNamespace(
            embed_texts=lambda texts: np.array([[np.mean([len(text) for text in own]), 1.0] for own in texts])
        ),
    )  # fmt: skip
    (tmp_path / "config.json").write_text("{}")
    found = []
    for ending in ("", " again"):
        rows = [f"image{number:02d},{'word ' * number}star{ending}" for number in range(30)]
        (tmp_path / "captions.csv").write_text("\n".join(["id,caption", *rows]))
        config = make_config(
            root, pretrain__guide="captions", pretrain__captions=str(tmp_path / "captions.csv"),
            pretrain__sentence_encoder=str(tmp_path),
        )  # fmt: skip
        found.append(pipeline.preparing.pretrain_fold(open_run(config, done.folder.path), 0).fingerprint)
    assert len({made["fingerprint"], *found}) == 3
    (tmp_path / "captions.csv").write_text("id,caption\nother,a star\n")
    config = config.model_copy(
        update={"pretrain": config.pretrain.model_copy(update={"captions_digest": None})}
    )
    with pytest.raises(DataError, match="no caption for the images of the run"):
        pipeline.preparing.pretrain_fold(open_run(config, done.folder.path), 0)


def test_the_verb_and_the_stage_share_what_they_compute(done, root):
    run = open_run(make_config(root), done.folder.path)
    folder = pretrain(run)
    assert not list_made(run)
    kept = pipeline.preparing.pretrain_fold(done, 0).path
    assert (folder / "encoder.safetensors").read_bytes() == (kept / "encoder.safetensors").read_bytes()


def test_analyses_refit_from_the_pretrained_encoder(done, root):
    kinds = [{"kind": "network_ablation", "outside": "zero", "n_random": 0}]
    run = open_run(make_config(root, analyses=kinds), done.folder.path)
    (artifact,), refusals = analyze(run)
    assert not refusals
    upstream = store.read_provenance(artifact.path / store.PROVENANCE)["upstream"]
    assert upstream["pretrain0"] == pipeline.preparing.pretrain_fold(run, 0).fingerprint


def test_the_audit_knows_what_was_pretrained(done):
    audit = audit_run(done.folder.path)
    assert not audit.leaks
    (found,) = [item for item in audit.findings if item.check == "pretraining"]
    assert found.level == "ok"
    assert "56 trials, none of them tested" in found.message
    path = pipeline.preparing.pretrain_fold(done, 0).path / "encoder.json"
    before = path.read_bytes()
    path.write_bytes(before.replace(b'"depth": 1', b'"depth": 2'))
    try:
        assert any("tampered: pretrain" in item.message for item in audit_run(done.folder.path).leaks)
    finally:
        path.write_bytes(before)


def test_each_fold_pretrains_on_what_it_does_not_test(root, tmp_path):
    run = open_run(make_config(root, split={"kind": "kfold", "n_folds": 2}), tmp_path)
    with pytest.raises(DataError, match="every trial is tested by some fold"):
        pretrain(run)
    pipeline.train(run)
    made = [
        store.read_provenance(a.path / store.PROVENANCE) for name, a in run.produced if "pretrain" in name
    ]
    assert [record["fields"]["fold"] for record in made] == [0, 1]
    # Of 72 trials, 16 are declared as test trials and half of all are tested by each fold.
    tested = [fold.test for fold in pipeline.preprocess(run).folds]
    declared = (pipeline.preprocess(run).responses.trials["split"] == "test").to_numpy()
    assert [record["n_train"] + record["n_held_out"] for record in made] == [
        int((~declared & ~np.isin(np.arange(72), rows)).sum()) for rows in tested
    ]
    (found,) = [item for item in audit_run(tmp_path).findings if item.check == "pretraining"]
    assert found.level == "ok"


def test_a_fold_that_leaves_a_subject_out_pretrains_without_it():
    """Its training trials were read, being no test, although the protocol says that nothing of it was seen."""
    trials = pd.DataFrame({"subject": [*"aaabbb"], "split": ["train", "train", "test"] * 2})
    responses = SimpleNamespace(n_trials=6, trials=trials, with_trials=lambda table: table["split"].tolist())
    folds = [Fold(np.array([0, 1]), np.array([5])), Fold(np.array([3, 4]), np.array([2]))]
    prepared = SimpleNamespace(responses=responses, split=SimpleNamespace(folds=folds))
    assert _keep_training(prepared, 0) == (["train", "train", "test", "test", "test", "test"], 2)
    assert _keep_training(prepared, None) == (["train", "train", "test"] * 2, 0)
    prepared.split.folds = [Fold(np.array([0, 1, 3, 4]), np.array([2, 5]))]
    assert _keep_training(prepared, None) == (["train", "train", "test"] * 2, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrain": None}, "no section pretrain"),
        ({"pretrain__encoder": {**SIZES, "width": 32}}, r"differs from it in width \(32 and 16\)"),
        (
            {
                "encoder": {
                    "kind": "network_categories",
                    "network": {"kind": "parcels", "pretrained": "pretrain"},
                }
            },
            "encoders of images can start from",
        ),
    ],
)
def test_what_cannot_start_from_its_own_pretraining_is_refused(root, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_config(root, **changes)


def test_outside_of_a_run_there_is_nothing_to_start_from(root):
    responses = store.read_responses(root / "responses")
    encoder = make_config(root).encoder.build(seed=0)
    targets = Embeddings(np.zeros((72, 3), np.float32), responses.stimulus_ids, "none")
    with pytest.raises(ConfigError, match="which a run computes before it trains"):
        encoder.fit(responses, targets)


def test_a_tested_subject_who_was_pretrained_on_is_refused_or_named(done, root, tmp_path):
    folder = tmp_path / "pretrained"
    shutil.copytree(pipeline.preparing.pretrain_fold(done, 0).path, folder)
    record = store.read_json(folder / "encoder.json")
    rows = [{"source": root.name, "subject": "sub-01", "person": "p7"}]
    corpus = {"name": "many", "n_persons": 40, "hours": 12.5, "subjects": rows}
    store.write_json(folder / "encoder.json", {**record, "corpora": [corpus]})
    config = make_config(root, encoder__network__pretrained=str(folder))
    with pytest.raises(
        ConfigError, match=r"subject\(s\) 01 are tested here.* --hold-out .*/01\), or set pretrain"
    ):
        pipeline.train(open_run(config, tmp_path / "run"))
    named = make_config(root, encoder__network__pretrained=str(folder), pretrain__shared_subjects="named")
    words = pipeline.preparing.describe_start(open_run(named, tmp_path / "run"))
    assert words.startswith("encoder pretrained without labels on corpora of 40 persons, 12.5 h, ")
    assert words.endswith("recordings of tested subject(s) 01 among them")
    with pytest.raises(ConfigError, match="are tested here"):  # the file of weights is no way around
        pipeline.preparing.describe_start(
            open_run(
                make_config(root, encoder__network__pretrained=str(folder / "encoder.safetensors")),
                tmp_path / "run",
            )
        )
    # Nor is going on from it with the trials of the run.
    further = open_run(make_config(root, pretrain__start_from=str(folder)), tmp_path / "further")
    with pytest.raises(ConfigError, match="are tested here"):
        pipeline.train(further)
    section = {**further.config.pretrain.model_dump(mode="json"), "shared_subjects": "named"}
    further = open_run(make_config(root, pretrain=section), tmp_path / "further")
    pipeline.train(further)
    words = pipeline.preparing.describe_start(further)
    assert (
        "on training trials, begun from corpora of 40 persons, 12.5 h, recordings of tested subject(s) 01 among"
        in words
    )
    found = [item for item in audit_run(tmp_path / "further").findings if item.check == "pretraining"]
    assert {item.level for item in found} == {"transductive", "warning"}
    # What the encoder had learnt from before it was trained on counts as well.
    other = {**corpus, "subjects": [{"source": "elsewhere", "subject": "1", "person": "p1"}]}
    store.write_json(folder / "encoder.json", {**record, "corpora": [other], "earlier_corpora": [corpus]})
    with pytest.raises(ConfigError, match=r"subject\(s\) 01 are tested here"):
        pipeline.train(open_run(config, tmp_path / "later"))
    # What goes on from them on trials of the run says both.
    both = make_config(root, pretrain__start_from=str(folder), pretrain__shared_subjects="named")
    words = pipeline.preparing.describe_start(open_run(both, tmp_path / "both"))
    assert words.startswith("encoder pretrained without labels on training trials, begun from corpora of 80 ")
    # The same label in another data set is another person, unless the corpus says who it is.
    others = {"source": "elsewhere", "subject": "01", "person": "elsewhere/01"}
    assert find_shared_subjects([{"subjects": [others]}], ["own"], ["01", "02"]) == []
    known = {"source": "elsewhere", "subject": "77", "person": "own/2"}
    assert find_shared_subjects([{"subjects": [others, known]}], ["own"], ["01", "02"]) == ["02"]


def test_a_finished_run_knows_its_corpora_by_their_digests(monkeypatch, tmp_path):
    class Known:
        digest = "ab"

    monkeypatch.setattr("braindecode_vis.datasets.corpus.reader.open_corpus", lambda folder: Known)
    config = PretrainConfig(corpus=(tmp_path,))
    assert config.corpus_digests == ("ab",)
    assert config.hashed_fields()["corpus_digests"] == ["ab"]
    kept = config.model_dump(mode="json")
    Known.digest = "cd"
    with pytest.raises(ValueError, match="grown or changed"):
        PretrainConfig.model_validate(kept)

    def gone(folder):
        raise DataError("no corpus")

    monkeypatch.setattr("braindecode_vis.datasets.corpus.reader.open_corpus", gone)
    assert PretrainConfig.model_validate(kept).hashed_fields()["corpus_digests"] == ["ab"]
    with pytest.raises(DataError, match="no corpus"):
        PretrainConfig(corpus=(tmp_path,)).hashed_fields()
    # One that lies beside the configuration is known as soon as its path is.
    beside = PretrainConfig(corpus=("people",))
    monkeypatch.setattr("braindecode_vis.datasets.corpus.reader.open_corpus", lambda folder: Known)
    assert beside.replace_paths(lambda path: tmp_path / path).corpus_digests == ("cd",)


def test_a_plan_measures_the_pretraining(root):
    steps = plan_run(make_config(root), budget=0.1).steps
    names = [step.name for step in steps]
    assert names.index("pretrain") == names.index("train") - 1
    pretrain, train = (next(step for step in steps if step.name == name) for name in ("pretrain", "train"))
    assert "epochs of 28" in pretrain.how
    assert pretrain.seconds > 0
    assert train.seconds > 0


def test_jobs_pretrain_on_corpora_before_the_fits_that_share_it(root, tmp_path, monkeypatch):
    class Known:
        digest = "ab"

    monkeypatch.setattr("braindecode_vis.datasets.corpus.reader.open_corpus", lambda folder: Known)
    for corpus in ((), (str(tmp_path),)):
        section = {"encoder": SIZES, "n_epochs": 2, **({"corpus": corpus} if corpus else {})}
        config = make_config(root, split={"kind": "kfold", "n_folds": 3}, pretrain=section)
        given = {"n_workers": None, "worker": None, "out": tmp_path}
        groups = _share(
            "train", given, ["train", "own"], config, read_cluster("slurm", None, [], where="the test")
        )
        names = [[task.name for task in group] for group in groups]
        fits = ["train-0", "train-1", "train-2"]
        assert names == [["embed"], *([["pretrain"]] if corpus else []), fits, ["train"]]


@pytest.mark.slow
def test_one_command_tells_the_story_of_the_phantom(tmp_path):
    """Visual cortex first and the default mode network next, as planted; imagined pictures are known by their texts."""
    size = SIZES_OF["bold5000"]["tiny"].replace(
        n_train_concepts=80, n_train_exemplars=3, n_test_concepts=40, n_sessions=2, n_parcels=60, n_imagery=12,
        imagery_repetitions=6,
    )  # fmt: skip
    make_phantom("bold5000", tmp_path / "data", size=size, snr=0.15, seed=0)
    out = tmp_path / "run"
    answer = CliRunner().invoke(
        app, ["run", "phantom_bold_wave", "--root", str(tmp_path / "data"), "--out", str(out)]
    )
    assert answer.exit_code == 0, answer.output
    rows = {
        row["metric"]: row
        for row in json.loads((out / "scores.json").read_text())
        if row["method"] == "decoded"
    }
    assert rows["top5"]["ci_low"] > rows["top5"]["chance"]
    assert "50_way_top1_semantic_accuracy@efficientnet-lite0" in rows
    tables = {}
    for path in (out / "stages" / "analyze").glob("*/table.csv"):
        record = store.read_provenance(path.with_name(store.PROVENANCE))
        if record["fields"]["analysis"].get("own_mean"):
            continue
        tables[record["fields"]["analysis"].get("candidates", record["kind"])] = pd.read_csv(path)
    networks = tables["network_ablation"].set_index(["mode", "group"])["value"]
    assert list(networks["only"].sort_values(ascending=False).index[:2]) == ["Vis", "Default"]
    words = tables["words"].set_index(["task", "stimulus_set", "metric"]).loc[("imagery", "all", "two_way")]
    assert words["value"] > 0.5
    assert "Networks of the brain" in (out / "report.html").read_text()
