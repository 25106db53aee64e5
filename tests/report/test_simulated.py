"""A report says whether its subjects are simulated, by which drive, and what was recorded of whom."""

import re
import shutil

import numpy as np

from braindecode_vis.config import read_config
from braindecode_vis.parts.phantom import SIZES, PhantomConfig, make_phantom
from braindecode_vis.pipeline.reporting import report
from braindecode_vis.pipeline.runs import open_run


def test_the_report_says_that_this_is_no_human_recording_and_what_drives_a_simulated_one(tmp_path):
    make_phantom(
        "v4-photographs", tmp_path / "v4", size=SIZES["v4-photographs"]["tiny"],
        config=PhantomConfig(snr=1.0, drive="colours"), embed=lambda stimuli: np.ones((len(stimuli), 8)),
    )  # fmt: skip
    changes = [
        "target={kind: pixels, size: 8}", "evaluation.features=null", "evaluation.n_bootstrap=100",
        "evaluation.n_permutations=100", "split.n_folds=2",
    ]  # fmt: skip

    def read_page(out):
        run = open_run(read_config("v4_photographs_ridge", changes, root=tmp_path / "v4"), out)
        return report(run).read_text(encoding="utf-8")

    page = read_page(tmp_path / "simulated")
    assert "Simulated subjects (drive colours), in the files of V4 photographs, macaques" in page
    shutil.rmtree(tmp_path / "v4" / "phantom_truth")  # what tells a phantom from a recording
    page = read_page(tmp_path / "recorded")
    assert "Simulated" not in page
    assert "No human recording." in page
    assert "From spike counts of 31 neurons" in page
    assert re.search(r"Modality\W.{0,80}spikes", page, re.S)
