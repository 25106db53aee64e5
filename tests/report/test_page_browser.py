"""The page in a real browser: what it shows, what it fetches, and how mouse and keyboard move in it."""

from pathlib import Path

import numpy as np
import pytest

from braindecode_vis.report import page
from tests.report.browser import CHROMIUM, Browser, check_access
from tests.report.material import EVIL, make_content, make_gallery, make_rich_gallery
from tests.report.test_page_access import make_board

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no chromium in /usr/bin (on Debian: apt-get install chromium)")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return page.write_report(tmp_path_factory.mktemp("page") / "report.html", make_content())


@pytest.mark.parametrize(
    "width, height, scheme",
    [(1366, 768, "light"), pytest.param(390, 844, "dark", marks=pytest.mark.further)],
)
def test_images_show_nothing_overflows_nothing_is_fetched(browser, report, width, height, scheme, tmp_path):
    browser.open(report, width, height, scheme=scheme)
    assert browser.ask("innerWidth") == width
    broken = "[...document.images].filter((i) => i.naturalWidth === 0).map((i) => i.alt)"
    assert browser.ask(broken) == []
    assert browser.ask("document.images.length") > 80
    assert browser.ask("document.documentElement.scrollWidth") <= width
    assert browser.ask("document.querySelector('#tiles .tile').getBoundingClientRect().width") > 100
    requests = [
        e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in requests if not url.startswith("data:")] == [report.as_uri()]
    assert [
        e["params"] for e in browser.events if e["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")
    ] == []
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == (
        "rgb(17, 21, 26)" if scheme == "dark" else "rgb(248, 247, 244)"
    )
    browser.screenshot(tmp_path / "page.png")


def change(browser, field, value):
    event = "new Event('input', {bubbles: true})"
    browser.ask(f"{{ const field = {field}; field.value = {value!r}; field.dispatchEvent({event}); 0 }}")


def read_count(browser):
    return browser.ask("document.querySelector('#count').textContent")


def read_scores(browser):
    texts = browser.ask("[...document.querySelectorAll('#tiles b')].map((b) => b.textContent)")
    return [float(text.replace("−", "-")) if text != "–" else None for text in texts]


SUB = "document.querySelector('#detail-sub').textContent"
FOCUSED = "document.activeElement.dataset.shown"


def test_items_can_be_filtered_sorted_and_walked_by_keyboard(browser, report):
    browser.open(report)
    assert browser.ask("document.querySelectorAll('#tiles .tile').length") == 40
    change(browser, "concept", "six")
    assert read_count(browser) == "Showing 20 of 20 items."
    change(browser, "document.querySelector('#more-filters select')", "sub-02")
    assert read_count(browser) == "No item fits these filters."
    browser.ask("document.querySelector('#clear').click()")
    browser.ask("new Promise((done) => setTimeout(done, 20))")
    assert read_count(browser) == "Showing 40 of 40 items."
    change(browser, "order", "worst")
    scores = read_scores(browser)
    assert scores == sorted(scores)
    change(browser, "document.querySelector('#find')", "digit_007")
    assert browser.ask("document.querySelectorAll('#tiles .tile').length") == 1

    browser.ask("document.querySelector('.pick').click()")
    assert browser.ask("detail.open")
    best, ids = make_gallery().select_items()["best"], make_gallery().ids
    assert browser.ask(SUB) == ids[best[0]]
    assert browser.ask("document.querySelectorAll('#detail-images img').length") == 5
    browser.press("ArrowRight")
    assert browser.ask(SUB) == ids[best[1]]
    browser.press("ArrowLeft")
    assert browser.ask(SUB) == ids[best[0]]
    browser.press("Escape")
    assert not browser.ask("detail.open")


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    content = make_content(gallery=make_rich_gallery(60))
    return page.write_report(tmp_path_factory.mktemp("rich") / "report.html", content)


def test_a_range_of_any_score_filters_and_sorts(browser, rich):
    browser.open(rich)
    content = make_rich_gallery(60)
    inside = np.sort(content.score[(content.score >= 0.8) & (content.score <= 0.9)])[::-1]
    change(browser, "low", "0.8")
    change(browser, "high", "0.9")
    assert read_scores(browser) == [pytest.approx(value, abs=6e-4) for value in inside]
    change(
        browser, "metric", "1"
    )  # the mean squared error, where the lowest is the best; the range starts anew
    scores = read_scores(browser)
    assert browser.ask("low.value") == ""
    assert len(scores) == 48
    assert scores == sorted(scores)
    change(browser, "metric", "2")
    browser.ask("more.click()")
    assert read_scores(browser)[-12:] == [None] * 12  # items without this score come last
    change(browser, "low", "0")
    assert read_count(browser) == "Showing 48 of 48 items."


def test_the_keyboard_alone_reaches_every_item_and_comes_back(browser, rich):
    browser.open(rich)
    browser.ask("document.querySelector('#clear').focus()")
    browser.press("Tab")
    assert browser.ask(FOCUSED) == "0"
    ring = browser.ask(
        "getComputedStyle(document.activeElement).outlineStyle + getComputedStyle(document.activeElement).outlineWidth"
    )
    assert ring == "solid2px"
    columns = browser.ask("getComputedStyle(tiles).gridTemplateColumns.split(' ').length")
    for key, expected in [
        ("ArrowRight", 1),
        ("ArrowDown", 1 + columns),
        ("ArrowUp", 1),
        ("ArrowUp", 1),
        ("End", 47),
        ("Home", 0),
    ]:
        browser.press(key)
        assert browser.ask(FOCUSED) == str(expected), key
    browser.press("Enter")
    assert browser.ask("detail.open")
    for _ in range(3):
        browser.press("ArrowRight")
    browser.press("Escape")
    assert not browser.ask("detail.open")
    browser.ask("new Promise((done) => setTimeout(done, 20))")
    assert browser.ask(FOCUSED) == "3"  # where the walk ended
    browser.press("Tab")
    assert browser.ask("document.activeElement.id") == "more"  # the tiles are one stop
    browser.press("Enter")
    assert browser.ask(FOCUSED) == "48"


def test_details_hold_every_row_caption_and_score(browser, rich):
    browser.open(rich, 390, 844)
    content = make_rich_gallery(60)
    best = int(content.sort_items()[0])
    browser.ask("document.querySelector('.tile').click()")
    labels = (
        "[...document.querySelectorAll('#detail-images figcaption')].map((c) => c.firstChild.textContent)"
    )
    assert browser.ask(labels) == [
        "seen", "decoded draw 1", "decoded draw 2", "decoded draw 3", "low level", "fused", "oracle", "nearest",
        "shuffled",
    ]  # fmt: skip
    captions = browser.ask("[...document.querySelectorAll('#detail-images q')].map((c) => c.textContent)")
    assert captions == [content.captions["seen"][best], content.captions["decoded"][best]]
    table = browser.ask(
        "[...document.querySelectorAll('#detail-scores tr')].map((r) => [...r.children].map((c) => c.textContent))"
    )
    assert table[0][:3] == ["Score", "decoded (mean of 3 draws)", "decoded draw 1"]
    assert [row[0] for row in table[1:]] == [
        "Pixel correlation", "Mean squared error", "Two-way identification in features of effnet-lite0",
    ]  # fmt: skip
    assert float(table[1][1]) == pytest.approx(content.score[best], abs=6e-4)
    assert float(table[1][3]) == pytest.approx(content.metrics["pixcorr"]["decoded draw 2"][best], abs=6e-4)
    assert table[3][2] == "–"
    assert browser.ask("document.documentElement.scrollWidth") <= 390
    assert browser.ask("detail.scrollWidth <= detail.clientWidth")


@pytest.mark.further
def test_two_hundred_items_of_eight_rows_stay_light(browser, tmp_path):
    """The page stays below 7 MB and shows its first tiles at once: only what is shown is decoded."""
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 256, (9, 200, 6, 6, 3), dtype=np.uint8)
    stacks = np.kron(smooth, np.ones((1, 1, 16, 16, 1), np.uint8))
    base = make_rich_gallery(200, 8)
    content = make_rich_gallery(
        200, 8, seen=stacks[0], rows={name: stacks[i + 1] for i, name in enumerate(base.rows)},
        metrics={}, captions={},
    )  # fmt: skip
    path = page.write_report(tmp_path / "report.html", make_content(gallery=content, ranks=None))
    assert path.stat().st_size < 7_000_000
    browser.open(path)
    assert read_count(browser) == "Showing 48 of 200 items."
    assert browser.ask("document.querySelectorAll('#tiles img').length") == 96


def test_hostile_names_do_not_run(browser, tmp_path):
    hostile = "<img src=x onerror=\"document.title='owned'\">"
    sections = [page.ExtraSection("s", figure=f"<svg xmlns='http://www.w3.org/2000/svg'>{EVIL}</svg>")]
    content = make_content(
        gallery=make_gallery(9, concepts=[hostile] * 9), sections=sections, description=hostile
    )
    browser.open(page.write_report(tmp_path / "report.html", content))
    browser.ask("document.querySelector('.pick').click()")
    assert browser.ask("document.title") == "Digits seen, digits decoded · synthetic digits"
    assert browser.ask("document.querySelector('#detail-title').textContent") == hostile


def test_a_phone_shows_images_soon_and_all_but_details_within_8000_pixels(browser, tmp_path):
    """The first image stood 9500 px down at the width of a phone, and the whole page took 16,000."""
    content = make_content(gallery=make_rich_gallery(40), result="36 of 40.", counted="1 subject.")
    browser.open(page.write_report(tmp_path / "report.html", content), 390, 844)
    top = "document.querySelector('{}').getBoundingClientRect().top"
    assert browser.ask(top.format("#gallery img")) < 2500
    assert browser.ask(top.format("#scores")) < 8000


@pytest.mark.parametrize(
    "width, scheme", [(1280, "light"), pytest.param(390, "dark", marks=pytest.mark.further)]
)
def test_axe_finds_no_serious_violation(browser, tmp_path, width, scheme):
    """Report, board and, where it was built, the home page of the site."""
    content = make_content(gallery=make_rich_gallery(40), result="36 of 40.", counted="1 subject.")
    path = page.write_report(tmp_path / "report.html", content)
    board = tmp_path / "board.html"
    board.write_text(make_board(tmp_path))
    home = Path(__file__).parents[2] / "build" / "docs" / "html" / "index.html"
    for each in filter(Path.is_file, (path, board, home)):
        browser.open(each, width, 844, scheme=scheme)
        browser.ask("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        check_access(browser)


def test_the_board_sorts_and_filters(browser, tmp_path):
    path = tmp_path / "board.html"
    path.write_text(make_board(tmp_path))
    browser.open(path)
    names = "[...document.querySelectorAll('#runs tbody tr:not([hidden]) th a')].map((a) => a.textContent)"
    assert browser.ask(names) == ["run0", "run1", "run2"]
    head = "[...document.querySelectorAll('#runs thead button')].find((b) => b.textContent === 'seed')"
    browser.ask(f"{head}.click()")
    browser.ask(f"{head}.click()")
    assert browser.ask(names) == ["run2", "run1", "run0"]
    assert browser.ask("document.querySelectorAll('[aria-sort=descending]').length") == 1
    browser.ask("document.querySelectorAll('#runs thead button')[5].click()")
    assert browser.ask(names)[-1] == "run0"  # without a score
    change(browser, "verdict", "trouble")
    assert browser.ask(names) == ["run0"]
    assert read_count(browser) == "Showing 1 of 3 runs."
    browser.ask("document.querySelector('#clear').click()")
    browser.ask("new Promise((done) => setTimeout(done, 20))")
    change(browser, "document.querySelector('#find')", "run2 digits")
    assert browser.ask(names) == ["run2"]


def test_a_click_opens_an_image_in_full_size_from_the_disk(browser, tmp_path):
    """And a page that has lost the folder beside it is known as such, so that it is written again."""
    content = make_content(gallery=make_gallery(4, side=320))
    path = page.write_report(tmp_path / "report.html", content)
    assert page.has_full_images(path)
    browser.open(path, 1366, 768)
    browser.ask("document.querySelector('.tile').click()")
    sides = "[...document.images].map((i) => i.naturalWidth).filter((w) => w === 320).length"
    wait = "new Promise((done) => setTimeout(done, 300))"
    browser.ask(wait)
    assert browser.ask(sides) > 0
    next((tmp_path / "report_images").iterdir()).unlink()
    assert not page.has_full_images(path)


def test_a_box_marks_the_line_of_its_setting(browser, tmp_path):
    path = tmp_path / "board.html"
    path.write_text(make_board(tmp_path))
    browser.open(path, 390, 844)
    assert browser.ask("document.documentElement.scrollWidth") <= 390
    lit = "[...document.querySelectorAll('polyline.lit')].map((line) => line.dataset.setting)"
    assert browser.ask(lit) == []
    browser.ask("document.querySelector('[data-setting=\"1\"] .mark').click()")
    assert browser.ask(lit) == ["1"]
    assert browser.ask("document.querySelectorAll('#lines polyline').length") == 2
