"""Options of objectives that no recipe sets: each changes what its description says."""

import pytest
import torch

from braindecode_vis.base.registry import validate_component
from braindecode_vis.training.objectives.objective import Outputs


def make_outputs(progress=0.5, n=8, d=6):
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    image = make(n, d)
    stimuli = torch.arange(n)
    return Outputs(
        brain=image + make(n, d), image=image, text=make(n, d), stimuli=stimuli, concepts=stimuli // 2,
        clusters=stimuli // 2,
        background=make(n, d), brain_views=make(2, n, d), image_views=make(2, n, d), teacher_brain=make(n, d),
        teacher_image=make(n, d), queue_brain=make(3, d), queue_image=make(3, d), progress=progress,
    )  # fmt: skip


def score(kind, progress=0.5, **options):
    return float(
        validate_component("objective", {"kind": kind, **options}).build()(make_outputs(progress)).detach()
    )


@pytest.mark.parametrize("kind", ["clip", "within_cluster"])
def test_the_scale_of_similarities_is_bounded(kind):
    """A temperature below 1 / max_scale counts as that."""
    bounded = score(kind, temperature=1e-4, max_scale=20.0)
    assert bounded == pytest.approx(score(kind, temperature=1 / 20, max_scale=100.0))
    assert bounded != pytest.approx(score(kind, temperature=1e-2))


def test_images_and_text_share_the_objective():
    alone, half, none = (score("clip_image_text", image_share=share) for share in (1.0, 0.5, 0.0))
    assert alone == pytest.approx(score("clip"))
    assert half == pytest.approx((alone + none) / 2)
