"""Every network that a paper published has as many parameters as the class in the paper's public code."""

import pytest
import torch

from braindecode_vis.encoders.atm_config import AtmSConfig, EEGProjectConfig, TSConvConfig
from braindecode_vis.encoders.latent_decoder_config import LatentDecoderConfig
from braindecode_vis.encoders.mindeye_config import ResidualMlpConfig, SharedSpaceConfig
from braindecode_vis.encoders.signal import Signal

TEN = tuple(f"{i:02d}" for i in range(1, 11))


def make_signal(n_channels, n_times=None, subjects=("01",)):
    if n_times is None:
        return Signal(("voxel",), (n_channels,), subjects, n_voxels=(n_channels,) * len(subjects))
    return Signal(("channel", "time"), (n_channels, n_times), subjects, sfreq=250.0)


# Counted by building the public class (revision in the configuration of the paper). Left out: the temperature, which is
# no part of ours, ATM's embeddings that nothing reads, and MindEye2's mixer blocks, which cancel.
@pytest.mark.parametrize(
    ("config", "signal", "n_outputs", "published"),
    [
        pytest.param(EEGProjectConfig(), make_signal(17, 250), 1024, 5_404_672, id="UBP, NeuroBridge"),
        pytest.param(EEGProjectConfig(), make_signal(271, 201), 1024, 56_830_976, id="UBP, MEG"),
        pytest.param(TSConvConfig(), make_signal(63, 250), 768, 103_680 + 1_698_816, id="NICE"),
        pytest.param(TSConvConfig(), make_signal(63, 250), 1024, 2_630_912, id="NeuroBridge across subjects"),
        pytest.param(AtmSConfig(), make_signal(63, 250, TEN), 1024, 3_075_412, id="ATM-S"),
        pytest.param(LatentDecoderConfig(), make_signal(63, 250), 4 * 64 * 64, 143_332_772, id="ATM, low level"),
        pytest.param(ResidualMlpConfig(heads="two"), make_signal(15724), 768, 142_076_928, id="MindEye1, pooled"),
        pytest.param(
            ResidualMlpConfig(heads="two", n_tokens=257), make_signal(15724), 257 * 768, 947_579_904, id="MindEye1"
        ),
        pytest.param(
            SharedSpaceConfig(n_tokens=256), make_signal(15724), 256 * 1664, 64_409_600 + 1_753_578_112, id="MindEye2"
        ),
    ],
)  # fmt: skip
def test_a_network_has_the_published_number_of_parameters(config, signal, n_outputs, published):
    with torch.device("meta"):
        network = config.build(signal, n_outputs)
    assert sum(p.numel() for p in network.parameters()) == published
