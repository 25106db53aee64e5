"""Nothing that a file says lets code run or fetches anything: every way in is tried with code that leaves a mark."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

import braindecode_vis as bdv
from braindecode_vis.base import registry
from braindecode_vis.base.checks import ConfigError, DataError, say_in_python
from braindecode_vis.base.consent import ConsentError, find_code, give_consent, may_download
from braindecode_vis.base.settings import OUTSIDE
from braindecode_vis.cli import _VERBS
from braindecode_vis.config import check_files, dump_config, read_config
from braindecode_vis.embeddings.weights import read_state, weights_only
from braindecode_vis.parts.studies import sweep
from braindecode_vis.pipeline import together
from braindecode_vis.pipeline.finished_run import open_finished
from braindecode_vis.pipeline.runs import read_earlier

PAYLOAD = """
from pathlib import Path
from typing import Literal
from braindecode_vis.base.settings import Settings

Path({mark!r}).touch()


class Evil(Settings):
    kind: Literal["evil"] = "evil"

    def build(self, *, seed):
        return self
"""


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """Return the path of a mark that a module `payload_tools`, which lies on the path, leaves at import."""
    folder = tmp_path / "lying_here"
    folder.mkdir()
    path = tmp_path / "mark"
    (folder / "payload_tools.py").write_text(PAYLOAD.format(mark=str(path)))
    monkeypatch.syspath_prepend(str(folder))
    yield path
    sys.modules.pop("payload_tools", None)
    registry._load_outside.cache_clear()
    for cls in [cls for cls in OUTSIDE if cls.__module__ == "payload_tools"]:
        del OUTSIDE[cls]


EVIL = {"kind": "payload_tools:Evil"}
REFUSED = r"asks for code from outside the package \(payload_tools:Evil\).* pass --trust-code payload_tools"


def write_config(folder, **changes):
    content = yaml.safe_load(dump_config(read_config("synthetic_digits"))) | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset": EVIL}, {"target": EVIL}, {"encoder": EVIL}, {"prior": EVIL}, {"generator": EVIL},
        {"analyses": [EVIL]}, {"evaluation": {"metrics": [EVIL]}}, {"encoder": {"kind": "network", "network": EVIL}},
        {"encoder": {"kind": "network", "objectives": [EVIL]}},
        {"encoder": {"kind": "network", "augmentations": [EVIL]}},
        {"target": {"kind": "layers", "members": [EVIL]}},
    ],
)  # fmt: skip
def test_no_part_of_a_configuration_imports_code(changes, mark, tmp_path):
    folder = write_config(tmp_path / "run", **changes)
    for source in (folder, folder / "config.yaml"):
        with pytest.raises(ConfigError, match="--trust-code payload_tools"):
            read_config(source)
        with pytest.raises(ConfigError):
            read_config(source, ["seed=3"])
    with pytest.raises(ConfigError, match=r'pass trust_code="payload_tools", or import it first'):
        bdv.open_run(folder)
    with pytest.raises(ConfigError):
        open_finished(folder)
    assert not mark.exists()


def test_consent_is_of_the_call(mark, tmp_path):
    """By an option, by the kind in that very call, or by an import of one's own; the refusal says so."""
    folder = write_config(tmp_path / "run", encoder=EVIL)
    with pytest.raises(ConsentError, match=REFUSED), give_consent(code="payload"):
        read_config(folder)
    # A kind that is replaced is none that is asked for.
    assert read_config(folder, ["encoder.kind=ridge"]).encoder.kind == "ridge"
    assert not mark.exists()
    with give_consent(code=["payload_tools:Evil"]):
        assert read_config(folder).encoder.kind == "evil"
    assert mark.exists()
    assert read_config(folder).encoder.kind == "evil"  # it was imported, and has nothing to run any more


def test_consent_to_nothing_is_a_slip(command_line, tmp_path):
    """``--trust-code ""``, as of an unset variable of the shell, was taken and did nothing."""
    for name in ("", " ", ":Evil"):
        done = command_line("run", "synthetic_digits", "--out", tmp_path / "run", "--trust-code", name)
        assert done.returncode == 2
        assert done.stderr == (
            "error: --trust-code got an empty name; name a module or package, or leave it out.\n"
        )
    with pytest.raises(ConfigError, match=r"^trust_code got an empty name"):
        bdv.open_run(write_config(tmp_path / "other"), trust_code="")
    assert not (tmp_path / "run").exists()


def test_a_kind_given_in_the_call_is_consent(mark, tmp_path):
    folder = write_config(tmp_path / "run")
    with pytest.raises(ConfigError, match="has no 'Good'"):
        read_config(folder, ["encoder={kind: 'payload_tools:Good'}"])
    assert mark.exists()
    assert find_code([{"a": ({"kind": "m:C"}, {"kind": "ridge"}), "kind": "n:D"}]) == ["n:D", "m:C"]


def test_the_folder_of_an_earlier_run_is_not_taken_for_an_empty_one(mark, tmp_path):
    with pytest.raises(ConsentError):
        read_earlier(write_config(tmp_path / "run", encoder=EVIL))
    assert not mark.exists()


def test_stored_fields_of_a_stage_import_nothing(mark):
    """The audit makes components again from what a stage has stored; a class may be named there."""
    with pytest.raises(ConfigError, match=r"encoder.kind: it asks for code"):
        registry.validate_component("encoder", {"kind": "evil", "outside": {"class": "payload_tools:Evil"}})
    assert not mark.exists()


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    rng = np.random.default_rng(0)
    pictures = rng.random((12, 4, 4))
    fitted = bdv.Decoder().fit(rng.normal(size=(12, 5)), pictures)
    return fitted.save(tmp_path_factory.mktemp("decoder") / "saved")


@pytest.mark.parametrize("role", ["encoder", "target", "prior", "generator"])
@pytest.mark.parametrize("value", [EVIL, EVIL["kind"], {"kind": "views", "views": [EVIL]}])
def test_a_saved_decoder_imports_nothing(role, value, mark, decoder):
    path = decoder / "decoder.json"
    before = path.read_text()
    record = json.loads(before)
    record["parameters"][role] = value
    path.write_text(json.dumps(record))
    try:
        for read in (bdv.Decoder.load, bdv.Decoder.from_pretrained):
            with pytest.raises(ConfigError, match=r'asks for code .*pass trust_code="payload_tools"'):
                read(decoder)
        assert not mark.exists()
        if role == "generator" and isinstance(value, str):
            assert bdv.Decoder.load(decoder, trust_code="payload_tools").generator == value
    finally:
        path.write_text(before)


def test_metadata_in_the_current_folder_are_no_installation(mark, tmp_path, monkeypatch):
    """Python may have the current folder on its path; a downloaded folder could bring an entry point along."""
    folder = tmp_path / "downloaded"
    info = folder / "payload_tools-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: payload-tools\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[braindecode_vis.brain_encoders]\nevil = payload_tools:Evil\n")
    write_config(folder / "run", encoder={"kind": "evil"})
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend("")
    registry._read_entry_points.cache_clear()
    try:
        with pytest.raises(ConfigError, match="--trust-code payload_tools"):
            read_config("run")
        assert not mark.exists()
        with give_consent(code="payload_tools"):
            assert read_config("run").encoder.kind == "evil"
    finally:
        registry._read_entry_points.cache_clear()


@pytest.mark.parametrize(
    "command",
    [("-m", "braindecode_vis"), ("-P", "-c", together._START, str(Path(bdv.__file__).parents[1]))],
    ids=["python -m", "a run of a sweep"],
)
def test_files_of_the_current_folder_are_no_modules(command, tmp_path):
    """One called like a module that the command imports would be run in its place."""
    mark = tmp_path / "mark"
    for name in ("yaml", "typer", "pydantic", "payload_tools"):
        (tmp_path / f"{name}.py").write_text(PAYLOAD.format(mark=str(mark)))
    write_config(tmp_path / "run", encoder=EVIL)
    done = subprocess.run(
        [sys.executable, *command, "run", "run"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, mark.exists()) == (2, False)
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_runs_of_a_sweep_are_told_what_the_call_allows(mark, tmp_path):
    with give_consent(code="payload_tools"):
        config = read_config(write_config(tmp_path / "run", encoder=EVIL))
    assert sweep.list_consents(config) == ["--trust-code=payload_tools:Evil"]
    config = read_config("things_eeg2_ridge", ["dataset.trust_pickle=true"])
    assert sweep.list_consents(config) == ["--set=dataset.trust_pickle=true"]
    assert sweep.list_consents(read_config("synthetic_digits")) == []


def test_every_verb_that_reads_a_run_can_be_given_consent():
    without = {
        "datasets",
        "configs",
        "describe",
        "check",
        "fetch",
        "new",
        "corpus",
        "score",
        "banks",
        "weights",
        "board",
        "tracks",
        "phantom",
        "demo",
        "status",
        "collect",
        "cancel",
    }
    for name, verb in _VERBS.items():
        assert ("trust_code" in verb.__annotations__) == (name not in without), name


def test_consent_ends_and_is_said_in_both_languages():
    assert not may_download()
    with give_consent(download=True), give_consent():
        assert may_download()
    assert not may_download()
    text = "if you trust it, pass --trust-code a.b --trust-code c."
    assert say_in_python(text) == 'if you trust it, pass trust_code=["a.b", "c"], or import it first.'


def test_a_file_cannot_allow_downloads(tmp_path, monkeypatch):
    """Nor can a run folder; the flag of a call allows them wherever they are needed, and holds for the opened run."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    asked = {"kind": "timm", "allow_download": True}
    folder = write_config(
        tmp_path / "run",
        target={"kind": "layers", "members": [{"kind": "efficientnet-lite0"}, asked]},
        generator={"kind": "nearest"},
    )
    assert not read_config(folder).target.members[1].allow_download
    with pytest.raises(ConfigError, match=r"needs dinov2_base \(346 MB\).* --allow-download"):
        check_files(read_config(folder))
    with give_consent(download=True):
        config = read_config(folder)
        check_files(config)
    assert config.target.members[1].allow_download
    assert sweep.list_consents(config) == ["--allow-download"]
    folder = write_config(tmp_path / "other", target=asked, generator={"kind": "nearest"})
    assert not read_config(folder).target.allow_download
    assert read_config(folder, ["target.allow_download=true"]).target.allow_download


@pytest.mark.parametrize(
    "target",
    [
        {"kind": "openclip", "model_args": {"pretrained": "evil.pt", "weights_only": False}},
        {"kind": "openclip", "model_args": {"text_cfg": {"tokenizer_kwargs": {"trust_remote_code": True}}}},
        {"kind": "openclip", "model_args": {"vision_cfg": {"timm_model_name": "hf-hub:evil/evil"}}},
        {"kind": "timm", "model_args": {"checkpoint_path": "evil.pt"}},
        {"kind": "transformers", "weights": "random", "architecture": "clip",
         "model_args": {"attn_implementation": "evil/kernel"}},
        {"kind": "vae", "weights": "random", "model_args": {"quantization_config": {}}},
    ],
)  # fmt: skip
def test_arguments_of_an_architecture_are_sizes(target, tmp_path):
    """The libraries take other arguments too, by which a file could name weights to unpickle, or code of the hub."""
    with pytest.raises(ConfigError, match=r"model_args\.\S+ is (not a size|'hf-hub)"):
        read_config(write_config(tmp_path / "run", target=target))


def test_folders_of_networks_bring_no_code(mark, tmp_path):
    """The index of a pipeline can name modules, a configuration compiled code, a tokenizer files that lie beside it."""
    from transformers import AutoModel, AutoTokenizer

    from braindecode_vis.embeddings.caption_bank import load_parts
    from braindecode_vis.embeddings.transformers_models import read_network
    from braindecode_vis.generation.hub import _refuse_other_libraries

    (tmp_path / "model_index.json").write_text('{"_class_name": "X", "vae": ["payload_tools", "Evil"]}')
    with pytest.raises(DataError, match="needs code of the module 'payload_tools'"):
        _refuse_other_libraries(tmp_path)
    (tmp_path / "config.json").write_text('{"vision_config": {"attn_implementation": "evil/kernel"}}')
    with pytest.raises(DataError, match=r"asks for code of the hub \(attn_implementation: evil/kernel\)"):
        read_network(tmp_path, "clip")
    brought = {"auto_map": {"AutoConfig": "brought.Evil", "AutoTokenizer": ["brought.Evil", None]}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil"} | brought))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(brought))
    (tmp_path / "brought.py").write_text(PAYLOAD.format(mark=str(mark)))
    with pytest.raises(DataError, match="cannot be read"):
        load_parts(tmp_path, AutoTokenizer, AutoModel)
    assert not mark.exists()


def test_torch_files_of_packages_hold_tensors_alone(tmp_path, monkeypatch):
    """Packages that open weights themselves may not say so; the environment could even undo torch's own default."""
    import torch

    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "mark",)

    torch.save({"weights": Payload()}, tmp_path / "evil.pt")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with weights_only(), pytest.raises(Exception, match=r"[Ww]eights.only"):
        torch.load(tmp_path / "evil.pt")
    with pytest.raises(DataError, match="does not hold plain tensors"):
        read_state(tmp_path / "evil.pt")
    assert not (tmp_path / "mark").exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
