"""What a keyboard and a screen reader need of the pages, by rules on the HTML; `test_page_browser` asks axe-core."""

import itertools
import re
from html.parser import HTMLParser

import pytest

from braindecode_vis.report import board_page, page
from tests.report.material import make_content, make_gallery, make_rich_gallery

VOID = {"meta", "link", "img", "input", "br", "source", "line", "circle", "path", "polyline"}


class Page(HTMLParser):
    """Elements in order: tag, attributes, tags of the ancestors, and the text inside."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        element = {
            "tag": tag,
            "at": dict(attributes),
            "within": [one["tag"] for one in self.open],
            "text": "",
        }
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.elements.append({"tag": tag, "at": dict(attributes), "within": [], "text": ""})

    def handle_endtag(self, tag):
        while self.open and self.open.pop()["tag"] != tag:
            pass

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def find(self, *tags):
        return [element for element in self.elements if element["tag"] in tags]


def make_board(tmp_path):
    score = {
        "value": 0.5,
        "ci_low": 0.4,
        "ci_high": 0.6,
        "chance": 0.1,
        "kind": "clear",
        "verdict": "above chance",
    }
    rows = [
        board_page.BoardRow(
            f"run{n}", f"/runs/{n}", "a/report.html", "" if n else "unfinished", "digits", "c", "ridge", "pixels",
            {"seed": n}, {"top1": score} if n else {},
        )
        for n in range(3)
    ]  # fmt: skip
    pooled = score | {"n_subjects": 2, "n_seeds": 1, "n_items": None, "resampled": "2 subjects"}
    validation = board_page.Validation("top5 among held-out training images", 0.4, 1, "top5", 50)
    settings = [
        board_page.PooledSetting({"lr": lr}, ["run1", "run2"], {"top1": pooled}, validation)
        for lr in (0.1, 0.2)
    ]
    table = board_page.SettingsTable(["lr"], settings, 0, "Chosen by validation alone.")
    path = board_page.write_board(
        tmp_path / "board.html", board_page.Board(rows, ["top1"], ["seed"], "run1", table)
    )
    return path.read_text()


@pytest.fixture(params=["report", "rich", "no images", "board"])
def found(request, tmp_path):
    given = {
        "report": lambda: page.render_report(make_content(result="36 of 40.", counted="1 subject.")),
        "rich": lambda: page.render_report(make_content(gallery=make_rich_gallery(12), leaks=["A leak."])),
        "no images": lambda: page.render_report(make_content(gallery=None, ranks=None)),
        "board": lambda: make_board(tmp_path),
    }
    return Page(given[request.param]())


def test_the_page_has_a_language_a_title_and_one_main_landmark(found):
    assert found.find("html")[0]["at"]["lang"] == "en"
    assert found.find("title")[0]["text"].strip()
    assert [len(found.find(tag)) for tag in ("main", "header", "footer", "h1")] == [1, 1, 1, 1]
    assert (
        found.elements[[e["tag"] for e in found.elements].index("a")]["at"]["href"] == "#main"
    )  # the skip link


def test_headings_go_down_one_level_at_a_time(found):
    levels = [
        int(one["tag"][1]) for one in found.find("h1", "h2", "h3", "h4") if "dialog" not in one["within"]
    ]
    if levels[0] == 2:  # leaks stand above the headline
        levels = levels[1:]
    assert levels[0] == 1
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(levels))


def test_every_picture_is_said_in_words(found):
    assert all(one["at"].get("alt") for one in found.find("img"))
    drawings = [one for one in found.find("svg") if "svg" not in one["within"]]
    assert all(one["at"].get("aria-label") or one["at"].get("aria-hidden") for one in drawings)


def test_tables_have_a_name_and_heads_with_a_scope(found):
    tables = found.find("table")
    assert tables
    named = sum("aria-labelledby" in one["at"] for one in tables) + len(found.find("caption"))
    assert named == len(tables)
    assert all(one["at"].get("scope") in ("col", "row", "rowgroup") for one in found.find("th"))


def test_every_field_has_a_label(found):
    assert all("label" in one["within"] for one in found.find("input", "select"))
    assert all(one["text"].strip() or one["at"].get("aria-label") for one in found.find("button"))


def test_names_of_elements_are_used_once_and_lead_somewhere(found):
    ids = [one["at"]["id"] for one in found.elements if "id" in one["at"]]
    assert len(ids) == len(set(ids))
    asked = [one["at"]["aria-labelledby"] for one in found.elements if "aria-labelledby" in one["at"]]
    asked += [one["at"]["href"][1:] for one in found.find("a") if one["at"].get("href", "").startswith("#")]
    assert set(asked) <= set(ids)


def test_what_scrolls_can_be_reached_by_the_keyboard(found):
    scrolling = [one for one in found.elements if one["at"].get("class") in ("scroll", "canvas")]
    assert scrolling
    assert all(one["at"].get("tabindex") == "0" and one["at"].get("aria-label") for one in scrolling)


def test_a_printed_page_holds_the_scores_that_a_screen_folds():
    text = page.render_report(make_content(gallery=make_gallery(6)))
    rules = text[text.index("@media print") :]
    assert "#scores details::details-content { content-visibility: visible" in rules
    assert re.search(r"nav, #browse, dialog, \.skip \{ display: none", rules)
