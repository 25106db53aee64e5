import mne
import numpy as np
import pytest

from braindecode_vis.base.checks import ConfigError
from braindecode_vis.datasets.things_eeg2.dataset import ALL63
from braindecode_vis.parts.phantom import make_sensor_system
from braindecode_vis.parts.phantom.cortex import label_regions, make_cortex
from tests.references import assert_close


def get_power(machine, region):
    """Rms over the sources of a region of the field they make in each channel."""
    inside = label_regions(make_cortex().positions) == region
    return np.sqrt((machine.leadfield[:, inside] ** 2).mean(axis=1))


def test_caps_have_the_channels_of_the_public_data(eeg):
    assert len(ALL63) == len(set(ALL63)) == 63
    assert ALL63[0] == "Fp1"
    assert ALL63[-1] == "O2"
    assert "Fz" not in ALL63
    assert (eeg.n_channels, eeg.sfreq, eeg.unit, eeg.ch_names[-1]) == (32, 256.0, "V", "Fp2")


def test_eeg_leadfield_is_referenced_and_of_physical_size():
    machine = make_sensor_system("eeg64-biosemi")
    assert_close(machine.leadfield.mean(axis=0), 0, scale=np.abs(machine.leadfield).max())
    assert_close(machine.blink.mean(), 0, scale=np.abs(machine.blink).max())
    # 10 nAm, a typical evoked dipole, gives a fraction of a microvolt to a few microvolt (Haemaelaeinen et al. 1993).
    assert 0.3e-6 < 10e-9 * np.abs(machine.leadfield).max() < 10e-6


def test_early_visual_cortex_is_seen_at_the_back(eeg):
    strongest = [eeg.ch_names[i] for i in np.argsort(-get_power(eeg, "V1"))[:5]]
    assert all(name.startswith(("O", "PO")) for name in strongest)
    assert "Oz" in strongest


def test_blinks_are_frontal_and_of_known_size(eeg):
    order = np.argsort(-np.abs(eeg.blink))
    assert {eeg.ch_names[i] for i in order[:2]} == {"Fp1", "Fp2"}
    assert np.abs(eeg.blink).max() == pytest.approx(200e-6, rel=0.1)


def test_meg_helmet_is_of_ctf_kind(meg):
    info = meg.make_info()
    assert meg.n_channels == info["nchan"] == 272
    assert "MRO11-1609" in meg.ch_names
    assert {int(channel["coil_type"]) for channel in info["chs"]} == {
        mne.io.constants.FIFF.FIFFV_COIL_CTF_GRAD
    }
    assert meg.unit == "T"
    # 10 nAm gives tens to a few hundred femtotesla.
    assert 20e-15 < 10e-9 * np.abs(meg.leadfield).max() < 500e-15
    distance = np.linalg.norm(meg.ch_pos[:, None] - meg.ch_pos[None], axis=2)
    assert np.sort(distance, axis=1)[:, 1].min() > 0.01


def test_meg_sees_visual_cortex_at_the_back(meg):
    power = get_power(meg, "V1")
    back = meg.ch_pos[:, 1] < np.median(meg.ch_pos[:, 1])
    assert power[back].mean() > 2 * power[~back].mean()


def test_sides_are_not_swapped(eeg, meg):
    positions = make_cortex().positions
    left = (label_regions(positions) == "LO") & (positions[:, 0] < 0)
    for machine in (eeg, meg):
        power = np.sqrt((machine.leadfield[:, left] ** 2).mean(axis=1))
        assert power[machine.ch_pos[:, 0] < -0.02].mean() > power[machine.ch_pos[:, 0] > 0.02].mean()


@pytest.mark.parametrize("name", ["eeg32-emotiv", "meg-ctf272"])
def test_info_makes_a_valid_raw(name):
    machine = make_sensor_system(name)
    info = machine.make_info(100.0)
    raw = mne.io.RawArray(np.zeros((machine.n_channels, 10)), info, verbose="ERROR")
    assert tuple(raw.ch_names) == machine.ch_names
    assert tuple(raw.get_channel_types()) == machine.ch_types
    assert raw.info["sfreq"] == 100.0
    assert raw.info["line_freq"] == machine.line_freq


def test_machines_are_kept(eeg):
    assert make_sensor_system("eeg32-emotiv") is eeg
    with pytest.raises(ConfigError, match="did you mean 'eeg63'"):
        make_sensor_system("eeg36")
