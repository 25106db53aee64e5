"""A run of which all is there says what it said, from what was kept of it; whatever differs goes through the stages."""

import json
import shutil
from pathlib import Path

import pytest

from braindecode_vis.base import digests
from braindecode_vis.config import read_config
from braindecode_vis.pipeline import ending, reporting
from braindecode_vis.pipeline.runs import SilentListener, open_run

pytestmark = pytest.mark.whole

QUICK = ["evaluation.n_bootstrap=100", "evaluation.n_permutations=100", "encoder.alphas=[1, 10]"]


class Listener(SilentListener):
    def __init__(self):
        self.told = []

    def finished(self, stage, artifact, seconds):
        self.told.append((stage, artifact.path.name, artifact.fingerprint, artifact.reused, artifact.reason))


def finish(folder, *overrides, config=None):
    """Return the ending, what the listener got, and whether the stages were asked."""
    run = open_run(config or read_config("synthetic_digits", [*QUICK, *overrides]), folder, Listener())
    return ending.finish_run(run), run.listener.told, "preprocess" in run.seen


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ending") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BRAINDECODE_VIS_CACHE", str(tmp_path_factory.mktemp("cache")))
        finish(folder)
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of a finished run that has been looked at once, so that its ending is kept."""
    copy = Path(shutil.copytree(finished, tmp_path / "run"))
    assert finish(copy)[2]
    return copy


@pytest.mark.parametrize("kept", [pytest.param("out of fold", marks=pytest.mark.further), "categories", ""])
def test_what_is_kept_is_what_the_stages_say(tmp_path, kept):
    overrides = {
        "out of fold": ["prior={kind: spread}", "split={kind: kfold, n_folds: 2}", "encoder.alphas=[10]"],
        "categories": ["encoder={kind: lda}"],
        "": ["encoder.alphas=[1.0e+6, 1.0e+7]"],  # which gets a hint
    }[kept]
    config = read_config("synthetic_digits", [*QUICK[:2], *overrides])
    finish(tmp_path, config=config)
    digests._USED.clear()
    digests._SOUND.clear()
    known, told, asked = finish(tmp_path, config=config)
    assert not asked
    n_files = digests.count_verified().n_files
    anew = open_run(config, tmp_path, Listener())
    rows = reporting.run_all(anew)
    assert (known.rows, told) == (rows, anew.listener.told)
    assert known.hints == reporting.list_hints(anew)
    assert known.hints or kept
    assert reporting.check_leaks(anew).summarise() in known.checked
    assert known.leaks == ""
    assert n_files == sum(path.is_file() for path in tmp_path.rglob("[!.]*"))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage_cache(folder):
    path = ending._find_place(folder)
    record = json.loads(path.read_text())
    record["record"]["summary"] = "all is well"
    path.write_text(json.dumps(record))


CHANGES = [
    lambda folder: flip(next(folder.glob("stages/train/*/ridge.safetensors"))),
    lambda folder: flip(folder / "report.html"),
    lambda folder: (folder / "scores.json").unlink(),
    lambda folder: (folder / "stages" / "analyze").mkdir() or (folder / "stages/analyze/left").touch(),
    damage_cache,
    lambda folder: ending._find_place(folder).write_text("{"),
    lambda folder: ending._find_place(folder).write_text("[]"),
    lambda folder: ending._find_place(folder).unlink(),
]


def test_whatever_differs_goes_through_the_stages_again(folder):
    """One change after the other, as a run that went through them is as it was."""
    first, _, asked = finish(folder)
    assert not asked
    for number, change in enumerate(CHANGES):
        change(folder)
        again, _, asked = finish(folder)
        assert asked, number
        assert [row["value"] for row in again.rows] == [row["value"] for row in first.rows], number
        assert "all is well" not in again.checked
        if again.leaks:  # of a changed file, which was replaced: not kept
            assert finish(folder)[0].leaks == "", number
        assert not finish(folder)[2], number


def test_other_settings_inputs_or_code_go_through_the_stages_again(folder, monkeypatch):
    """Also a setting that changes no stage, such as the name, which the report shows."""
    assert not finish(folder)[2]
    assert finish(folder, "name=another")[2]
    assert finish(folder)[2]  # whose config.yaml and report are now those of the other name
    assert not finish(folder)[2]
    monkeypatch.setattr(ending, "_identify_code", lambda: ["another"])
    assert finish(folder)[2]
    monkeypatch.undo()
    config = read_config("synthetic_digits", QUICK)
    monkeypatch.setattr(type(config.dataset), "hash_inputs", lambda self: {"recording": "another"})
    assert finish(folder, config=config)[2]


def test_inputs_that_change_while_the_stages_run_are_looked_at_again(folder, monkeypatch):
    """What is kept holds for the inputs of before: those of afterwards may be others than the stages read."""
    config, inputs = read_config("synthetic_digits", QUICK), {"recording": "before"}
    monkeypatch.setattr(type(config.dataset), "hash_inputs", lambda self: dict(inputs))
    run_all = reporting.run_all

    def run_and_change(run):
        rows = run_all(run)
        inputs["recording"] = "after"
        return rows

    monkeypatch.setattr(reporting, "run_all", run_and_change)
    finish(folder, config=config)
    monkeypatch.setattr(reporting, "run_all", run_all)
    assert finish(folder, config=config)[2]


def test_a_leak_is_told_each_time(folder, monkeypatch):
    """A run with a leak ends with exit code 2, also when it is only looked at again."""
    from braindecode_vis.pipeline.leaks import quick
    from braindecode_vis.pipeline.leaks.findings import Audit, AuditFinding

    leaky = Audit(folder, (AuditFinding("trials", "leak", "both sides.", "fold00"),))
    monkeypatch.setattr(quick, "audit_quickly", lambda folder: leaky)
    (folder / "report.html").unlink()
    first = finish(folder)[0]
    again, _, asked = finish(folder)
    assert (first.leaks, asked) == (leaky.summarise_leaks(), False)
    assert again.leaks == first.leaks


@pytest.mark.parametrize("target", ["another file", "nothing", "itself", "a folder"])
def test_a_report_that_was_replaced_by_a_link_is_written_again(folder, tmp_path, target):
    """The changed file is named once, nothing is written through the link, and the next call finds nothing wrong.

    What was said of the changed file used to be kept, and the run was refused for ever.
    """
    other, page = tmp_path / "other.html", folder / "report.html"
    other.write_text("mine")
    page.unlink()
    page.symlink_to(
        {"another file": other, "nothing": "nowhere", "itself": page.name, "a folder": "stages"}[target]
    )
    first = finish(folder)[0]
    assert ("report.html was changed after the run" in first.leaks) == (target == "another file")
    assert other.read_text() == "mine"
    assert page.is_file()
    assert not page.is_symlink()
    assert finish(folder)[0].leaks == ""
    assert "tampered" not in page.read_text()
    assert finish(folder)[2] is False  # nothing has changed since
