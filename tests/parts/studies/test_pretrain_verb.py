"""The verb `pretrain` without a configuration: what it asks for, and what it passes on."""

from unittest.mock import Mock

import pytest

import braindecode_vis.cli  # noqa: F401 - verbs are imported by it
from braindecode_vis.base import store
from braindecode_vis.base.checks import ConfigError
from braindecode_vis.base.seeds import derive_seed
from braindecode_vis.encoders.parcels_config import DESCRIPTION
from braindecode_vis.parts.studies import pretrain as pretraining
from braindecode_vis.parts.studies.verbs import pretrain


@pytest.fixture
def asked(monkeypatch):
    told = []

    def pretrain_on_corpora(changes, corpus, out, *, seed, listener):
        told.append((changes, corpus, out, seed))
        return {}

    monkeypatch.setattr(pretraining, "pretrain_on_corpora", pretrain_on_corpora)
    monkeypatch.setattr("braindecode_vis.parts.studies.verbs._describe_reached", lambda reached: "reached")
    return told


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"corpus": None}, "or --corpus DIR and --out FOLDER"),
        ({"out": None}, "or --corpus DIR and --out FOLDER"),
        ({"root": "."}, "--root and --subject apply to a data set"),
        ({"subjects": ["01"]}, "--root and --subject apply to a data set"),
        ({"overrides": ["seed=-1"]}, "seed is -1, but should be a whole number from 0"),
        ({"overrides": ["seed=1.5"]}, "seed is 1.5, but should be a whole number from 0"),
    ],
)
def test_what_a_corpus_has_no_use_for_is_refused(options, words, asked, tmp_path):
    with pytest.raises(ConfigError, match=words):
        pretrain(**{"corpus": [tmp_path], "out": tmp_path / "out", **options})
    assert not asked


def test_settings_and_seed_are_passed_on(asked, tmp_path):
    place = {"corpus": [tmp_path], "out": tmp_path / "out"}
    pretrain(**place)
    pretrain(**place, overrides=["n_epochs=5", "pretrain.encoder.width=16", "seed=4"])
    assert asked == [
        ({}, [tmp_path], tmp_path / "out", 0),
        ({"n_epochs": 5, "encoder": {"width": 16}}, [tmp_path], tmp_path / "out", 4),
    ]


def test_a_training_keeps_its_work_beside_it_and_is_not_made_twice(tmp_path, monkeypatch):
    """Labels and checkpoints lie in one folder of the encoder, which goes when the training is finished."""
    made = []

    def fit(config, data, *, folder, checkpoints, seed, progress, labelled, fingerprint):
        assert checkpoints.is_dir()
        made.append((checkpoints, seed, labelled))
        store.write_json(folder / DESCRIPTION, {"fingerprint": fingerprint, "reached": {"loss": 0.5}})
        return {"loss": 0.5}

    monkeypatch.setattr("braindecode_vis.training.pretraining.pretrain", fit)
    monkeypatch.setattr(
        pretraining.preparing, "read_labelled", lambda config, seed, work: ("labels", seed, work)
    )
    monkeypatch.setattr(pretraining, "make_settings", lambda changes: Mock(hashed_fields=lambda: changes))
    out = tmp_path / "out"
    assert pretraining.pretrain_on_corpora({}, [tmp_path], out, seed=3) == {"loss": 0.5}
    assert [path.name for path in out.iterdir() if not path.name.startswith(".")] == [DESCRIPTION]
    assert pretraining.pretrain_on_corpora({}, [tmp_path], out, seed=3) == {"loss": 0.5}
    ((checkpoints, seed, labelled),) = made
    assert labelled == ("labels", 3, checkpoints)
    assert checkpoints.parent == out
    with pytest.raises(
        ConfigError, match="holds an encoder that was pretrained with other settings, another seed"
    ):
        pretraining.pretrain_on_corpora({}, [tmp_path], out, seed=4)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.pdf").touch()
    with pytest.raises(ConfigError, match="holds other files than an encoder"):
        pretraining.pretrain_on_corpora({}, [tmp_path], tmp_path / "mine", seed=3)
    assert (len(made), seed) == (1, derive_seed(3, "pretrain"))
