"""Own data and encoders as they are named: what was said of them is kept, and short names stand for settings."""

import numpy as np
import pytest

import braindecode_vis as bdv
from braindecode_vis.api.own import read_encoder


@pytest.mark.parametrize(
    ("encoder", "knows_images", "settings"),
    [
        (None, True, {"kind": "ridge"}),
        (None, False, {"kind": "lda"}),
        ("ridge", True, {"kind": "ridge"}),
        ("Linear-Gaussian", True, {"kind": "linear_gaussian"}),
        ("atm-s", True, {"kind": "network", "network": {"kind": "atm_s"}}),
        ("EEGProject", False, {"kind": "network", "network": {"kind": "eegproject"}}),
        ("network", True, {"kind": "network"}),
        ("my.module:Class-A", True, {"kind": "my.module:Class-A"}),
        ({"kind": "ridge", "alphas": [1.0]}, True, {"kind": "ridge", "alphas": [1.0]}),
    ],
)
def test_a_name_stands_for_an_encoder_and_that_of_a_network_for_one_with_it(encoder, knows_images, settings):
    assert read_encoder(encoder, knows_images=knows_images) == settings


@pytest.mark.parametrize(
    ("encoder", "words"), [(7, "must be a name"), ({"kind": "atm_s"}, "one level deeper")]
)
def test_what_names_no_encoder_is_refused(encoder, words):
    with pytest.raises(bdv.ConfigError, match=words):
        read_encoder(encoder, knows_images=True)


@pytest.mark.parametrize(
    "about",
    [
        {},
        {"title": "Mine"},
        {"title": "Mine", "citation": "Me (2026)"},
        {"modality": "meg", "citation": "Me (2026)", "title": "Mine"},
    ],
)
def test_what_is_said_of_arrays_is_kept_and_nothing_else(about):
    data = bdv.from_arrays(
        np.random.default_rng(0).normal(size=(4, 3)), labels=list("abab"), unit="uV", **about
    )
    assert data._describe() == about
    assert data.responses.unit == "uV"
