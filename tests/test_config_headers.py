"""Configurations that follow a paper say how they compare with it; the form is read here and by `describe`."""

import json

import pytest
import yaml
from typer.testing import CliRunner

import braindecode_vis as bdv
from braindecode_vis.base.checks import ConfigError
from braindecode_vis.base.registry import find_component, list_kinds
from braindecode_vis.cli import app
from braindecode_vis.config import read_config, read_header
from braindecode_vis.datasets.manifests import find_package_data

SHIPPED = {path.stem: path for path in sorted(find_package_data("configs").glob("*.yaml"))}
#: Every configuration that follows a paper; one that names a source without standing here fails a test below.
PAPERS = {
    "alljoined16m_neuralbench",
    "bold5000_wave_vith",
    "laion_fmri_ridge",
    "mosaic_wave",
    "nsd_benchetrit_generation",
    "nsd_brainit_bigg",
    "nsd_imagery_wave_full",
    "nsd_imagery_wave_generation",
    "nsd_mindeye1_vitl",
    "nsd_mindeye2_bigg",
    "nsd_mindeye2_generation",
    "things_eeg2_atm_generation",
    "things_eeg2_atm_joint",
    "things_eeg2_atm_vith",
    "things_eeg2_hcf_internvit",
    "things_eeg2_lora_clip_vitb32",
    "things_eeg2_loso_lora_clip_vitb32",
    "things_eeg2_loso_samga_internvit",
    "things_eeg2_loso_shallow_internvit",
    "things_eeg2_loso_subjectmix_internvit",
    "things_eeg2_loso_tsconv",
    "things_eeg2_neuralbench",
    "things_eeg2_neurobridge_rn50",
    "things_eeg2_nice_vitl",
    "things_eeg2_samga_internvit",
    "things_eeg2_shallow_internvit",
    "things_eeg2_shallow_vith",
    "things_eeg2_ubp_rn50",
    "things_meg_atm_generation",
    "things_meg_atm_vith",
    "things_meg_benchetrit_dinov2",
    "things_meg_benchetrit_generation",
    "things_meg_lora_clip_vitb32",
    "things_meg_loso_samga_internvit",
    "things_meg_loso_shallow_internvit",
    "things_meg_neuralbench",
    "things_meg_samga_internvit",
    "things_meg_shallow_internvit",
    "things_meg_ubp_rn50",
}
HEADER = (
    "# A net.\n# Source: Me 2026; code me/net@abc\n# As published: top-1 3,\n#   of 200\n# Same as published:\n"
    "#   - epochs: 3 (train.py)\n# Departs:\n#   - batch: 4,\n#     because of memory\nname: net\n"
)


def test_the_configurations_that_follow_a_paper_are_those_of_the_list():
    assert {name for name, path in SHIPPED.items() if read_header(path).source} == PAPERS


@pytest.mark.parametrize("name", sorted(PAPERS))
def test_a_configuration_of_a_paper_states_number_settings_and_departures(name):
    header = read_header(SHIPPED[name])
    for text in (header.about, header.source, header.as_published):
        assert text
    assert any(mark in header.source for mark in ("arXiv:", "doi:", "AAAI"))
    assert "code" in header.source  # the repository and commit, or that there is none
    assert any(mark in header.as_published for mark in ("top-1", "top-5", "%", "no number published"))
    # What a paper does not say is no sameness: it departs, as a choice of ours.
    assert not [entry for entry in header.same if "choice of ours" in entry or "not stated" in entry]
    for entry in header.same:
        setting, colon, value = entry.partition(": ")
        assert setting, entry
        assert colon, entry
        assert value, entry
    assert header.departs == ("nothing known",) or all(": " in entry for entry in header.departs)


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_a_weight_that_is_a_choice_of_ours_is_written_out(name):
    """Defaults suit a place beside CLIP: one configuration once took a paper's contrast at .03 of its weight."""
    defaults = {
        kind: find_component("objective", kind).model_fields["weight"].default
        for kind in list_kinds("objective")
    }
    encoder = yaml.safe_load(SHIPPED[name].read_text()).get("encoder") or {}
    for one in (encoder, *(encoder.get("members") or [])):
        silent = [
            o["kind"] for o in one.get("objectives") or [] if "weight" not in o and defaults[o["kind"]] != 1
        ]
        assert silent == []


@pytest.mark.parametrize("name", sorted(PAPERS))
def test_what_a_paper_does_to_its_input_is_written_out(name):
    """z-score per channel is the default, and papers that feed whitened trials as they are got it without a word."""
    written = yaml.safe_load(SHIPPED[name].read_text())["encoder"]
    if written["kind"] == "ridge":  # takes every trial as it is
        return
    assert "kind" in written["input_scaling"]
    assert read_config(name).encoder.input_scaling.kind == written["input_scaling"]["kind"]
    header = read_header(SHIPPED[name])
    stated = [entry for entry in header.same + header.departs if entry.startswith("input_scaling: ")]
    assert len(stated) == 1  # on one side only: the same, or a choice of ours


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("things_eeg2_neurobridge_rn50", 2025), ("things_eeg2_samga_internvit", 2025),
        ("things_eeg2_loso_subjectmix_internvit", 3300),
    ],
)  # fmt: skip
def test_another_seed_than_the_published_one_is_a_departure(name, published):
    (entry,) = (entry for entry in read_header(SHIPPED[name]).departs if entry.startswith("seed: "))
    assert entry.startswith(f"seed: {read_config(name).seed}; ")
    assert str(published) in entry


def test_a_header_is_read_with_wrapped_lines(tmp_path):
    (tmp_path / "net.yaml").write_text(HEADER)
    header = read_header(tmp_path / "net.yaml")
    assert (header.about, header.source) == ("A net.", "Me 2026; code me/net@abc")
    assert header.as_published == "top-1 3, of 200"
    assert header.same == ("epochs: 3 (train.py)",)
    assert header.departs == ("batch: 4, because of memory",)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("#   - epochs: 3 (train.py)\n", ""), "says nothing under Same as published"),
        (("# As published: top-1 3,\n#   of 200\n", ""), "says nothing under As published"),
        (("# Departs:\n", "# Source: twice\n# Departs:\n"), "names 'Source' twice"),
        (("#   - epochs: 3 (train.py)", "#   epochs: 3"), "has 'epochs: 3' where an entry"),
    ],
)
def test_half_a_header_is_refused(change, sentence, tmp_path):
    (tmp_path / "net.yaml").write_text(HEADER.replace(*change))
    with pytest.raises(ConfigError, match=sentence):
        read_header(tmp_path / "net.yaml")


def test_headers_are_shown_in_python_and_on_the_command_line():
    table = bdv.describe("config", "things_eeg2_ubp_rn50")
    assert set(table["part"]) == {"about", "source", "as published", "same as published", "departs"}
    assert bdv.list_configs().set_index("name").loc["nsd_ridge", "source"] == ""
    shown = CliRunner().invoke(app, ["describe", "things_eeg2_ubp_rn50"]).stdout
    assert "departs:\n  - " in shown
    told = json.loads(CliRunner().invoke(app, ["describe", "nsd_ridge", "--json"]).stdout)
    assert told["source"] == ""
    assert told["about"].startswith("nsd: ridge")
