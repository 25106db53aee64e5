import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import braindecode_vis
from braindecode_vis.base.checks import ConfigError
from braindecode_vis.base.devices import (
    autocast,
    choose_device,
    full_precision_products,
    keep_random_state,
    seeded,
    take_local_gpu,
)


def test_draws_in_a_seeded_block_repeat_and_leave_the_generator_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    with seeded(1):
        first = torch.randn(3)
    with seeded(1):
        second = torch.randn(3)
    with keep_random_state():
        torch.manual_seed(1)
        third = torch.randn(3)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, third, rtol=0, atol=0)
    torch.testing.assert_close(torch.random.get_rng_state(), before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("setting", ["encoder.device", "evaluation.suite.device", "retrieval.device"])
def test_a_missing_gpu_is_said_by_the_name_of_the_setting(setting):
    assert choose_device("auto", setting=setting) == choose_device("cpu", setting=setting) == "cpu"
    for wanted in ("cuda", "cuda:1"):
        with pytest.raises(
            ConfigError, match=f"^{re.escape(setting)} is {wanted}, but torch sees no GPU here"
        ):
            choose_device(wanted, setting=setting)
    with pytest.raises(ConfigError, match=re.escape(setting)):
        choose_device("gpu", setting=setting)


def test_precision_is_entered_and_left():
    left = torch.ones(2, 2)
    with autocast("cpu", torch.bfloat16):
        assert (left @ left).dtype is torch.bfloat16
        with autocast("cpu"):
            assert (left @ left).dtype is torch.float32
    with autocast("meta", torch.bfloat16):
        assert (left @ left).dtype is torch.float32
    torch.set_float32_matmul_precision("high")
    try:
        with full_precision_products():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_one_place_chooses_devices_and_keeps_random_state():
    """Nine functions did, and a metric's missing GPU was blamed on the target's setting."""
    words = r"cuda\.is_available\(|fork_rng\(|torch\.manual_seed\(|torch\.autocast\(|cudnn\.flags"
    package = Path(braindecode_vis.__file__).parent
    found = [str(p.relative_to(package)) for p in package.rglob("*.py") if re.search(words, p.read_text())]
    assert found == ["base/devices.py"]


def test_the_module_does_not_import_torch():
    code = "import sys, braindecode_vis.base.devices; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_process_that_computes_for_itself_sees_the_gpu_of_its_local_rank(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")  # fewer than processes: in turn
    take_local_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"
    take_local_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"
