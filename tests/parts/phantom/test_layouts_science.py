"""Signal goes from the simulated brain through the files of each layout to the decoder: trials keep their images."""

import pytest

from braindecode_vis import pipeline
from braindecode_vis.config import read_config
from braindecode_vis.parts.phantom import SIZES
from braindecode_vis.parts.phantom.simulate import make_phantom
from braindecode_vis.pipeline.runs import open_run

MANY = {"n_train_concepts": 40, "n_test_concepts": 10}
FEW = {"n_train_concepts": 20, "n_train_exemplars": 2, "n_test_concepts": 10}
# Format: configuration, signal-to-noise ratio, changes of the tiny size.
LAYOUTS = {
    "alljoined1": ("alljoined1_ridge", 30, {**MANY, "n_train_exemplars": 2}),
    "alljoined16m": ("alljoined16m_ridge", 30, MANY),
    "bold5000": ("bold5000_ridge", 3, MANY),
    "bold5000-betas": ("bold5000_betas_ridge", 3, MANY),
    "deeprecon": ("deeprecon_ridge", 3, MANY),
    "eeg-imagenet": ("eeg_imagenet_ridge", 30, {"n_train_concepts": 5, "n_test_concepts": 10}),
    "nod": ("nod_ridge", 3, MANY),
    "nsd-brain-diffuser": ("nsd_repack_ridge", 3, FEW),
    "nsd-mindeye1": ("nsd_repack_ridge", 3, FEW),
    "nsd-mindeye2": ("nsd_repack_ridge", 3, FEW),
    "nsd-timeseries": ("nsd_timeseries_ridge", 3, FEW),
    "things-eeg1": ("things_eeg1_ridge", 30, MANY),
    "things-eeg2-neurobridge": ("things_eeg2_ridge", 30, MANY),
    "things-eeg2-ubp": ("things_eeg2_ridge", 30, MANY),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", LAYOUTS)
def test_strong_signal_is_decoded_from_the_files_of_a_layout(form, tmp_path):
    """Measured: 0.5 to 1.0 (THINGS-EEG1, where ten responses overlap, is the lowest); chance 0.1, events shifted by
    one trial give that.
    """
    source, snr, changes = LAYOUTS[form]
    size = SIZES[form]["tiny"].replace(**changes)
    make_phantom(form, tmp_path / "data", size=size, snr=snr, seed=0)
    options = ["evaluation.n_bootstrap=100", "evaluation.n_permutations=100"]
    options += ["dataset.trust_pickle=true"] if form.endswith("ubp") else []
    run = open_run(read_config(source, options, root=tmp_path / "data"), tmp_path / "run")
    rows = pipeline.run_all(run)
    (top1,) = [row["value"] for row in rows if (row["metric"], row["method"]) == ("top1", "decoded")]
    assert top1 >= 0.4
