"""The configurations of the state of the art run from raw files to scores, with tiny untrained image networks."""

import dataclasses

import pytest

from braindecode_vis.config import read_config
from braindecode_vis.phantom import SIZES
from braindecode_vis.pipeline import evaluate
from braindecode_vis.pipeline.runs import open_run
from braindecode_vis.studies.demo import make_phantom

INTERN = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 45,
          "image_size": [28, 28], "patch_size": [14, 14]}  # fmt: skip
CLIP = {"embed_dim": 8, "vision_cfg": {"layers": 2, "width": 64, "image_size": 32, "patch_size": 16},
        "text_cfg": {"layers": 1, "width": 32, "heads": 2}}  # fmt: skip
RECIPES = {
    "samga_internvit": ("eeg2", "eeg2_loso", "meg", "meg_loso"),
    "shallow_internvit": ("eeg2", "eeg2_loso", "meg", "meg_loso"),
    "lora_clip_vitb32": ("eeg2", "eeg2_loso", "meg"),
    "hcf_internvit": ("eeg2",),
    "subjectmix_internvit": ("eeg2_loso",),
}
NAMES = [f"things_{data}_{recipe}" for recipe, sets in RECIPES.items() for data in sets]
#: One run of each recipe in every test; the others only where time is no matter.
QUICK = (
    "things_eeg2_samga_internvit",
    "things_eeg2_lora_clip_vitb32",
    "things_eeg2_loso_subjectmix_internvit",
)


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            size = dataclasses.replace(SIZES[kind]["tiny"], n_subjects=3)
            make_phantom(kind, made[kind], size=size, snr=1.0, seed=0)
        return made[kind]

    return get


def shrink(name):
    """Return changes that make a run a matter of seconds: untrained towers, two epochs, one processor."""
    changes = ["encoder.device=cpu", "encoder.epochs=3", "encoder.batch_size=16", "encoder.precision=fp32",
               "evaluation.n_bootstrap=100", "evaluation.n_permutations=100"]  # fmt: skip
    target = (
        {"kind": "transformers", "model_args": INTERN}
        if "internvit" in name
        else {"kind": "openclip", "model_args": CLIP}
    )
    for key in ("target", "encoder.image_tower.target") if "lora" in name else ("target",):
        changes += [
            f"{key}.weights=random",
            f"{key}.precision=float32",
            f"{key}.workers=0",
            f"{key}.device=cpu",
        ]
        changes.append(f"{key}.model_args={target['model_args']}".replace("'", '"'))
    if "internvit" in name:
        changes += ["target.repository=null"]
    if "subjectmix" in name:
        changes.append("encoder.selection.hold_out=0.3")
    return changes


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_a_recipe_runs_on_the_phantom(name, roots, tmp_path):
    root = roots("things-meg" if "meg" in name else "things-eeg2")
    run = open_run(read_config(name, shrink(name), root=root), tmp_path / "run")
    rows = evaluate(run)
    found = {row["metric"]: row for row in rows if row["method"] == "decoded"}
    assert 0 <= found["top1"]["value"] <= 1
    assert found["top1"]["chance"] == pytest.approx(1 / found["top1"]["gallery_size"])
