"""The page: what it says and what it never does."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from braindecode_vis.base.checks import DataError
from braindecode_vis.report import figures, page, page_scores
from braindecode_vis.report.words import describe_metric
from tests.report.material import EVIL, make_bare_content, make_content, make_gallery, make_scores


@pytest.fixture(scope="module")
def html():
    return page.render_report(make_content())


def test_nothing_is_loaded_from_outside(html):
    assert set(re.findall(r"\b(?:src|href|srcset|action|poster)=[\"']([^\"']{1,5})", html)) >= {"data:"}
    assert re.findall(r"\b(?:src|href|srcset|action|poster)=[\"'](?!data:|#)", html) == []
    assert "@import" not in html
    assert "url(" not in html
    assert "<link" not in html.replace('<link rel="icon" href="data:,">', "")
    assert "default-src 'none'" in html


def test_figures_inside_hold_no_address_but_namespaces():
    svg = figures.render_svg(figures.plot_rank_histogram([1, 2], 10))
    assert not re.search(r"(?:href|src)=[\"'](?!#)", svg)


def test_the_page_says_what_it_was_given(html):
    for text in (
        "Digits seen, digits decoded", "Block design", "3,092", "as published", "0.787", "0.742 to 0.829",
        "chance 0.10", "best control: mean image 0.655", "When the image is read out", "Wilson",
        "braindecode-vis run configs/digits69_ridge.yaml", "sha256:abab", "&lt; 0.001", "not by hand",
    ):  # fmt: skip
        assert text in html, text
    assert html.startswith('<!doctype html>\n<html lang="en">')
    assert not re.search(r"\bnan\b", re.sub(r"base64,[^\"]*", "", html), re.I)


def test_every_image_has_words(html):
    images = re.findall(r"<img[^>]*>", html)
    assert len(images) > 20
    assert all(re.search(r'alt="[^"]+"', image) for image in images)


def test_decoded_comes_first_in_every_group(html):
    groups = re.findall(r'<tbody role="rowgroup">(.*?)</tbody>', html, re.S)
    assert len(groups) == 5
    for group in groups:
        methods = re.findall(r'scope="row">([^<]+)', group)
        assert methods[0].strip() == "decoded"


def test_two_protocols_never_share_a_group():
    scores = make_scores() + make_scores(protocol="transductive")
    text = page.render_report(make_bare_content(scores=scores))
    assert len(re.findall(r"<tr role=\"row\" class=\"group\"", text)) == 10
    assert text.count("Protocol: transductive") == 5


def test_several_subjects_become_a_mean_with_its_range():
    scores = make_scores() + make_scores(subject="02", value=0.5)
    text = page.render_report(make_bare_content(scores=scores, headline=["pixcorr"]))
    assert "mean of 2 subjects, range 0.50 to 0.787" in text
    assert "subject 02" in text


@pytest.mark.parametrize(
    "metric, chance, low, high, words",
    [
        ("top1", 0.1, 0.3, 0.9, "Above chance."),
        ("top1", 0.1, 0.05, 0.3, "The interval includes chance."),
        ("top1", 0.5, 0.1, 0.3, "The interval is below chance."),
        ("median_rank", 5.5, 1.0, 3.0, "Better than chance."),
        ("median_rank", 5.5, 6.0, 8.0, "Worse than chance."),
    ],
)
def test_the_verdict_follows_the_interval(metric, chance, low, high, words):
    row = make_scores()[0] | {
        "metric": metric,
        "chance": chance,
        "value": (low + high) / 2,
        "ci_low": low,
        "ci_high": high,
    }
    assert words in page.render_report(make_bare_content(scores=[row]))


def judge(decoded=(0.5, 0.4, 0.6), chance=0.1, controls=(), differences=(), metric="ssim"):
    value, low, high = decoded
    row = {"metric": metric, "subject": "01", "split": "test", "value": value, "ci_low": low, "ci_high": high}
    rivals = [
        {"method": name, "value": value, "ci_low": value - 0.01, "ci_high": value + 0.01}
        for name, value in controls
    ]
    known = [
        {"metric": metric, "subject": "01", "split": "test", "control": name, "ci_low": low, "ci_high": high}
        for name, low, high in differences
    ]
    return page_scores.judge(row | {"chance": chance}, rivals, known, describe_metric(metric).direction)


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"controls": [("mean_image", 0.2)]}, ("clear", "above chance and every control")),
        # A run of an earlier version has no differences: then the control must lie outside the interval.
        ({"controls": [("mean_image", 0.45)]}, ("unsure", "above chance, but not above the mean image")),
        (
            {"controls": [("mean_image", 0.45)], "differences": [("mean_image", 0.01, 0.1)]},
            ("clear", "above chance and every control"),
        ),
        (
            {"controls": [("mean_image", 0.2)], "differences": [("mean_image", -0.01, 0.1)]},
            ("unsure", "above chance, but not above the mean image"),
        ),
        (
            {"controls": [("mean_image", 0.55), ("nearest", 0.5), ("shuffled", 0.1)]},
            ("unsure", "above chance, but not above the mean image or the nearest image"),
        ),
        ({"controls": [("shuffled", 0.5)]}, ("unsure", "above chance, but not above shuffled responses")),
        ({"chance": None, "controls": [("mean_image", 0.2)]}, ("clear", "above every control")),
        ({"chance": None}, ("", "")),
        ({"chance": 0.5, "controls": [("mean_image", 0.2)]}, ("unsure", "the interval includes chance")),
        (
            {"metric": "mse", "chance": 0.9, "controls": [("mean_image", 0.3)]},
            ("unsure", "better than chance, but not better than the mean image"),
        ),
        (
            {"metric": "mse", "chance": 0.9, "differences": [("a", -0.2, -0.1)], "controls": [("a", 0.6)]},
            ("clear", "better than chance and every control"),
        ),
        ({"decoded": (0.5, None, None)}, ("", "")),
        ({"metric": "of_my_own"}, ("", "")),
    ],
)
def test_a_score_is_green_only_where_it_beats_chance_and_every_control(given, expected):
    """A score that the mean image equalled was called above chance, in green, on a page that asks for more."""
    assert tuple(judge(**given)) == expected


def test_a_metric_that_loses_has_a_card_that_says_what_it_loses_to():
    rows = make_scores()
    for row in rows:
        if row["metric"] == "mse" and row["method"] == "mean_image":
            row["value"] = 0.03
    text = page.render_report(make_bare_content(scores=rows, headline=["pixcorr"]))
    losing = re.search(r'<section id="losing".*?</section>', text, re.S)[0]
    assert "Not better than the mean image by mean squared error." in losing
    assert "Mean squared error" in losing
    assert "Not better than chance or controls" not in page.render_report(
        make_bare_content(scores=[row for row in rows if row["metric"] == "top1"])
    )


def test_a_losing_best_of_several_draws_has_its_card():
    row = make_scores()[0] | {"value": 0.1, "ci_low": 0.05, "ci_high": 0.2, "chance": 0.15}
    text = page.render_report(make_bare_content(scores=[*make_scores(), row | {"metric": "best_of_4_mse"}]))
    losing = re.search(r'<section id="losing".*?</section>', text, re.S)[0]
    assert "est of 4" in losing
    assert "The interval includes chance." in losing


def test_branches_of_the_system_and_the_ceiling_are_no_controls():
    row = make_scores()[0]
    rows = [
        row,
        *(row | {"method": name, "value": 0.9} for name in ("oracle", "low_level", "high_level", "seen")),
    ]
    text = page.render_report(make_bare_content(scores=rows))
    assert "best control" not in text
    assert "not above" not in text


def test_the_result_comes_first_and_the_gallery_before_any_table(html):
    """The first picture stood 4700 px down, below the whole table of scores."""
    text = page.render_report(
        make_content(result="36 of 40.", counted="1 subject.", method="ridge, penalty 10")
    )
    places = [
        text.index(part)
        for part in ('class="result"', 'class="cards"', 'id="gallery"', "<table aria", 'class="plain"')
    ]
    assert places == sorted(places)
    assert text.index("<img") < min(text.index('<table class="scores"'), text.index('class="plain"'))
    assert "36 of 40." in text
    assert "Decoder: ridge, penalty 10. 1 subject." in text
    assert "decoded <small>ridge, penalty 10</small>" in text
    assert 'class="result"' not in html


@pytest.mark.parametrize("n, shown", [(2, 2), (3, 3), (40, 4)])
def test_four_decoded_pictures_stand_above_the_cards(n, shown):
    gallery = make_gallery(n)
    text = page.render_report(make_content(gallery=gallery))
    figure = re.search(r'<figure class="first".*?</figure>', text, re.S)[0]
    order = [gallery.ids[item] for item in gallery.sort_items()]
    found = re.findall(r'title="[^"]*\((.*?)\)"', figure)
    assert [found[0], found[-1], len(found)] == [order[0], order[-1], shown]
    assert figure.count("<img") == 2 * shown
    assert text.index('class="first"') < text.index('class="cards"')


def test_missing_numbers_become_a_dash():
    row = make_scores()[0] | {"value": float("nan"), "ci_low": None, "chance": None}
    text = page.render_report(make_bare_content(scores=[row]))
    assert '<p class="big">–</p>' in text
    assert not re.search(r"\bnan\b", text, re.I)


def test_a_bare_report_still_stands():
    text = page.render_report(page.ReportContent(title="Empty", dataset="none"))
    assert "Not stated." in text
    assert "<script" not in text


def test_all_text_is_escaped():
    small = make_gallery(6)
    content = make_content(
        title=EVIL,
        dataset=EVIL,
        description=EVIL,
        protocol=EVIL,
        facts=[(EVIL, EVIL)],
        warnings=[EVIL],
        command=EVIL,
        ranks=None,
        provenance={EVIL: {EVIL: [EVIL, {EVIL: EVIL}]}},
        scores=make_scores(split=EVIL, method="decoded") + make_scores(protocol=EVIL, method=EVIL),
        sections=[page.ExtraSection(EVIL, EVIL, table=[{EVIL: EVIL}])],
        gallery=make_gallery(
            6,
            ids=[f"{EVIL}{i}" for i in range(6)],
            concepts=[EVIL] * 6,
            rows={EVIL: small.seen},
            metric=EVIL,
            details={EVIL: [EVIL] * 6},
            filter_by=[EVIL],
        ),
    )
    text = page.render_report(content)
    assert "owned" in text
    assert text.count("<script") == 2
    assert EVIL not in text


def test_what_each_stage_took_is_shown():
    taken = {"cpu_seconds": 6.25, "peak_memory_bytes": 2_500_000_000, "peak_is_earlier": True}
    stages = {"preprocess": {"seconds": 3.5, "profile": taken}, "train fold00": {"seconds": 1.0}}
    text = page.render_report(make_content(provenance={"stages": stages}))
    (rows,) = re.findall(r"what each stage used.*?<tbody>(.*?)</tbody>", text, re.DOTALL)
    shown = ["preprocess", "3.5 s", "6.2 s", "below 2.5 GB", "", ""]
    assert re.findall(r"<td[^>]*>(.*?)</td>", rows) == shown  # an earlier version noted seconds alone
    assert "what each stage used" not in page.render_report(make_content())


def test_the_same_content_gives_the_same_bytes(html):
    assert page.render_report(make_content()) == html


def test_size_is_bounded_with_a_note(tmp_path):
    content = make_gallery(2000, side=20)
    text = page.render_report(make_bare_content(gallery=content))
    assert len(text) < 10_000_000
    carried = json.loads(re.search(r'id="gallery-data">(.*?)</script>', text, re.S)[1])["items"]
    assert 500 < len(carried) < 2000
    assert f"carries {len(carried):,} of 2,000 items" in text


def test_writing_is_atomic(tmp_path, monkeypatch):
    """A crash between writing and renaming leaves the former report and no debris."""
    target = tmp_path / "new folder" / "report.html"
    content = make_bare_content()
    assert page.write_report(target, content) == target
    before = target.read_text(encoding="utf-8")

    def crash(self, other):
        assert self.parent == target.parent
        raise OSError("disk went away")

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(OSError, match="disk went away"):
        page.write_report(target, make_bare_content(title="Second"))
    assert target.read_text(encoding="utf-8") == before
    assert list(target.parent.iterdir()) == [target]


def test_unusable_content_is_refused():
    with pytest.raises(DataError, match="is missing the column"):
        make_content(scores=[{"method": "decoded", "metric": "top1"}])
    with pytest.raises(DataError, match="headline names 'top7'"):
        make_content(headline=["top7"])
    with pytest.raises(DataError, match="figure must be"):
        page.render_report(make_bare_content(sections=[page.ExtraSection("x", figure=b"GIF89a")]))


def test_an_analysis_of_several_figures_is_one_section_with_one_folded_table():
    curve = figures.render_svg(figures.plot_top_k_curve([1, 2, 9], 10))
    table = pd.DataFrame(
        {"time_s": [i / 100 for i in range(30)], "p_value": [1e-5] * 30, "region": ["V1"] * 30}
    )
    drawn = [page.SectionFigure(curve, curve, f"Finding {i}", f"Caption {i}.") for i in range(3)]
    text = page.render_report(
        make_bare_content(sections=[page.ExtraSection("Time", "Text.", figures=drawn, table=table)])
    )
    section = re.search(r'<section id="section-1".*?</section>', text, re.S)[0]
    assert re.findall(r'alt="(Finding \d)"', section) == ["Finding 0", "Finding 1", "Finding 2"]
    assert re.findall(r"<figcaption>(.*?)</figcaption>", section) == [
        "Caption 0.",
        "Caption 1.",
        "Caption 2.",
    ]
    assert section.count("prefers-color-scheme: dark") == 3
    assert "<summary>Table of 30 rows</summary>" in section
    assert '<th scope="col" class="num">time s</th>' in section
    assert section.count("&lt; 0.001") == 30
    assert text.count('href="#section-1"') == 1


@pytest.mark.parametrize(
    "column, texts",
    [
        ([0.5, 0.25, 1.0], ["0.500", "0.250", "1.000"]),
        ([0.5, 0.0001], ["0.50", "0.0001"]),  # common decimals would hide the second
        ([1, 2000], ["1", "2,000"]),
        ([True, False], ["yes", "no"]),
        ([None, 0.5], ["–", "0.500"]),
    ],
)
def test_a_column_shares_its_decimals_unless_that_hides_a_value(column, texts):
    content = make_bare_content(sections=[page.ExtraSection("x", table=pd.DataFrame({"a": column}))])
    cells = re.findall(
        r"<td[^>]*>(.*?)</td>",
        re.search(r'id="section-1".*?</section>', page.render_report(content), re.S)[0],
    )
    assert cells == texts


def measure_contrast(first, second):
    """Return the contrast ratio of two colours as WCAG 2 defines it."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_and_controls_have_enough_contrast_in_both_themes(html):
    themes = re.findall(r":root \{(.*?)\}", html, re.S)
    assert len(themes) == 3
    light, dark, paper = (dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", theme)) for theme in themes)
    for theme in (light, dark, light | paper):
        for ink in ("ink", "muted", "accent", "chance"):
            for ground in ("bg", "panel", "wash", "accent-wash"):
                assert measure_contrast(theme[ink], theme[ground]) >= 4.5, (ink, ground, theme)
        assert measure_contrast(theme["warn-ink"], theme["warn-bg"]) >= 4.5
        assert measure_contrast(theme["control"], theme["panel"]) >= 3  # borders of fields
