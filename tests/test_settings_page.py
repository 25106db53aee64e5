"""Every setting is described, and ``docs/SETTINGS.md`` says what the classes say."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location(
    "write_settings", Path(__file__).resolve().parent.parent / "docs" / "write_settings.py"
)
page = importlib.util.module_from_spec(spec)
spec.loader.exec_module(page)


def test_the_page_is_current():
    assert page.PAGE.read_text() == page.write_page(), "run: python docs/write_settings.py"


def test_every_option_has_a_description():
    roles, others = page.find_classes(*page.VERBS.values())
    classes = [
        page.RunConfig,
        *page.VERBS.values(),
        *others,
        *(c for r in roles.values() for c in r.values()),
    ]
    lacking = [
        f"{c.__name__}.{name}" for c in classes for name, text in page.describe_options(c).items() if not text
    ]
    assert lacking == []
    assert sum(len(page.describe_options(c)) for c in classes) > 800


@pytest.mark.parametrize("word", ["`package.module:Class`", "braindecode_vis.image_encoders", "Entry points"])
def test_the_page_tells_of_components_from_outside(word):
    assert word in page.PAGE.read_text()
