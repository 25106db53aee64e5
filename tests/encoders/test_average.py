"""The average of encoders, beside its members' predictions put together by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.contracts import NOTHING_LENT, BrainEncoder, CaptionWriter, predict_by_inner_folds
from braindecode_vis.base.roles import build
from braindecode_vis.base.seeds import derive_seed
from braindecode_vis.config.source import read_config
from braindecode_vis.encoders.average import AverageConfig, AverageEncoder
from braindecode_vis.report.words import describe_encoder
from tests.encoders.test_linear_gaussian import make_trials

MEMBERS = [{"kind": "ridge", "alphas": [100]}, {"kind": "linear_gaussian", "n_components": 2}]


def test_directions_are_averaged_and_survive_the_disk(tmp_path):
    responses, targets = make_trials(60, 2, seed=1)
    config = AverageConfig.model_validate({"members": MEMBERS, "weights": [3, 1]})
    encoder = build(BrainEncoder, config, seed=0)
    with pytest.raises(DataError, match="has not been fitted"):
        encoder.predict(responses)
    encoder.bind(NOTHING_LENT)
    encoder.fit(responses, targets)
    images = targets.vectors[:60].astype(float)  # each of them once
    centre = images.mean(0)
    length = np.sqrt(((images - centre) ** 2).sum(1).mean())
    found = encoder.predict(responses)
    for row in range(5):
        expected = centre
        for weight, member in zip((0.75, 0.25), encoder.members, strict=True):
            away = member.predict(responses).vectors[row] - centre
            expected = expected + length * weight * away / np.linalg.norm(away)
        np.testing.assert_allclose(found.vectors[row], expected, rtol=1e-4)
    assert found.space == targets.space
    assert (found.ids == targets.ids).all()
    encoder.write(tmp_path)
    np.testing.assert_array_equal(config.read(tmp_path).predict(responses).vectors, found.vectors)
    out = encoder.predict_out_of_fold(responses, targets)  # by refits of the whole average
    assert len(out) == len(targets)
    assert not np.allclose(out.vectors, found.vectors)


def test_one_member_may_predict_for_the_generator(tmp_path):
    """Its predictions, its likelihood and its refits; images are compared with the average all the same."""
    responses, targets = make_trials(60, 2, seed=1)
    config = AverageConfig.model_validate({"members": MEMBERS, "for_generator": 1})
    encoder = build(BrainEncoder, config, seed=0)
    encoder.fit(responses, targets)
    encoder.write(tmp_path)
    plain = build(BrainEncoder, AverageConfig.model_validate({"members": MEMBERS}), seed=0)
    plain.fit(responses, targets)
    alone = build(BrainEncoder, plain.config.members[1], seed=derive_seed(0, "average", 1))
    alone.fit(responses, targets)
    for read in (encoder, config.read(tmp_path)):
        np.testing.assert_array_equal(read.predict(responses).vectors, plain.predict(responses).vectors)
        asked = read.predict_for_generator(responses)
        np.testing.assert_array_equal(asked.vectors, alone.predict(responses).vectors)
        np.testing.assert_array_equal(asked.n_averaged, responses.n_averaged)
        likelihood = read.likelihood
        np.testing.assert_array_equal(likelihood.components, alone.likelihood.components)
    assert not encoder.predicts_alike
    averaged = plain.predict_out_of_fold(responses, targets).vectors
    assert not np.allclose(encoder.predict_out_of_fold(responses, targets).vectors, averaged)
    compared = predict_by_inner_folds(encoder, responses, targets, compared=True).vectors
    np.testing.assert_array_equal(compared, averaged)
    assert plain.likelihood is None
    assert plain.predicts_alike
    np.testing.assert_array_equal(
        plain.predict_for_generator(responses).vectors, plain.predict(responses).vectors
    )
    words = "mean of ridge (penalty 100) and linear Gaussian model; images use the linear Gaussian model only"
    assert describe_encoder({"kind": "average", "members": MEMBERS, "for_generator": 1}) == words


def test_members_of_one_kind_differ_in_their_seeds():
    config = AverageConfig.model_validate({"members": [MEMBERS[0], MEMBERS[0]]})
    first, second = config.build(seed=0).members
    assert first.seed != second.seed
    settings = {
        "kind": "average",
        "members": [{"kind": "ridge", "alphas": [10]}, {"kind": "linear_gaussian"}],
    }
    assert describe_encoder(settings) == "mean of ridge (penalty 10) and linear Gaussian model"


def test_synthetic_trials_spare_the_images_that_a_member_holds_out():
    """They would show what a network is judged by."""
    network = {"kind": "network", "selection": {"kind": "last", "hold_out": 0.2}}
    encoder = build(BrainEncoder, AverageConfig.model_validate({"members": [MEMBERS[0], network]}), seed=0)
    held = encoder.list_held_out(make_trials(60, 2, seed=1)[0])
    assert held
    assert held == encoder.members[1].list_held_out(make_trials(60, 2, seed=1)[0])


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"weights": [1]}, "weights has 1 values for 2 members"),
        ({"for_generator": 2}, "for_generator is 2, and the members are numbered 0 to 1"),
        ({"members": [MEMBERS[0], {"kind": "network", "projector": {"size": 8}}]}, r"learns its own space"),
        ({"members": [MEMBERS[0], {"kind": "network", "objectives": [{"kind": "clip_image_text"}]}]}, "reads_text"),
        ({"members": [MEMBERS[0], {"kind": "network", "view_choice": "mean"}]}, r"members\[1\]\.view_choice"),
        ({"members": [MEMBERS[0], {"kind": "network", "out_of_fold": 3}]}, r"members\[1\]\.out_of_fold"),
        ({"members": [MEMBERS[0], {"kind": "lda"}]}, "lda"),
    ],
)  # fmt: skip
def test_what_cannot_be_averaged_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        AverageConfig.model_validate({"members": MEMBERS, **changes})


def test_words_come_from_the_member_that_has_learnt_them(tmp_path):
    """They were accepted, learnt, and left out of every table without a word."""
    (tmp_path / "captions.csv").write_text("id,caption\na,a star\n")
    network = {"kind": "network", "objectives": [{"kind": "clip"}, {"kind": "captioning"}]}
    network["captions"] = tmp_path / "captions.csv"
    config = AverageConfig.model_validate({"members": [MEMBERS[0], network]})
    assert config.writes_captions
    responses, sentences = make_trials(60, 2, seed=1)
    silent = SimpleNamespace(predict_sentences=lambda responses: None, captions=None)
    writer = CaptionWriter(
        lambda responses, n_beams: [f"{responses.n_trials} {n_beams}"], lambda n_beams: f"mean {n_beams}"
    )
    speaker = SimpleNamespace(predict_sentences=lambda responses: sentences, captions=writer)
    encoder = AverageEncoder(config)
    encoder.members = [silent, speaker]
    assert encoder.predict_sentences(responses) is sentences
    assert encoder.describe(responses, 2) == ["120 2"]
    assert encoder.describe_mean(3) == "mean 3"
    mute = AverageConfig.model_validate({"members": MEMBERS})
    assert not mute.writes_captions
    encoder = AverageEncoder(mute)
    encoder.members = [silent, silent]
    assert encoder.predict_sentences(responses) is None
    with pytest.raises(ConfigError, match="no member of the average writes captions"):
        AverageEncoder(mute).describe(responses)


@pytest.mark.parametrize(
    "overrides",
    [["encoder.for_generator=null"], ["encoder.for_generator=1"], ["encoder={kind: ridge}"]],
    ids=["nobody is asked", "a network is asked", "no average"],
)
def test_nobody_trains_for_a_likelihood_that_there_is_not(overrides):
    """The prior said so after the training, and named `encoder.kind` alone."""
    with pytest.raises(
        ConfigError, match=r"in an average, set encoder\.for_generator to the number of such a member"
    ):
        read_config("phantom_eeg_average", overrides)


def test_one_trial_may_lie_in_the_middle():
    """A prediction without a direction counts as none, instead of dividing by nothing."""
    encoder = AverageConfig.model_validate({"members": MEMBERS}).build(seed=0)
    responses, targets = make_trials(60, 2, seed=1)
    encoder.fit(responses, targets)
    for member in encoder.members:
        member.predict = lambda asked: Embeddings(
            np.tile(encoder.centre, (asked.n_trials, 1)), asked.stimulus_ids, "toy"
        )
    np.testing.assert_array_equal(encoder.predict(responses).vectors[0], encoder.centre)
