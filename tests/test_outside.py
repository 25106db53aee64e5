"""Components from outside the package: a small package that knows only `settings`, arrays and the methods of a role.

The package is written into a folder that is put on the path, with the metadata that pip would write.
"""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from braindecode_vis.base import registry
from braindecode_vis.base.checks import ConfigError
from braindecode_vis.base.settings import OUTSIDE
from braindecode_vis.config import check_files, dump_config, list_kinds, read_config
from braindecode_vis.pipeline.learning import predict_out_of_fold
from braindecode_vis.pipeline.runs import open_run

#: Role -> key of the entry points, kind, class.
ENTRIES = {
    "dataset": ("braindecode_vis.datasets", "stripes", "StripesConfig"),
    "target": ("braindecode_vis.image_encoders", "thirds", "ThirdsConfig"),
    "encoder": ("braindecode_vis.brain_encoders", "least_squares", "LeastSquaresConfig"),
    "network": ("braindecode_vis.networks", "one_layer", "OneLayerConfig"),
    "objective": ("braindecode_vis.objectives", "squares", "SquaresConfig"),
    "augmentation": ("braindecode_vis.augmentations", "flip", "FlipConfig"),
    "prior": ("braindecode_vis.priors", "halfway", "HalfwayConfig"),
    "generator": ("braindecode_vis.generators", "flat", "FlatConfig"),
    "metric": ("braindecode_vis.metrics", "brightness_gap", "BrightnessGapConfig"),
    "analysis": ("braindecode_vis.analyses", "count_trials", "CountTrialsConfig"),
}

MODULE = '''
"""One component of every role, with the methods that the role requires and no others."""

from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from braindecode_vis.parts.analyses.study import Findings
from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.settings import Settings
from braindecode_vis.base.stimuli import StimulusSet, hash_pixels
from braindecode_vis.base.store import write_responses, write_stimuli
from braindecode_vis.training.objectives.objectives_config import ObjectiveConfig

WIDTH = 1.0  # changed by a test of the fingerprint


class StripesConfig(Settings):
    kind: Literal["stripes"] = "stripes"
    n_images: int = 60

    def check(self):
        return []

    def hash_inputs(self):
        return {}

    def write(self, folder: Path, *, seed: int) -> None:
        rng = np.random.default_rng(seed)
        pixels = np.repeat(rng.integers(0, 256, (self.n_images, 12, 1, 3), dtype=np.uint8), 12, axis=2)
        ids = [f"stripe_{i:03d}" for i in range(self.n_images)]
        concepts = [f"concept_{i % 12}" for i in range(self.n_images)]
        split = np.where(np.arange(self.n_images) < self.n_images - 12, "train", "test")
        trials = pd.DataFrame({
            "subject": "01", "session": "01", "run": "01", "stimulus_id": ids, "repetition": 0, "split": split,
            "concept": concepts,
        })
        signal = pixels.reshape(self.n_images, -1) @ rng.standard_normal((432, 40)) / 5000
        data = (signal + 0.3 * rng.standard_normal(signal.shape)).astype(np.float32)
        write_responses(folder / "responses", Responses(data, ("trial", "voxel"), trials, "a.u.", {}))
        write_stimuli(folder / "stimuli", StimulusSet.from_pixels(pixels, ids, concepts, source="made up"))


class Thirds:
    space = "thirds"

    def encode(self, images):
        rows = [np.asarray(image).reshape(3, -1, 3).mean(axis=1).ravel() for image in images]
        return np.asarray(rows, dtype=np.float32).reshape(-1, 9)


class ThirdsConfig(Settings):
    kind: Literal["thirds"] = "thirds"

    def build(self):
        return Thirds()


class LeastSquares:
    def fit(self, responses, targets):
        x = np.c_[responses.data, np.ones(len(responses.data))]
        self.space = targets.space
        self.weights = np.linalg.lstsq(x.T @ x + 10 * np.eye(x.shape[1]), x.T @ targets.vectors, rcond=None)[0]
        return self

    def predict(self, responses):
        x = np.c_[responses.data, np.ones(len(responses.data))]
        return Embeddings((x @ self.weights).astype(np.float32), responses.stimulus_ids, self.space)

    def write(self, folder):
        np.save(folder / "weights.npy", self.weights)
        (folder / "space.txt").write_text(self.space)

    def read(self, folder):
        self.weights, self.space = np.load(folder / "weights.npy"), (folder / "space.txt").read_text()
        return self


class LeastSquaresConfig(Settings):
    kind: Literal["least_squares"] = "least_squares"

    def build(self, *, seed):
        return LeastSquares()


class OneLayerConfig(Settings):
    kind: Literal["one_layer"] = "one_layer"

    def build(self, signal, n_outputs):
        from torch import nn

        class OneLayer(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(int(np.prod(signal.shape)), n_outputs)

            def forward(self, data, subject):
                return self.layer(data.flatten(1))

        return OneLayer()


class SquaresConfig(ObjectiveConfig):
    kind: Literal["squares"] = "squares"
    needs = frozenset({"regression"})
    contrastive = False

    def build(self):
        from torch import nn

        class Squares(nn.Module):
            def forward(self, outputs):
                return (outputs.regression - outputs.raw_target).square().mean()

        return Squares()


class FlipConfig(Settings):
    kind: Literal["flip"] = "flip"

    def apply(self, data, generator, signal):
        return data


class Halfway:
    def fit(self, predicted, target, *, images=None):
        self.mean = target.vectors.mean(axis=0)
        return self

    def sample(self, predicted, *, n_draws, seed):
        vectors = np.repeat((predicted.vectors + self.mean) / 2, n_draws, axis=0)
        return Embeddings(vectors, np.repeat(predicted.ids, n_draws), predicted.space)


class HalfwayConfig(Settings):
    kind: Literal["halfway"] = "halfway"

    def build(self, *, seed):
        return Halfway()


class Flat:
    def accepts(self, space):
        return space == "thirds"

    def generate(self, embeddings, *, seed):
        thirds = np.clip(embeddings.vectors, 0, 255).astype(np.uint8).reshape(-1, 3, 1, 3)
        return np.repeat(np.repeat(thirds, 4, axis=1), 12, axis=2)


class FlatConfig(Settings):
    kind: Literal["flat"] = "flat"

    def build(self, data):
        return Flat()


class BrightnessGapConfig(Settings):
    kind: Literal["brightness_gap"] = "brightness_gap"

    def build(self):
        from braindecode_vis.scoring.metrics.metric_registry import Metric

        return Metric("brightness_gap", "Brightness gap", direction=-1, on="images",
                      compare=lambda made, seen: abs(made.mean((1, 2, 3)) - seen.mean((1, 2, 3))))


class CountTrialsConfig(Settings):
    kind: Literal["count_trials"] = "count_trials"

    def compute(self, study):
        counts = [len(fold.test) for fold in study.folds]
        return Findings("Trials", f"{sum(counts)} test trials.", pd.DataFrame({"n": counts}))
'''


def write_package(folder, module=MODULE, *, name="stripes_tools", version="1.2", entries=ENTRIES):
    """Write a package with its metadata into `folder`, as ``pip install --target`` would."""
    package = folder / name
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").touch()
    (package / "parts.py").write_text(module)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
    )
    (info / "top_level.txt").write_text(name)
    lines = [f"[{group}]\n{kind} = {name}.parts:{cls}\n" for group, kind, cls in entries.values()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return folder


def forget():
    registry._read_entry_points.cache_clear()
    registry._load_outside.cache_clear()
    importlib.invalidate_caches()
    for name in [name for name in sys.modules if name.partition(".")[0].endswith(("_tools", "my_package"))]:
        del sys.modules[name]
    for cls in list(OUTSIDE):
        del OUTSIDE[cls]


@pytest.fixture
def on_path(tmp_path, monkeypatch):
    """Put a folder on the path and take it off again with all that was learnt from it."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    forget()
    yield folder
    forget()


@pytest.fixture
def installed(on_path):
    return write_package(on_path)


def call_anew(*arguments, path, code=0):
    """Call the command as a process of its own, which knows what lies on its path and nothing else."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-m", "braindecode_vis", *map(str, arguments)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done


CONFIG = {
    "name": "outside",
    "dataset": {"kind": "stripes"},
    "target": {"kind": "thirds"},
    "encoder": {"kind": "least_squares"},
    "prior": {"kind": "halfway"},
    "generator": {"kind": "flat"},
    "evaluation": {"n_bootstrap": 100, "n_permutations": 100, "metrics": [{"kind": "brightness_gap"}]},
    "analyses": [{"kind": "count_trials"}],
}
NETWORK = {
    "kind": "network", "network": {"kind": "one_layer"}, "objectives": [{"kind": "squares"}],
    "augmentations": [{"kind": "flip"}], "epochs": 2, "batch_size": 16, "device": "cpu",
}  # fmt: skip


def write_config(folder, **changes):
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, **changes}))
    return path


def test_every_role_has_a_component_here():
    assert set(ENTRIES) == set(registry.GROUPS)
    assert {role: entry[0] for role, entry in ENTRIES.items()} == registry.GROUPS


@pytest.fixture
def call(command_line):
    """Call the command in this process, on whose path the package lies."""

    def call(*arguments, code=0):
        done = command_line(*arguments)
        assert done.returncode == code, done.stderr
        return done

    return call


def test_a_component_of_every_role_goes_through_a_whole_run(installed, tmp_path, call):
    """Settings, stages, analysis, audit and report; nothing of the package knows these classes."""
    out = tmp_path / "run"
    source = write_config(tmp_path)
    call_anew("run", source, "--out", out, path=installed)
    call("analyze", out)
    call("report", out)
    assert "wrong" not in call("audit", out).stdout
    scores = json.loads((out / "scores.json").read_text())
    assert {"brightness_gap", "top1", "pixcorr"} <= {row["metric"] for row in scores}
    assert {"decoded", "shuffled", "nearest", "mean_image", "mean_embedding", "oracle"} <= {
        row["method"] for row in scores
    }
    (top1,) = [row for row in scores if (row["metric"], row["method"]) == ("top1", "decoded")]
    assert top1["value"] > 0.3  # chance is 1 in 12
    predicted = predict_out_of_fold(open_run(read_config(source), out))[0].predicted
    assert len(set(predicted.ids)) == 48  # the training images
    provenance = json.loads((out / "provenance.json").read_text())
    named = {entry["kind"]: entry for entry in provenance["outside"]}
    assert set(named) == {
        "stripes", "thirds", "least_squares", "halfway", "flat", "brightness_gap", "count_trials",
    }  # fmt: skip
    assert named["thirds"]["package"] == "stripes-tools"
    assert named["thirds"]["version"] == "1.2"
    assert named["thirds"]["reference"] == "stripes_tools.parts:ThirdsConfig"
    assert len(named["thirds"]["sha256"]) == 64
    page = (out / "report.html").read_text()
    assert "stripes_tools.parts:ThirdsConfig" in page
    assert "stripes-tools" in page
    # a second look recomputes nothing
    assert "computed" not in call("run", out).stderr
    # the same folder where the package is not installed
    shutil.rmtree(installed)
    forget()
    refused = call("report", out, code=2)
    sentence = refused.stderr.strip().splitlines()[-1]
    assert "unknown kind 'stripes' in dataset.kind" in sentence
    assert "stripes_tools.parts:StripesConfig of stripes-tools 1.2" in sentence
    assert "must be installed here" in sentence
    # the audit needs no configuration, and says what it could not make once more
    told = json.loads(call("audit", out, "--json").stdout)
    sentences = [finding["message"] for finding in told["findings"] if finding["level"] == "warning"]
    assert any(
        "config.yaml cannot be read" in text and "must be installed here" in text for text in sentences
    )


def test_network_objective_and_augmentation_from_outside(installed, tmp_path, call):
    out = tmp_path / "run"
    call("run", write_config(tmp_path, encoder=NETWORK), "--out", out)
    assert "wrong" not in call("audit", out).stdout
    provenance = json.loads((out / "provenance.json").read_text())
    assert {"one_layer", "squares", "flip"} <= {entry["kind"] for entry in provenance["outside"]}


def write_page_package(folder, **changes):
    """Write the modules that docs/OUTSIDE.md shows, with some of their text replaced."""
    page = (Path(__file__).parents[1] / "docs" / "OUTSIDE.md").read_text()
    found = dict(re.findall(r"```python\n# my_package/(\w+)\.py\n(.*?)```", page, flags=re.DOTALL))
    assert set(found) == {"nearest", "nets"}
    package = folder / "my_package"
    package.mkdir()
    (package / "__init__.py").touch()
    for name, text in found.items():
        for old, new in changes.get(name, {}).items():
            assert old in text
            text = text.replace(old, new)
        (package / f"{name}.py").write_text(text)
    return re.findall(r"braindecode-vis run synthetic_digits (.*)", page)


QUICK = ["--set", "evaluation.n_bootstrap=100", "--set", "evaluation.n_permutations=100"]


def test_the_examples_of_the_page_run_as_they_stand(on_path, tmp_path, call):
    commands = write_page_package(on_path)
    assert len(commands) == 2
    for number, (command, more) in enumerate(zip(commands, ([], ["--set", "encoder.epochs=2"]), strict=True)):
        out = tmp_path / f"run{number}"
        call("run", "synthetic_digits", *command.split(), *more, *QUICK, "--out", out)
        assert (out / "report.html").is_file()
        assert not (out / "work").exists()


@pytest.mark.parametrize(
    ("module", "old", "new", "sentence"),
    [
        (
            "nearest", "        return self\n\n\nclass", "        pass\n\n\nclass",
            "read of the brain encoder 'nearest_trial' returned None",
        ),
        (
            "nets", "nn.Linear(math.prod(signal.shape), n_outputs)", "nn.LazyLinear(n_outputs)",
            "the network 'my_net' has no weights yet in 'layer.weight'",
        ),
        (
            "nets", "return self.layer(data.flatten(1))",
            "self.late = nn.Linear(n_outputs, n_outputs); return self.late(self.layer(data.flatten(1)))",
            "the network creates its weights 'late.bias' in its first forward",
        ),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_could_not_be_read_back_is_refused(module, old, new, sentence, on_path, tmp_path, command_line):
    commands = write_page_package(on_path, **{module: {old: new}})
    (command,) = [text for text in commands if f"my_package.{module}" in text]
    refused = command_line("train", "synthetic_digits", *command.split(), "--out", tmp_path / "run")
    assert refused.returncode == 2
    assert sentence in refused.stderr.strip().splitlines()[-1]


def test_the_code_enters_the_fingerprint(on_path, tmp_path):
    source = write_config(tmp_path)
    found = []
    for version, module in (
        ("1.2", MODULE),
        ("1.3", MODULE),
        ("1.3", MODULE.replace("WIDTH = 1.0", "WIDTH = 2.0")),
    ):
        for old in on_path.glob("*.dist-info"):
            for file in old.iterdir():
                file.unlink()
            old.rmdir()
        write_package(on_path, module, version=version)
        forget()
        found.append(read_config(source).encoder.hashed_fields())
    assert [fields["outside"]["version"] for fields in found] == ["1.2", "1.3", "1.3"]
    digests = [fields["outside"]["sha256"] for fields in found]
    assert digests[0] == digests[1] != digests[2]
    assert found[0]["outside"]["class"] == "stripes_tools.parts:LeastSquaresConfig"


def test_a_kind_may_be_a_module_and_a_class(installed, tmp_path):
    """No entry point is needed, and what is written out is read again."""
    source = write_config(tmp_path)
    config = read_config(source, ["encoder.kind=stripes_tools.parts:LeastSquaresConfig"])
    assert config.encoder.kind == "least_squares"
    text = dump_config(config)
    assert yaml.safe_load(text)["encoder"]["kind"] == "stripes_tools.parts:LeastSquaresConfig"
    (tmp_path / "again.yaml").write_text(text)
    assert read_config(tmp_path / "again.yaml") == config
    assert config.encoder.hashed_fields() == read_config(source).encoder.hashed_fields()
    # the audit reads the stored fields of a stage, in which the kind is a name
    stored = json.loads(json.dumps(config.encoder.hashed_fields()))
    assert registry.validate_component("encoder", stored) == config.encoder


def test_outside_kinds_are_listed_and_suggested(installed, tmp_path):
    assert "thirds" in list_kinds("target")
    with pytest.raises(ConfigError, match=r"unknown kind 'third' in target\.kind; .*did you mean 'thirds'"):
        read_config(write_config(tmp_path, target={"kind": "third"}))
    with pytest.raises(ConfigError, match=r"unknown key dataset\.n_image; .*did you mean 'n_images'"):
        read_config(write_config(tmp_path), ["dataset.n_image=3"])


def test_settings_of_a_class_from_outside_are_taken_as_they_are(installed, tmp_path):
    from stripes_tools.parts import LeastSquaresConfig

    base = read_config(write_config(tmp_path, encoder={"kind": "ridge"}))
    config = type(base).model_validate({**base.model_dump(), "encoder": LeastSquaresConfig()})
    assert config.find_outside()["encoder"].reference == "stripes_tools.parts:LeastSquaresConfig"


BROKEN = [
    ("import no_such_package_at_all\n", "encoder.kind: .*fails at import with ModuleNotFoundError"),
    ("raise RuntimeError('no\\nluck')\n", "encoder.kind: .*fails at import with RuntimeError: no luck"),
    ("import sys; sys.exit(3)\n", "fails at import with SystemExit: 3"),
    ("def LeastSquaresConfig(: pass\n", "fails at import with SyntaxError"),
    ("x = 1\n", "has no 'LeastSquaresConfig'"),
    ("class LeastSquaresConfig: pass\n", "is no subclass of braindecode_vis.base.settings.Settings"),
    (
        "from braindecode_vis.base.settings import Settings\nclass LeastSquaresConfig(Settings): pass\n",
        "has no kind; declare kind",
    ),
    (
        "from braindecode_vis.base.settings import Settings\nfrom typing import Literal\n"
        "class LeastSquaresConfig(Settings):\n    kind: Literal['other'] = 'other'\n",
        "has settings of the kind 'other'; the two names must be the same",
    ),
    (
        "from braindecode_vis.base.settings import Settings\nfrom typing import Literal\n"
        "class LeastSquaresConfig(Settings):\n    kind: Literal['least_squares'] = 'least_squares'\n",
        "cannot be the settings of an encoder: it has no build",
    ),
    (
        "from braindecode_vis.base.contracts import EncoderSettings\nfrom typing import Literal\n"
        "class LeastSquaresConfig(EncoderSettings):\n    kind: Literal['least_squares'] = 'least_squares'\n",
        "has no build, which its base class requires",
    ),
]


@pytest.mark.parametrize(("module", "sentence"), BROKEN)
def test_a_broken_component_is_one_sentence(module, sentence, on_path, tmp_path):
    write_package(on_path, module)
    source = write_config(
        tmp_path,
        dataset={"kind": "synthetic_digits"},
        target={"kind": "pixels"},
        prior={"kind": "identity"},
        generator={"kind": "latents"},
        evaluation={},
        analyses=[],
    )
    with pytest.raises(ConfigError, match=sentence) as caught:
        read_config(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("no_package.parts:Thing", "there is no module 'no_package'; install its package"),
        ("stripes_tools.nothing:Thing", "there is no module 'stripes_tools.nothing'"),
        ("stripes_tools.parts:Thing", "has no 'Thing'"),
        (
            "braindecode_vis.encoders.ridge:RidgeConfig",
            "has the name of a component of braindecode_vis, 'ridge'",
        ),
        (":", "encoder.kind"),
    ],
)
def test_a_wrong_reference_is_one_sentence(kind, sentence, installed, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        read_config(write_config(tmp_path), [f"encoder.kind={kind!r}"])


def test_a_component_of_another_role_is_one_sentence(installed, tmp_path):
    config = read_config(write_config(tmp_path), ["encoder.kind=stripes_tools.parts:ThirdsConfig"])
    with pytest.raises(
        ConfigError, match=r"ThirdsConfig cannot be the settings of the brain encoder: its build must"
    ):
        check_files(config)
    config = read_config(write_config(tmp_path), ["target.kind=stripes_tools.parts:BrightnessGapConfig"])
    with pytest.raises(ConfigError, match="Metric cannot be the image encoder: it has no"):
        check_files(config)


def test_splits_stay_inside(installed, tmp_path):
    with pytest.raises(ConfigError, match=r"unknown kind 'stripes_tools.parts:ThirdsConfig' in split\.kind"):
        read_config(write_config(tmp_path), ["split.kind=stripes_tools.parts:ThirdsConfig"])


def test_the_name_of_a_component_inside_is_refused(on_path, tmp_path):
    write_package(
        on_path, entries={"encoder": ("braindecode_vis.brain_encoders", "ridge", "LeastSquaresConfig")}
    )
    with pytest.raises(
        ConfigError, match=r"stripes-tools 1\.2 has the name of a component of braindecode_vis, 'ridge'"
    ):
        read_config("synthetic_digits")


def test_two_packages_of_one_name_are_refused(installed, tmp_path):
    write_package(installed, name="other_tools")
    with pytest.raises(ConfigError, match="name a component 'stripes'; uninstall one of them"):
        read_config(write_config(tmp_path))


LACKING = [
    (
        "encoder",
        "    def predict(self, responses):",
        "    def foretell(self, responses):",
        "brain encoder",
        "predict",
    ),
    (
        "target",
        "    def encode(self, images):",
        "    def embed_all(self, images):",
        "image encoder",
        "encode",
    ),
    ("prior", "    def sample(self,", "    def draw(self,", "prior", "sample"),
    ("generator", "    def generate(self,", "    def paint(self,", "image generator", "generate"),
    (
        "dataset",
        "    def write(self, folder: Path, *",
        "    def make(self, folder: Path, *",
        "data set",
        "write",
    ),
    ("analysis", "    def compute(self, study)", "    def count(self, study)", "analysis", "compute"),
    ("augmentation", "    def apply(self,", "    def change(self,", "augmentation", "apply"),
]


@pytest.mark.parametrize(
    ("role", "old", "new", "name", "method"), LACKING, ids=[entry[0] for entry in LACKING]
)
def test_a_missing_method_is_one_sentence(role, old, new, name, method, on_path, tmp_path, command_line):
    assert old in MODULE
    write_package(on_path, MODULE.replace(old, new))
    changes = {"encoder": NETWORK} if role == "augmentation" else {}
    done = command_line("run", write_config(tmp_path, **changes), "--out", tmp_path / "run")
    assert done.returncode == 2
    sentence = done.stderr.strip().splitlines()[-1]
    assert f"{name}: it has no" in sentence
    assert method in sentence


#: What the module above says, with the base class of each role.
HEIRS = {
    "class StripesConfig(Settings)": "class StripesConfig(contracts.Dataset)",
    "class Thirds:": "class Thirds(contracts.ImageEncoder):",
    "class ThirdsConfig(Settings)": "class ThirdsConfig(contracts.ImageEncoderSettings)",
    "class LeastSquares:": "class LeastSquares(contracts.BrainEncoder):",
    "class LeastSquaresConfig(Settings)": "class LeastSquaresConfig(contracts.EncoderSettings)",
    "class OneLayerConfig(Settings)": "class OneLayerConfig(contracts.NetworkSettings)",
    "class FlipConfig(Settings)": "class FlipConfig(contracts.Augmentation)",
    "class Halfway:": "class Halfway(contracts.Prior):",
    "class HalfwayConfig(Settings)": "class HalfwayConfig(contracts.PriorSettings)",
    "class Flat:": "class Flat(contracts.ImageGenerator):",
    "class FlatConfig(Settings)": "class FlatConfig(contracts.GeneratorSettings)",
    "class BrightnessGapConfig(Settings)": "class BrightnessGapConfig(contracts.MetricSettings)",
    "class CountTrialsConfig(Settings)": "class CountTrialsConfig(contracts.Analysis)",
}


def write_heirs():
    module = MODULE.replace(
        "from braindecode_vis.base.arrays",
        "from braindecode_vis.base import contracts\nfrom braindecode_vis.base.arrays",
    )
    for bare, heir in HEIRS.items():
        assert bare in module
        module = module.replace(bare, heir)
    return module


@pytest.mark.further
def test_components_that_inherit_from_their_role_give_the_same_scores(on_path, tmp_path, call):
    scores = []
    for name, module in (("bare", MODULE), ("heirs", write_heirs())):
        write_package(on_path, module)
        forget()
        call("run", write_config(tmp_path), "--out", tmp_path / name)
        rows = json.loads((tmp_path / name / "scores.json").read_text())
        scores.append([{**row, "fingerprint": ""} for row in rows])  # the code of the two differs
    assert scores[0] == scores[1]


def test_a_component_that_inherits_and_misses_a_method_is_one_sentence(on_path, tmp_path, command_line):
    write_package(
        on_path,
        write_heirs().replace("    def predict(self, responses):", "    def foretell(self, responses):"),
    )
    done = command_line("run", write_config(tmp_path), "--out", tmp_path / "run")
    assert done.returncode == 2
    sentence = done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert "abstract class LeastSquares" in sentence
    assert "predict" in sentence


def test_a_prior_that_writes_itself_must_read_itself(on_path, tmp_path, command_line):
    """It was found out when a finished run met new trials, after everything had been trained."""
    kept = "class Halfway:\n    def write(self, folder):\n        np.save(folder / 'mean.npy', self.mean)\n\n"
    write_package(on_path, MODULE.replace("class Halfway:\n", kept))
    done = command_line("run", write_config(tmp_path), "--out", tmp_path / "run")
    assert done.returncode == 2
    assert "it has write but not read; give it both" in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "run" / "stages").exists()


def test_an_error_inside_is_one_sentence_that_names_whose_it_is(on_path, tmp_path, command_line):
    write_package(
        on_path,
        MODULE.replace("self.mean = target", "raise ValueError('not my day')\n        self.mean = target"),
    )
    source = write_config(tmp_path)
    done = command_line("run", source, "--out", tmp_path / "run")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    sentence = done.stderr.strip().splitlines()[-1]
    assert "of stripes-tools 1.2 raised ValueError in fit (parts.py, line " in sentence
    assert "not my day" in sentence
    done = call_anew("run", source, "--out", tmp_path / "run", "--debug", path=on_path, code=1)
    assert "Traceback" in done.stderr


@pytest.mark.further
def test_pip_installs_what_is_found(tmp_path, monkeypatch):
    """The same package through pip itself, offline."""
    source = tmp_path / "source"
    (source / "pip_tools").mkdir(parents=True)
    (source / "pip_tools" / "__init__.py").touch()
    (source / "pip_tools" / "parts.py").write_text(MODULE)
    tables = "\n".join(
        f'[project.entry-points."{group}"]\n{kind} = "pip_tools.parts:{cls}"'
        for group, kind, cls in ENTRIES.values()
    )
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        f'[project]\nname = "pip-tools-of-a-test"\nversion = "0.3"\n{tables}\n'
        '[tool.setuptools]\npackages = ["pip_tools"]\n'
    )
    target = tmp_path / "target"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-q",
    ]
    done = subprocess.run([*command, "--target", str(target), str(source)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot build offline here: {done.stderr.strip().splitlines()[-1:]}")
    monkeypatch.syspath_prepend(str(target))
    forget()
    try:
        code = read_config(write_config(tmp_path)).find_outside()["encoder"]
        assert (code.package, code.version) == ("pip-tools-of-a-test", "0.3")
        assert metadata.version("pip-tools-of-a-test") == "0.3"
    finally:
        forget()
