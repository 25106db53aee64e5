import numpy as np
import pytest
import torch

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.store import read_json, read_responses, read_stimuli
from braindecode_vis.datasets.eeg_imagenet import CHANNELS, WARNING, EegImagenetConfig
from braindecode_vis.parts.phantom.formats.eeg_imagenet_format import write_part
from braindecode_vis.preprocessing.meeg import write_meeg
from tests.datasets.reading import refusals

COARSE = [f"n0210{i:04d}" for i in range(2)]
FINE = [f"n0744{i:04d}" for i in range(16)]
LABELS = FINE + COARSE


def make_entry(subject, label, number, generator, *, granularity, n_times=501, **changes):
    entry = {
        "eeg_data": torch.tensor(1e-5 * generator.normal(size=(62, n_times)), dtype=torch.float32),
        "granularity": granularity, "subject": subject, "label": label, "image": f"{label}_{number}.JPEG",
    }  # fmt: skip
    return {**entry, **changes}


def make_part(path, subjects, *, labels=LABELS, per_block=50, seed=0, **changes):
    """Write one part in the very format of the published ones: blocks of pictures of one category."""
    generator = np.random.default_rng(seed)
    entries = []
    for subject in subjects:
        for label in (labels[0], labels[8], labels[-1]):
            granularity = "coarse" if label in COARSE else "fine"
            entries += [
                make_entry(subject, label, number, generator, granularity=granularity, **changes)
                for number in range(per_block)
            ]
    write_part(path, entries, labels)
    return entries


def test_both_parts_are_read_without_any_trust(tmp_path):
    first = make_part(tmp_path / "EEG-ImageNet_1.pth", (0, 1), per_block=4)
    second = make_part(tmp_path / "EEG-ImageNet_2.pth", (8,), per_block=4, seed=1)
    summary = write_meeg(EegImagenetConfig(root=tmp_path), tmp_path / "out")
    responses = read_responses(tmp_path / "out/responses")
    assert summary["n_trials"] == 36
    assert responses.data.shape == (36, 62, 400)
    assert responses.unit == "V"
    assert responses.coords["ch_names"] == list(CHANNELS)
    assert responses.coords["sfreq"] == 1000
    np.testing.assert_allclose(responses.coords["times"][[0, -1]], [0.04, 0.439])
    assert np.isfinite(responses.coords["ch_pos"]).all()
    for row, entry in enumerate(first + second):
        np.testing.assert_array_equal(responses.data[row], entry["eeg_data"][:, 40:440].numpy())
    trials = responses.trials
    assert trials["subject"].unique().tolist() == ["00", "01", "08"]
    assert trials["run"].tolist() == 3 * (4 * ["01"] + 4 * ["02"] + 4 * ["03"])
    assert trials["stimulus_id"].iloc[1] == f"{FINE[0]}_1"
    assert trials["concept"].iloc[-1] == COARSE[-1]
    assert "file" not in trials
    stimuli = read_stimuli(tmp_path / "out/stimuli")
    assert stimuli.table["path"].iloc[0] == f"{FINE[0]}/{FINE[0]}_0.JPEG"
    assert (stimuli.table["hashed"] == "name").all()
    assert set(stimuli.concepts_of(trials["stimulus_id"])) == {FINE[0], FINE[8], COARSE[-1]}


def test_the_block_design_is_warned_of_everywhere(tmp_path):
    make_part(tmp_path / "EEG-ImageNet_1.pth", (0,), per_block=2)
    config = EegImagenetConfig(root=tmp_path)
    assert config.open_epochs().notes["warnings"] == [WARNING]
    assert config.check()[0].message == f"warning: {WARNING}"
    write_meeg(config, tmp_path / "out")
    assert read_json(tmp_path / "out/responses/meta.json")["provenance"]["warnings"] == [WARNING]
    assert read_responses(tmp_path / "out/responses").coords["warnings"] == [WARNING]


def test_the_first_thirty_pictures_of_a_block_are_for_training(tmp_path):
    make_part(tmp_path / "EEG-ImageNet.pth", (3,), n_times=60)
    source = EegImagenetConfig(root=tmp_path, samples=(40, 60)).open_epochs()
    trials = source.parts[0].trials
    assert trials["split"].tolist() == 3 * (30 * ["train"] + 20 * ["test"])
    assert not set(trials.loc[trials["split"] == "train", "stimulus_id"]) & set(
        trials.loc[trials["split"] == "test", "stimulus_id"]
    )


@pytest.mark.parametrize(
    ("granularity", "labels"),
    [
        ("all", {FINE[0], FINE[8], COARSE[-1]}),
        ("coarse", {COARSE[-1]}),
        ("fine", {FINE[0], FINE[8]}),
        ("fine0", {FINE[0]}),
        ("fine1", {FINE[8]}),
    ],
)
def test_a_fine_task_is_a_piece_of_eight_labels(tmp_path, granularity, labels):
    make_part(tmp_path / "EEG-ImageNet_1.pth", (0, 1), per_block=2, n_times=442)
    source = EegImagenetConfig(root=tmp_path, granularity=granularity, subjects=(1,)).open_epochs()
    assert set(source.parts[0].trials["concept"]) == labels
    assert set(source.parts[0].trials["subject"]) == {"01"}
    assert set(source.stimuli.table["concept"]) == labels


def test_channels_are_picked_by_name(tmp_path):
    entries = make_part(tmp_path / "EEG-ImageNet_1.pth", (0,), per_block=1)
    source = EegImagenetConfig(root=tmp_path, channels=("CB2", "Oz")).open_epochs()
    part = source.parts[0]
    np.testing.assert_array_equal(part.read(0, 1)[0], entries[0]["eeg_data"][[61, 59], 40:440])
    assert source.ch_pos.shape == (2, 3)
    assert source.ch_pos[0, 0] > 0  # CB2 is on the right


def test_a_file_that_names_code_is_refused_and_then_converted_on_trust(tmp_path):
    path = tmp_path / "EEG-ImageNet_1.pth"
    entries = make_part(path, (0,), per_block=2)
    content = torch.load(path, weights_only=True)
    content["made_by"] = np.random.default_rng(0).bit_generator
    torch.save(content, path)
    config = EegImagenetConfig(root=tmp_path)
    with pytest.raises(
        ConfigError, match=r"EEG-ImageNet_1\.pth holds more than tensors and text .*trust_pickle"
    ):
        config.open_epochs(tmp_path / "scratch")
    assert not config.check()[1].ok
    trusted = EegImagenetConfig(root=tmp_path, trust_pickle=True)
    assert trusted.check()[1].ok
    with pytest.raises(ConfigError, match="scratch folder"):
        trusted.open_epochs()
    write_meeg(trusted, tmp_path / "out")
    data = read_responses(tmp_path / "out/responses").data
    np.testing.assert_array_equal(data[3], entries[3]["eeg_data"][:, 40:440])
    assert not (tmp_path / "out/scratch").exists()


def test_an_old_style_file_is_read_too(tmp_path):
    path = tmp_path / "EEG-ImageNet_1.pth"
    entries = make_part(path, (0,), per_block=2)
    content = torch.load(path, weights_only=True)
    torch.save(content, path, _use_new_zipfile_serialization=False)
    part = EegImagenetConfig(root=tmp_path).open_epochs().parts[0]
    np.testing.assert_array_equal(part.read(1, 2)[0], entries[1]["eeg_data"][:, 40:440])


def test_microvolts_are_not_called_volts(tmp_path):
    path = tmp_path / "EEG-ImageNet_1.pth"
    make_part(path, (0,), per_block=2)
    content = torch.load(path, weights_only=True)
    for entry in content["dataset"]:
        entry["eeg_data"] = 1e6 * entry["eeg_data"]
    torch.save(content, path)
    assert EegImagenetConfig(root=tmp_path).open_epochs().unit == "arbitrary"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": "n99_1.JPEG"}, r"pairs the picture n99_1\.JPEG with the category .*shifted"),
        ({"label": "n99", "image": "n99_1.JPEG"}, "category n99, which is not in its list of labels"),
        ({"granularity": "medium"}, "granularity 'medium'; coarse and fine are known"),
        (
            {"eeg_data": torch.zeros(64, 501)},
            r"entry 1 \(subject 0\) should be 62 channels .* is \(64, 501\)",
        ),
        ({"eeg_data": None}, "is NoneType"),
    ],
)
def test_an_entry_that_does_not_fit_is_named(tmp_path, changes, message):
    path = tmp_path / "EEG-ImageNet_1.pth"
    make_part(path, (0,), per_block=2)
    content = torch.load(path, weights_only=True)
    content["dataset"][1].update(changes)
    torch.save(content, path)
    with pytest.raises(DataError, match=message):
        EegImagenetConfig(root=tmp_path).open_epochs()
    assert not EegImagenetConfig(root=tmp_path).check()[1].ok


def test_a_non_finite_epoch_is_named(tmp_path):
    path = tmp_path / "EEG-ImageNet_1.pth"
    make_part(path, (5,), per_block=2)
    content = torch.load(path, weights_only=True)
    content["dataset"][1]["eeg_data"][7, 100] = float("nan")
    torch.save(content, path)
    with pytest.raises(
        DataError, match=f"subject 05, file .*channel F3 is not finite in the trial of {FINE[0]}_1"
    ):
        write_meeg(EegImagenetConfig(root=tmp_path), tmp_path / "out")


def test_damage_and_wrong_places_are_told(tmp_path):
    refuse = refusals(EegImagenetConfig, root=tmp_path)
    refuse(DataError, r"expected EEG-ImageNet_1\.pth")
    path = tmp_path / "EEG-ImageNet_1.pth"
    make_part(path, (0,), per_block=2)
    refuse(DataError, r"in EEG-ImageNet_1\.pth.*, subject 9 is not there; found .*: fetch it", subjects=(9,))
    refuse(DataError, "in the layout 'single'", layout="single")
    refuse(ConfigError, "ends at 600", samples=(0, 600))
    refuse(ConfigError, "ascending pair", samples=(9, 9))
    refuse(ConfigError, "not 'Fz2'", channels=("Fz2",))
    refuse(DataError, "no entry of granularity fine3 of subject 0", granularity="fine3")
    refuse(DataError, r"folder of images .* does not exist", images=tmp_path / "absent")
    whole = path.read_bytes()
    (tmp_path / "EEG-ImageNet_2.pth").write_bytes(whole)
    refuse(DataError, "subject 0 is in both")
    (tmp_path / "EEG-ImageNet_2.pth").rename(tmp_path / "EEG-ImageNet.pth")
    refuse(ConfigError, "in the layouts parts, single; choose one")
    assert len(EegImagenetConfig(root=tmp_path, layout="parts").hash_inputs()) == 1
    (tmp_path / "EEG-ImageNet.pth").unlink()
    path.write_bytes(whole[: len(whole) // 2])
    refuse(DataError, "damaged or cut short")
    path.write_bytes(b"<html>log in first</html>")
    refuse(DataError, "is damaged")
    torch.save({"model": torch.zeros(2)}, path)
    refuse(DataError, "dictionary of dataset, labels and images, but holds model")


def test_pictures_at_hand_are_hashed(tmp_path):
    from PIL import Image

    make_part(tmp_path / "EEG-ImageNet_1.pth", (0,), per_block=2)
    folder = tmp_path / "imageNet_images" / FINE[0]
    folder.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(folder / f"{FINE[0]}_0.JPEG")
    config = EegImagenetConfig(root=tmp_path)
    assert "images" in config.hash_inputs()  # a run that was prepared without pictures is prepared again
    stimuli = config.open_epochs().stimuli
    assert stimuli.table["hashed"].tolist() == ["file"] + 5 * ["name"]
    assert stimuli.read_image(f"{FINE[0]}_0").shape == (4, 4, 3)
    assert "1 of 6 pictures are available" in config.check()[-1].message
