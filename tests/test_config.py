import json
import os
import subprocess
import sys
from typing import ClassVar

import pytest
import yaml
from pydantic import ValidationError

from braindecode_vis import pipeline
from braindecode_vis.base.checks import BraindecodeVisError, ConfigError, Notice
from braindecode_vis.base.registry import ROLES, check_names, find_component, list_inside
from braindecode_vis.base.roles import SETTINGS_ROLES, list_required
from braindecode_vis.base.settings import Settings, describe_validation_error
from braindecode_vis.config import RunConfig, check_files, dump_config, list_kinds, read_config
from braindecode_vis.config.explain import READS
from braindecode_vis.datasets.manifests import find_package_data
from braindecode_vis.parts.phantom import SIZES
from braindecode_vis.parts.phantom.simulate import make_phantom
from braindecode_vis.pipeline.runs import open_run

SHIPPED = sorted(find_package_data("configs").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_configuration_is_valid_and_named_after_its_file(path):
    config = read_config(path)
    assert config.name == path.stem
    assert RunConfig.model_validate(yaml.safe_load(dump_config(config))) == config


TINY_CLIP = (
    "{kind: openclip, architecture: ViT-B-32, weights: random, model_args: {embed_dim: 8, vision_cfg: "
    "{layers: 1, width: 64, image_size: 32, patch_size: 16}, text_cfg: {layers: 1, width: 32, heads: 2}}}"
)
LOW = "reconstruction.low_level={{target: {{kind: taesd, weights: random, image_size: 32}}{}}}".format
KFOLD = "split={kind: kfold, n_folds: 3}"
#: Configuration -> overrides, and what is said of them. Without the first reason of several the next one is named.
REFUSED = {
    "god_in_context": [("dataset.subjects=1,2", r"subjects is '1,2', but input should be a list such as \[1, 2\]")],
    "digits69_ridge": [
        ("encoder.alfas=[1]", r"unknown key encoder\.alfas; known here are kind, alphas.*did you mean 'alphas'"),
        ("target.kind=pixel", r"unknown kind 'pixel' in target\.kind; known are pixels, pca.*did you mean 'pixels'"),
        ("encoder.kind=nope", r"unknown kind 'nope' in encoder\.kind; known are .*ridge"),
        ("dataset.kind=nope", r"unknown kind 'nope' in dataset\.kind; known are .*digits69"),
        ("target.sise=3", r"unknown key target\.sise; known here are kind, size"),
        ("split.n_folds=3", r"unknown key split\.n_folds"),
        ("colour=red", r"unknown key colour; known here are name, seed"),
        ("seed=-1", r"seed is -1, but input should be greater than or equal to 0"),
        ("seed=99999999999999999999", "seed is 99999999999999999999, but"),
        ("seed=2001-99-99", "the value of the override 'seed=2001-99-99' is not valid YAML"),
        ("seed", r"must have the form a\.b=value"),
        ("seed=[1", "not valid YAML"),
        ("seed.deep=1", "goes below seed"),
        ("encoder.alphas=[0]", r"encoder\.alphas\.0 is 0"),
        ("encoder.alphas=[.inf]", r"encoder\.alphas\.0 is inf"),
        ("encoder.n_features=[0]", r"encoder\.n_features\.0"),
        ("encoder.n_features.0=0", r"encoder\.n_features\.0 is 0"),
        ("encoder.n_features.x=1",
         r"names x below the list encoder\.n_features, which has the entries 0 to 5; give such a"),
        ("encoder.n_features.9=1", r"names 9 below the list encoder\.n_features"),
        ("encoder.n_features.0.a=1", r"goes below encoder\.n_features\.0, which is the value"),
        ("target.kind=efficientnet-lite0", r"generator 'latents' cannot turn embeddings of the target"),
        ("prior={kind: neighbours, images: generator}", r"the generator 'latents' has no images of its own"),
    ],
    "phantom_eeg": [("target.grid=4", r"leave target\.grid and target\.block out")],
    # What is learnt before the split must not see what it tests.
    "nsd": [(KFOLD, r"dataset\.zscore 'session' would standardise with trials .* to none")],
    "haxby_slices": [
        ("dataset.zscore=session", r"dataset\.zscore 'session' would standardise with trials .* to none"),
    ],
    "things_eeg2": [
        (KFOLD, r"dataset\.mvnn would learn from trials .* leave it out"),
        ([KFOLD, "dataset.mvnn=none", "dataset.scaling=robust"], r"dataset\.scaling would learn"),
    ],
    "bids_fmri_glm_by_voxel_ridge": [
        ("dataset.model.denoise=3", r"dataset.model.denoise is 3, but input should be true or false"),
        ([KFOLD, "dataset.zscore=none", "dataset.model.per_split=true"],
         r"dataset\.model\.per_split would learn from trials that the split 'kfold' tests; leave it out"),
    ],
    # YAML reads 1e308 as text, which pydantic makes a number of.
    "things_eeg2_nice_vitl": [
        ("dataset.tmax='1e39'", r"should be (below 2\^63|a number of single precision)"),
        ("dataset.tmax=1e308", r"should be (below 2\^63|a number of single precision)"),
        ("encoder.batch_size='18446744073709551616'", r"should be (below 2\^63|a number of single precision)"),
    ],
    "synthetic_digits": [
        # Members of unions are not named in pydantic's words.
        ("target={kind: taesd, weights: 3}", r"target\.weights is 3, but"),
        ("encoder={kind: network, batch_size: 1}", r"encoder\.batch_size is 1, but"),
        # No computation can use them: true was one and false zero, and a batch of 2^64 overflowed somewhere in torch.
        ("seed=false", "seed is False, but input should be a number, not true or false"),
        ("evaluation.n_bootstrap=true", "n_bootstrap is True, but input should be a number"),
        ("evaluation.n_bootstrap=99999999999", "input should be less than or equal to 1000000"),
        ("encoder.alphas=[1.0, true]", "alphas is .*, but input should be a number, not true or false"),
        ("encoder.alphas=[1.0e+308]", "alphas is .*, but input should be a number of single precision"),
        ("dataset.n_train=18446744073709551616", r"n_train is .*, but input should be below 2\^63"),
        # What would change nothing was taken and ignored, and stood in the fingerprint as if it had done something.
        ("evaluation.best_of=true", "best_of scores the best of several draws, but reconstruction.n_draws is 1"),
        (LOW(", fusion: {strength: 0.7}"), "strength is 0.7, but it has no"),
        (LOW(", fusion: {mode: initial, weight: 0.7}"), "weight is 0.7, but it has no effect: mode initial"),
        (LOW(", fusion: {mode: initial}"),
         "reconstruction.low_level.fusion.mode is initial, but the generator takes no initial image"),
        ([f"target={TINY_CLIP}", "generator={kind: sdxl_turbo, steps: 4}",
          LOW(", fusion: {mode: both, strength: 0.2}")], "strength 0.2 of 4 generator.steps leaves no step to run"),
        (LOW(", encoder: {kind: network}"), "objectives clip do not fix the scale of latents"),
        ([LOW(""), "encoder={kind: lda}", "generator={kind: nearest}", "split={kind: leave_one_run_out}"],
         "reconstruction.low_level makes images"),
        (LOW(", encoder: {kind: network, objectives: [{kind: l1}], "
             "network: {kind: latent_decoder, latent_channels: 3}}"),
         "latent_decoder needs a target of 3 square maps, but this one has 64 values"),
        (LOW(", encoder: {kind: network, objectives: [{kind: l1}], out_of_fold: 3}"),
         "out_of_fold is 3, but it has no effect"),
        ("generator={kind: token_unclip, unconditional: zeros}", "unconditional was removed: its value is always"),
        ("prior={kind: diffusion, candidates: 4}", "candidates is 4, but it has no effect: select none"),
        ("prior={kind: diffusion, n_components: 4}", "n_components is 4, but it has no effect"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "overrides", "sentence"), [(name, *row) for name, rows in REFUSED.items() for row in rows]
)
def test_a_wrong_setting_is_refused_in_one_sentence_that_names_it(name, overrides, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        read_config(name, [overrides] if isinstance(overrides, str) else overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("phantom_eeg", ["target.grid=4", "generator.kind=nearest", "prior.kind=identity"]),
        ("nsd", [KFOLD, "dataset.zscore=none"]),
        ("haxby_slices", ["dataset.zscore=none"]),
        ("things_eeg2", [KFOLD, "dataset.mvnn=none"]),
    ],
)
def test_what_the_sentence_asks_for_is_taken(name, overrides):
    config = read_config(name, overrides)
    assert name != "phantom_eeg" or config.target.grid == 4


def test_overrides_are_validated_and_replace_values():
    config = read_config(
        "digits69_ridge", ["seed=3", "split={kind: kfold, n_folds: 4}", "encoder.n_features=[50]"]
    )
    assert (config.seed, config.split.n_folds, config.encoder.n_features) == (3, 4, (50,))


def test_an_override_reaches_an_entry_of_a_list():
    config = read_config("phantom_eeg_average", ["encoder.members.1.epochs=3", "encoder.weights.0=5"])
    assert (config.encoder.members[1].epochs, config.encoder.weights) == (3, (5, 1))
    changed = read_config(
        "phantom_eeg_average", ["encoder.members.1.alphas=[1]", "encoder.members.1.kind=ridge"]
    )
    assert changed.encoder.members[1].alphas == (1,)  # kinds are chosen before their settings


def test_another_kind_drops_the_settings_of_the_old_one():
    config = read_config(
        "digits69_ridge_10fold", ["target.size=7", "split.kind=published", "target.kind=pca"]
    )
    assert (config.split.kind, config.target.kind, config.target.size) == ("published", "pca", 7)


@pytest.mark.parametrize("kind", ["network_ablation", "rois", "sensor_regions", "sliding_window"])
def test_what_an_analysis_does_outside_its_part_is_read_from_a_configuration(kind):
    """The word was taken for a component's origin and dropped, so that a file could not ask for zeros."""
    config = read_config("digits69_ridge", [f"analyses=[{{kind: {kind}, outside: zero}}]"])
    assert config.analyses[0].outside == "zero"
    assert RunConfig.model_validate(yaml.safe_load(dump_config(config))) == config


def test_relative_folders_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert read_config("digits69_ridge", ["dataset.root=data"]).dataset.root == tmp_path / "data"
    with pytest.raises(ConfigError, match="was not found"):
        read_config("no/such/digits69_ridge.yaml")


def test_every_path_of_a_setting_is_made_absolute_whatever_its_name(tmp_path, monkeypatch):
    """Only root, images and weights were; a mask named beside the run was lost when the run was taken up elsewhere."""
    monkeypatch.chdir(tmp_path)
    config = read_config("nsd_ridge", ["dataset.mask_file=masks/mine.nii.gz"], root=tmp_path)
    assert config.dataset.mask_file == tmp_path / "masks" / "mine.nii.gz"


def test_sources_that_are_no_configuration(tmp_path):
    with pytest.raises(ConfigError, match=r"neither a configuration file.*digits69"):
        read_config("digits96")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match="must hold a mapping"):
        read_config(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\nb: 2")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        read_config(tmp_path / "broken.yaml")
    (tmp_path / "empty.yaml").write_text("name: x\n")
    with pytest.raises(ConfigError, match="dataset is missing"):
        read_config(tmp_path / "empty.yaml")


def test_a_data_set_stands_for_its_default_configuration():
    assert read_config("digits69").name == "digits69_ridge"


def test_how_a_run_is_done_stays_out_of_the_fingerprint(tmp_path):
    """Pins the hashed fields of every component: a new field changes this test on purpose or not at all."""
    config = read_config("digits69_ridge", root=tmp_path)
    assert config.dataset.hashed_fields() == {"kind": "digits69"}
    assert set(config.encoder.hashed_fields()) == {"kind", "alphas", "n_features", "n_inner_folds"}
    assert set(config.target.hashed_fields()) == {"kind", "size", "colour"}
    assert set(config.generator.hashed_fields()) == {"kind", "contrast", "thresholds", "gains"}
    assert set(config.retrieval.hashed_fields()) == {"gallery", "centre", "n_top"}
    evaluation = {
        "n_bootstrap",
        "n_permutations",
        "features",
        "suite",
        "best_of",
        "protocols",
        "conditions",
        "captions",
        "brain",
        "noise_ceiling",
    }
    assert set(config.evaluation.hashed_fields()) == evaluation
    assert set(config.reconstruction.hashed_fields()) == {"n_draws", "low_level"}
    assert set(config.split.hashed_fields()) == {"kind"}


@pytest.mark.parametrize("role", ["dataset", "split", "target", "encoder", "prior", "generator"])
def test_every_kind_of_a_role_is_listed_once(role):
    kinds = list_kinds(role)
    assert kinds
    assert len(set(kinds)) == len(kinds)


def test_settings_are_frozen():
    config = read_config("digits69")
    assert isinstance(config, Settings)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 4


def test_every_data_set_has_a_default_configuration():
    """`check` and `preprocess` take the name of a data set, and refused those that no configuration was shipped for."""
    fmri = (
        "bids_fmri",
        "bold5000",
        "deeprecon",
        "god",
        "haxby_slices",
        "nod",
        "nsd",
        "nsd_imagery",
        "nsd_repack",
        "nsd_timeseries",
        "bold5000_betas",
    )
    meeg = (
        "alljoined1",
        "alljoined16m",
        "bids_meeg",
        "eeg_imagenet",
        "muse_n170",
        "things_eeg1",
        "things_meg",
    )
    for kind in (*fmri, *meeg, "things_eeg2", "things_fmri"):
        assert read_config(kind).dataset.kind == kind


@pytest.mark.parametrize(
    ("overrides", "stage", "sentence"),
    [
        (
            ["evaluation.captions={bank: no.csv}"],
            "evaluate",
            r"captions\.bank names .*no\.csv, which does not exist",
        ),
        (["evaluation.captions={bank: bank.csv, captioner: .}"], "evaluate", "captioner names .* no network"),
        (["evaluation.captions={bank: wrong.csv}"], "evaluate", "caption"),
        (["evaluation.suite={weights: {clip: no.pt}}"], "evaluate", r"suite\.weights\.clip names"),
        (
            ["evaluation.features={kind: openclip}"],
            "evaluate",
            r"one network is not on this machine: evaluation\.features\.weights needs open_clip's ViT-H-14",
        ),
        (
            [f"target={TINY_CLIP}", "generator={kind: sdxl_turbo}"],
            "reconstruct",
            r"2 networks are not .*, 7\.7 GB together: generator\.weights needs sdxl_turbo \(6\.9 GB\); "
            r"generator\.ip_adapter needs ip_adapter .*weights fetch sdxl_turbo ip_adapter; or .* --allow-download\.",
        ),
        (
            ["reconstruction.low_level={target: {kind: taesd, weights: none}}"],
            "reconstruct",
            r"reconstruction\.low_level\.target\.weights names",
        ),
        (
            ["target={kind: openclip}", "generator.kind=nearest"],
            "embed",
            r"--set target\.weights=PATH, where PATH is open_clip's ViT-H-14",
        ),
        (
            [
                "encoder={kind: network, objectives: [{kind: clip_image_text}]}",
                "text.tower={kind: openclip, weights: none}",
            ],
            "train",
            r"text\.tower\.weights names",
        ),
    ],
)
def test_missing_files_are_found_before_anything_is_computed(
    overrides, stage, sentence, tmp_path, monkeypatch
):
    """A caption bank that was not there used to be refused at the very end of a run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bank.csv").write_text("id,caption\na,b\n")
    (tmp_path / "wrong.csv").write_text("id,text\na,b\n")
    config = read_config("synthetic_digits", overrides)
    stages = list(pipeline.STAGES)
    for earlier in stages[: stages.index(stage)]:
        check_files(config, earlier)
    for last in stages[stages.index(stage) :]:
        with pytest.raises(BraindecodeVisError, match=sentence):
            check_files(config, last)


def test_a_configuration_that_was_written_out_is_read_again(tmp_path):
    """Written out it names every setting, those that the chosen mode does not look at too."""
    low = LOW(", encoder: {kind: network, objectives: [{kind: l1}]}")
    config = read_config("synthetic_digits", [low, "prior={kind: diffusion}"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert read_config(str(tmp_path / "config.yaml")) == config


def test_what_a_run_does_not_read_is_not_asked_for():
    config = read_config("synthetic_digits", ["text.tower={kind: openclip, weights: none}"])
    check_files(config)
    assert list(READS) == list(pipeline.STAGES)


@pytest.fixture
def old_run(tmp_path):
    """A run folder as an earlier version left it: its configuration, and the provenance of a stage."""
    folder = tmp_path / "old"
    stage = folder / "stages" / "train" / "fold00-0123456789abcdef"
    stage.mkdir(parents=True)
    (stage / "provenance.json").write_text(
        json.dumps(
            {
                "stage": "train", "fields": {"encoder": {"kind": "network"}}, "created": "2026-01-02 03:04:05 UTC",
                "versions": {"python": "3.11.7", "braindecode_vis": "0.0.7"}, "git_revision": "12e0ba531c51",
            }
        )
    )  # fmt: skip
    return folder


def write_old_config(folder, **changes):
    content = yaml.safe_load(dump_config(read_config("synthetic_digits")))
    # what was not there when it was written
    del content["evaluation"]["metrics"]
    (folder / "config.yaml").write_text(yaml.safe_dump({**content, **changes}))


def test_a_run_folder_of_an_earlier_version_is_read(old_run):
    write_old_config(old_run)
    assert read_config(old_run) == read_config("synthetic_digits")


@pytest.mark.parametrize(
    ("encoder", "sentence"),
    [
        (
            {"kind": "network", "network": {"kind": "shallow_fbcsp"}},
            r"encoder\.network\.kind: 'shallow_fbcsp' is no longer a kind of network: write \{kind: braindecode",
        ),
        ({"kind": "ridge", "penalty": 3}, r"unknown key encoder\.penalty"),
    ],
)
def test_a_run_folder_that_cannot_be_read_names_the_version_that_wrote_it(encoder, sentence, old_run):
    write_old_config(old_run, encoder=encoder)
    with pytest.raises(ConfigError, match=sentence) as caught:
        read_config(old_run)
    assert "this run was written by braindecode_vis 0.0.7 (12e0ba531c51), and this is" in str(caught.value)
    # a damaged stage changes nothing
    (old_run / "stages" / "train" / "fold00-0123456789abcdef" / "provenance.json").write_text("{")
    with pytest.raises(ConfigError, match=sentence):
        read_config(old_run)


def test_a_wrong_override_is_no_fault_of_the_version(old_run):
    write_old_config(old_run)
    with pytest.raises(ConfigError, match=r"unknown key encoder\.alfas") as caught:
        read_config(old_run, ["encoder.alfas=[1]"])
    assert "written by" not in str(caught.value)


@pytest.mark.parametrize("role", ROLES)
def test_every_kind_leads_to_settings_of_that_kind_that_play_the_role(role):
    for kind in list_inside(role):
        cls = find_component(role, kind)
        assert cls.model_fields["kind"].default == kind
        required = list_required(SETTINGS_ROLES[role]) if role in SETTINGS_ROLES else ()
        lacking = [name for name in required if not hasattr(cls, name) and name not in cls.model_fields]
        assert not cls.__abstractmethods__
        assert lacking == []


def test_a_wrong_kind_is_answered_before_anything_heavy_is_loaded():
    code = (
        "import sys\nfrom braindecode_vis.config import read_config\n"
        "try:\n    read_config('things_eeg2_atm_vith', ['encoder.network.kind=atm'])\n"
        "except Exception as error:\n    print(error)\n"
        "print([m for m in ('torch', 'mne', 'sklearn', 'nilearn', 'diffusers', 'transformers', 'matplotlib')\n"
        "       if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "unknown kind 'atm' in encoder.network.kind; known are" in done.stdout, done.stderr
    assert done.stdout.strip().endswith("[]")


def test_the_settings_of_no_component_load_what_it_computes_with():
    """Reading a configuration loaded pandas, whatever it named, which took longer than all the rest of it."""
    code = (
        "import sys\nfrom braindecode_vis.config import RunConfig\n"
        "from braindecode_vis.base.registry import ROLES, find_component, list_inside\n"
        "for role in sorted(set(ROLES) - {'analysis'}):\n"  # their files hold settings and tables
        "    for kind in list_inside(role):\n        find_component(role, kind)\n"
        "print([m for m in ('pandas', 'scipy', 'torch', 'mne', 'nibabel', 'sklearn', 'PIL') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_field_that_came_later_is_hashed_only_where_it_says_something():
    """A run that was made before there was such a field is found again."""

    class Later(Settings):
        old: int = 1
        new: int | None = None
        hashed_if_set: ClassVar[frozenset[str]] = frozenset({"new"})

    assert Later().hashed_fields() == {"old": 1}
    assert Later(new=0).hashed_fields() == {"old": 1, "new": 0}


def test_a_removed_setting_is_read_with_its_one_value_and_enters_the_fingerprint_as_before():
    """Files of an earlier version name it, and their results are found; another value is refused by name."""

    class Base(Settings):
        kept: int = 1
        rate: ClassVar[float] = 0.5
        width: ClassVar[int] = 4
        depth: ClassVar[int] = 5
        fixed_settings: ClassVar = frozenset({"rate", "width", "depth"})

    class Derived(Base):
        sizes: int = 2
        removed_settings: ClassVar = {"shape": [3, 4], "threads": 1}
        not_hashed: ClassVar[frozenset[str]] = frozenset({"threads"})

    class Outer(Settings):
        inner: Derived = Derived()

    before = {"kept": 1, "rate": 0.5, "shape": [3, 4], "sizes": 2, "width": 4, "depth": 5}
    assert Derived().hashed_fields() == before
    # Records of two processes once differed in their order.
    assert list(Derived.list_removed()) == ["depth", "rate", "width", "shape", "threads"]
    assert Derived.model_validate(before | {"shape": (3, 4), "threads": 1}) == Derived()
    assert "rate" not in Derived().model_dump()
    with pytest.warns(Notice, match="threads was removed and has no effect"):
        assert Derived.model_validate({"threads": 8}) == Derived()
    check_names(Outer, {"inner": {"rate": 0.5}})
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"inner": {"rate": 0.4}})
    sentence = describe_validation_error(caught.value)
    assert (
        sentence
        == "inner.rate was removed: its value is always 0.5 now, and 0.4 is refused; leave inner.rate out"
    )

    class Slower(Derived):
        rate: ClassVar[float] = 0.25

    # whoever changes a recipe in a class of their own gets another fingerprint
    assert Slower().hashed_fields() == before | {"rate": 0.25}


def test_a_run_of_classes_takes_no_setting_of_images(tmp_path):
    """They were accepted and ignored; what only a run folder or another encoder's file wrote down asks for nothing."""
    lda = {"name": "mine", "dataset": {"kind": "synthetic_digits"}, "encoder": {"kind": "lda"}}
    path = tmp_path / "mine.yaml"

    def read(content, *overrides):
        path.write_text(yaml.safe_dump(content))
        return read_config(path, overrides)

    dumped = dump_config(read(lda))
    for key, value, words in [
        (
            "target",
            {"kind": "pixels"},
            "target was given, but the encoder 'lda' decodes classes and predicts no",
        ),
        ("prior", {"kind": "identity"}, "prior was given"),
        ("generator", {"kind": "nearest"}, "generator was given, .* makes no image; leave generator out"),
        ("reconstruction", {"n_draws": 2}, "reconstruction was given"),
        ("repeats", {"test": "averaged"}, "repeats.test is averaged, but .* trial by trial"),
        ("evaluation", {"protocols": ["transductive"]}, "evaluation.protocols scores images"),
    ]:
        with pytest.raises(ConfigError, match=words):
            read({**lda, key: value})
        with pytest.raises(ConfigError, match=words):
            read(lda, f"{key}={value}")
        # The file of a ridge, turned into one of classes.
        assert read({**lda, "encoder": {"kind": "ridge"}, key: value}, "encoder.kind=lda").decodes_categories
    assert read(
        {**lda, "repeats": {"train": "single"}, "evaluation": {"n_bootstrap": 200}}
    ).decodes_categories
    (tmp_path / "config.yaml").write_text(dumped)
    assert read_config(tmp_path).decodes_categories
    with pytest.raises(ConfigError, match=r"target\.kind was given"):
        read_config(tmp_path, ["target.kind=pixels"])
    # A run folder of a version that had fewer settings.
    content = yaml.safe_load(dumped)
    del content["text"]
    (tmp_path / "stages").mkdir()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    assert read_config(tmp_path).decodes_categories


def test_a_file_cannot_consent_to_running_code(tmp_path):
    """``trust_pickle: true`` in somebody's configuration or run folder once ran what their ``.pt`` file held."""
    content = yaml.safe_load(dump_config(read_config("things_eeg2_ridge")))
    content["dataset"]["trust_pickle"] = True
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    for source in (path, tmp_path):
        assert not read_config(source).dataset.trust_pickle
        assert not read_config(source, ["seed=3"]).dataset.trust_pickle
        assert read_config(source, ["dataset.trust_pickle=true"]).dataset.trust_pickle
    # What a run with consent writes down is no consent either.
    path.write_text(dump_config(read_config(path, ["dataset.trust_pickle=true"])))
    assert not read_config(tmp_path).dataset.trust_pickle


@pytest.mark.slow
def test_a_payload_is_not_run_by_a_run_folder(tmp_path):
    """The whole way: a folder of UBP's layout whose file would leave a mark when it is opened."""
    import torch

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "mark"),)

    make_phantom("things-eeg2-ubp", tmp_path / "data", size=SIZES["things-eeg2-ubp"]["tiny"], snr=1, seed=0)
    for file in tmp_path.rglob("*.pt"):
        torch.save({"eeg": Payload()}, file)
    folder = tmp_path / "run"
    folder.mkdir()
    config = read_config("things_eeg2_ridge", ["dataset.trust_pickle=true"], root=tmp_path / "data")
    (folder / "config.yaml").write_text(dump_config(config))
    with pytest.raises(
        ConfigError, match=r"can run any code .* for this call: .*trust_pickle=true \(a configuration"
    ):
        pipeline.preprocess(open_run(read_config(folder), folder))
    assert not (tmp_path / "mark").exists()


def test_a_mapping_named_twice_in_yaml_is_looked_at_once(tmp_path):
    """Nine aliases of nine aliases are 9 ** 20 entries for whoever visits each, as where arguments are hashed."""
    lines = ["a0: &a0 {trust_pickle: true}"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 20)]
    for text in (
        "\n".join(lines),
        "target: {kind: timm, model_args: {" + ", ".join(lines) + "}}",
        "a: &a [*a]",
    ):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(ConfigError, match="more than 1000000 entries"):
            read_config(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text("\n".join(lines[:3]))
    with pytest.raises(ConfigError, match="unknown key a0"):
        read_config(tmp_path / "x.yaml")


def test_a_sentence_holds_no_codes_for_the_terminal(tmp_path, monkeypatch, capsys):
    """Keys and names of files of somebody else may hold them, or line breaks."""
    from braindecode_vis.cli import main

    (tmp_path / "x.yaml").write_text('"\\e[31mred\\n": 1')
    monkeypatch.setattr(sys, "argv", ["braindecode-vis", "run", str(tmp_path / "x.yaml")])
    with pytest.raises(SystemExit):
        main()
    told = capsys.readouterr().err
    assert "unknown key \\x1b[31mred ; known" in told
    assert len(told.splitlines()) == 1
