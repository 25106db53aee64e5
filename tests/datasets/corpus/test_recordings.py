"""What the tables at the root of a source say."""

import json

import pytest

from braindecode_vis.base.checks import DataError
from braindecode_vis.datasets.corpus.recordings import read_source_card


def test_name_licence_and_sites_of_a_source(tmp_path):
    derived = tmp_path / "archive" / "derivatives" / "fmriprep"
    derived.mkdir(parents=True)
    (tmp_path / "archive" / "participants.tsv").write_text(
        "participant_id\tage\tsite\nsub-01\t20\tNYU\n02\t30\tn/a\n"
    )
    card = read_source_card(derived)
    assert (card.name, card.licence) == ("archive", "")
    assert [card.find_site(subject) for subject in ("01", "02", "03")] == ["NYU", "archive", "archive"]
    about = {"Name": "fMRIPrep - fMRI PREProcessing workflow", "DatasetType": "derivative"}
    (derived / "dataset_description.json").write_text(json.dumps(about))
    assert read_source_card(derived).name == "archive"  # not one name for all that fMRIPrep made
    (derived / "dataset_description.json").write_text(json.dumps({"Name": "Many heads", "License": "CC0"}))
    card = read_source_card(derived)
    assert (card.name, card.licence, card.find_site("03")) == ("Many heads", "CC0", "Many heads")
    (derived / "dataset_description.json").write_text("{")
    with pytest.raises(DataError, match=r"dataset_description.json is not valid JSON"):
        read_source_card(derived)
    with pytest.raises(DataError, match="is not a folder"):
        read_source_card(tmp_path / "nowhere")
