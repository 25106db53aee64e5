"""The verb `pretrain` without a configuration: what it asks for, and what it passes on."""

import pytest

import braindecode_vis.cli  # noqa: F401 - verbs are imported by it
from braindecode_vis.base.checks import ConfigError
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
        ({"root": "."}, "--root and --subject are for a data set"),
        ({"subjects": ["01"]}, "--root and --subject are for a data set"),
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
