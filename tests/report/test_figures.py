"""The three plots and their limits."""

import io
import re

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.report import figures


@pytest.mark.parametrize("values", [[0.2, 0.9], [-0.3, 0.1], [0.0385], [101.0, 3.5], [None], [0.0], [1e-9]])
def test_axis_limits_hold_zero_and_every_value(values):
    low, high = figures.compute_axis_limits(values)
    assert low < high
    for value in values:
        assert value is None or low <= value <= high
    assert low <= 0 <= high


@pytest.mark.parametrize("size", [1, 982])
@pytest.mark.parametrize("plot", [figures.plot_rank_histogram, figures.plot_top_k_curve])
def test_rank_plots_draw_at_every_gallery_size(plot, size):
    ranks = np.random.default_rng(0).integers(1, size + 1, 60)
    figure = plot(ranks, size, theme="dark")
    assert "guessing" in figures.render_svg(figure)


@pytest.mark.parametrize("plot", [figures.plot_rank_histogram, figures.plot_top_k_curve])
def test_a_figure_is_darkened_as_it_would_be_drawn(plot):
    ranks = np.random.default_rng(0).integers(1, 41, 60)
    light, dark = (figures.render_svg(plot(ranks, 40, theme=theme)) for theme in ("light", "dark"))
    # Names of parts are digests of their colours too.
    drawn, expected = (re.sub(r"\b[a-z][0-9a-f]{10}\b", "", svg) for svg in (figures.darken_svg(light), dark))
    assert drawn == expected


def test_rank_histogram_counts_every_query_once():
    ranks = np.array([1, 1, 1.5, 7, 982])
    bars = figures.plot_rank_histogram(ranks, 982).axes[0].patches
    assert sum(bar.get_height() for bar in bars) == len(ranks)


def test_the_band_of_a_rank_histogram_holds_what_guessing_gives():
    (band,) = figures.plot_rank_histogram(np.arange(1, 201), 200).axes[0].collections
    heights = set(band.get_paths()[0].vertices[:, 1].tolist())
    assert heights == set(stats.binom.ppf([0.025, 0.975], 200, 5 / 200).tolist())  # five ranks a bar


def test_a_tied_rank_counts_against_the_query():
    """A query whose image ties with another for the first place has the rank 1.5 and is no top-1 hit."""
    line = figures.plot_top_k_curve([1.5, 1, 3], 4).axes[0].lines[0]
    assert line.get_ydata().tolist() == pytest.approx([1 / 3, 2 / 3, 1, 1])


@pytest.mark.parametrize("ranks", [[], [0], [11], [float("nan")]])
def test_impossible_ranks_are_refused(ranks):
    with pytest.raises(DataError, match="rank"):
        figures.plot_rank_histogram(ranks, 10)


def test_unknown_theme_is_refused():
    with pytest.raises(ConfigError, match="theme"):
        figures.plot_top_k_curve([1], 2, theme="sepia")


def make_row(method, value, **more):
    keys = {"ci_low": None, "ci_high": None, "chance": None, "noise_ceiling": None}
    return {"method": method, "metric": "pixcorr", "value": value, **keys, **more}


def test_score_plot_puts_the_decoded_system_on_top():
    rows = [make_row("mean image", 0.6), make_row("decoded", 0.8, ci_low=0.7, ci_high=0.9, chance=0.0)]
    figure = figures.plot_scores_with_intervals(rows)
    ax = figure.axes[0]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["decoded", "mean image"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]


def test_score_plot_without_scores_is_refused():
    with pytest.raises(DataError, match="no score"):
        figures.plot_scores_with_intervals([make_row("decoded", 0.5)], metrics=["ssim"])


def test_rendering_is_reproducible_and_leaves_matplotlib_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    first, second = (figures.render_svg(figures.plot_rank_histogram([1, 2, 2], 5)) for _ in range(2))
    assert first == second
    assert dict(matplotlib.rcParams) == before
    assert Image.open(io.BytesIO(figures.render_png(figures.plot_top_k_curve([1], 3)))).width > 400
