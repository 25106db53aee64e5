"""Checks are made one after the other: what each finds is kept, and an error of one is a finding."""

from types import SimpleNamespace

import pytest

from braindecode_vis.base.checks import DataError
from braindecode_vis.pipeline.leaks.findings import AuditFinding
from braindecode_vis.pipeline.leaks.quick import make_checks

OK, WARNING = AuditFinding("rows", "ok", "fine."), AuditFinding("sides", "warning", "hm.")


def fail_with(error):
    def check_many_files(run):
        raise error

    return check_many_files


def test_what_checks_find_is_kept_in_order_and_said_once():
    run = SimpleNamespace()
    assert make_checks(run, [lambda _: [OK], lambda _: [], lambda _: [WARNING, OK]]) == [OK, WARNING]


@pytest.mark.parametrize(
    ("error", "before", "level", "words"),
    [
        (DataError("rows are gone."), (), "warning", "damaged: this could not be checked (rows are gone)."),
        (ValueError("no number"), (), "warning", "damaged: this could not be checked (ValueError: no number)."),
        (KeyError(), (), "warning", "(KeyError: no words)"),
        (PermissionError(13, "no", "a.json"), (), "warning", "this could not be checked (permission was denied at"),
        # A broken chain says that the file is not the one that the run wrote.
        (DataError("rows are gone"), (AuditFinding("chain", "leak", "x"),), "leak", "damaged: this could not"),
        (DataError("rows are gone"), (AuditFinding("chain", "ok", "x"),), "warning", "damaged: this could not"),
        (DataError("rows are gone"), (AuditFinding("rows", "leak", "x"),), "warning", "damaged: this could not"),
    ],
)  # fmt: skip
def test_a_check_that_fails_is_a_finding_and_the_next_one_is_made(error, before, level, words):
    stated = []
    run = SimpleNamespace(state=lambda *what: stated.append(what))
    found = make_checks(run, [fail_with(error), lambda _: [OK]], before, part="fit")
    assert [(item.check, item.level) for item in found] == [("many-files", level), ("rows", "ok")]
    assert words in found[0].message
    assert [what[:3] for what in stated] == [("fit", "not verified", "many-files")]
