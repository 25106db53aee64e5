import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.consent import give_consent
from braindecode_vis.embeddings.weights import (
    find_files,
    find_weights,
    hash_weights,
    load_state,
    read_state,
)

STATE = {"a.weight": torch.ones(2, 3), "b": torch.zeros(1)}


def test_state_dicts_come_out_of_every_wrapper(tmp_path):
    save_file(STATE, tmp_path / "plain.safetensors")
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in STATE.items()}, "epoch": 3}, tmp_path / "lightning.ckpt"
    )
    torch.save({"model": STATE}, tmp_path / "model.pth")
    for name in ("plain.safetensors", "lightning.ckpt", "model.pth"):
        state = read_state(tmp_path / name)
        assert set(state) == set(STATE)
        torch.testing.assert_close(state["a.weight"], STATE["a.weight"])


def test_a_folder_of_shards_is_one_state_dict(tmp_path):
    names = ["model-1.safetensors", "model-2.safetensors"]
    for name, key in zip(names, STATE, strict=True):
        save_file({key: STATE[key]}, tmp_path / name)
    with pytest.raises(DataError, match=r"several weight files \(model-1\.safetensors, model-2"):
        find_files(tmp_path)
    index = {"weight_map": dict(zip(STATE, names, strict=True))}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(read_state(tmp_path)) == set(STATE)
    whole = hash_weights(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(
        DataError, match=r"is missing model-2\.safetensors, which its model\.safetensors\.index\.json lists"
    ):
        read_state(tmp_path)
    assert len(whole) == 64


def test_safetensors_come_before_pickled_twins(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    assert [p.name for p in find_files(tmp_path)] == ["model.safetensors"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no weight file"):
        find_files(tmp_path / "empty")


def test_nothing_in_a_file_runs(tmp_path):
    class Runs:
        def __reduce__(self):
            return (open, (str(tmp_path / "proof"), "w"))

    torch.save({"a": Runs()}, tmp_path / "evil.pt")
    with pytest.raises(DataError, match="does not hold plain tensors"):
        read_state(tmp_path / "evil.pt")
    assert not (tmp_path / "proof").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_programs_and_damage_are_named(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "clip.pt")
    with pytest.raises(DataError, match="is a TorchScript archive, that is, a program"):
        read_state(tmp_path / "clip.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(DataError, match="no intact safetensors file"):
        read_state(tmp_path / "cut.safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(DataError, match="holds a list, not a state dict"):
        read_state(tmp_path / "list.pt")


def test_a_partial_fit_is_refused(tmp_path):
    module = torch.nn.Linear(3, 2)
    good = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    load_state(
        module,
        good | {"head.x": torch.ones(1)},
        path=tmp_path,
        what="x",
        ignore=lambda n: n.startswith("head"),
    )
    assert float(module.weight.detach().sum()) == 6
    for change, message in [
        ({"bias": None}, r"it is missing bias \(1 missing and 0 left over of 2\)"),
        ({"extra": torch.ones(1)}, "it has extra, which is not in the network"),
        ({"bias": torch.ones(3)}, r"bias has the shape \(3,\), where the network has \(2,\)"),
    ]:
        state = {k: v for k, v in (good | change).items() if v is not None}
        with pytest.raises(DataError, match=message):
            load_state(module, state, path=tmp_path, what="a line")


def test_a_download_happens_only_if_allowed_and_its_failure_is_one_sentence(tmp_path):
    def fails(cached):
        raise OSError("no route\nto host")

    asked = []

    def fetch(cached):
        asked.append(cached)
        return Path("absent" if cached else tmp_path)

    def find(allowed, download, place="hub.org/x, revision main"):
        return find_weights(None, allowed, lambda: "the file", lambda: place, download)

    assert find_weights("random", False, lambda: "the file", lambda: "hub.org/x", fails) is None
    with pytest.raises(
        ConfigError, match=r"no weights .* or let hub\.org/x, revision main be .* --allow-download"
    ):
        find(False, fetch)
    assert asked == [True]  # the cache alone was looked at
    assert find(True, fetch) == tmp_path
    with give_consent(download=True):
        assert find(False, fetch) == tmp_path
    with pytest.raises(
        ConfigError, match=r"no weights were given: set target\.weights to the path of the file\.$"
    ):
        find(True, fetch, place="")
    with pytest.raises(ConfigError, match="could not be fetched") as caught:
        find(True, fails)
    assert "\n" not in str(caught.value)
    # What was fetched before needs no consent, unless it was cut short.
    (tmp_path / "cached.pt").touch()
    with pytest.raises(ConfigError, match="no weights were given"):
        find(False, lambda cached: tmp_path / "cached.pt")
    (tmp_path / "cached.pt").write_bytes(b"x")
    assert find(False, lambda cached: tmp_path / "cached.pt") == tmp_path / "cached.pt"


def test_a_changed_file_has_another_digest(tmp_path):
    save_file(STATE, tmp_path / "a.safetensors")
    first = hash_weights(tmp_path / "a.safetensors")
    save_file(STATE | {"c": torch.ones(4)}, tmp_path / "a.safetensors")
    assert hash_weights(tmp_path / "a.safetensors") != first
