"""Options of the verbs `live` and `stream`: those that contradict each other are refused, the others are passed on."""

from pathlib import Path

import pytest

import braindecode_vis.cli  # noqa: F401 - verbs are imported by it
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.parts.live import replay, stream_verbs
from braindecode_vis.parts.live.stream_verbs import stream
from braindecode_vis.parts.live.verbs import live


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"as_json": True, "jsonl": "-"}, "both write to standard output"),
        *(({"page": False, **one}, "but --no-page leaves it out")
          for one in ({"token": "x"}, {"port": 80}, {"host": "0.0.0.0"}, {"open_page": True})),
        ({"calibrate": "test", "page": False}, "--calibrate shows pictures in the page"),
        ({"calibrate": "test", "every": 1.0}, "--calibrate shows pictures in the page"),
        ({"photodiode": "light"}, "--photodiode corrects the onsets of --calibrate"),
        *((one, "for the block of --calibrate") for one in ({"pictures": 5}, {"rounds": 1}, {"soa": 2.0})),
        ({"t_r": 2.0}, "--tr and --reader are for --source folder"),
        ({"reader": "dicom"}, "--tr and --reader are for --source folder"),
        *((one, "--record-later waits for the page's button")
          for one in ({"record_later": True}, {"record_later": True, "page": False, "record": Path("recorded")})),
        ({"adapt": "always"}, "--adapt is 'always', but must be running"),
    ],
)  # fmt: skip
def test_options_of_live_that_contradict_each_other_are_refused_before_anything_is_read(
    options, words, tmp_path
):
    with pytest.raises(ConfigError, match=words):
        live(run=tmp_path, stream="EEG", **options)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"as_json": True}, {"jsonl": "-"}, {"every": 1.0}, {"adapt": "running"},
        {"source": "folder", "t_r": 2.0, "reader": "dicom"}, {"source": "package.module:Source", "t_r": 2.0},
    ],
)  # fmt: skip
def test_options_of_live_that_agree_come_to_the_run(options, tmp_path, monkeypatch):
    def open_finished(folder, *rest):
        raise DataError("the run is read")

    monkeypatch.setattr("braindecode_vis.pipeline.finished_run.open_finished", open_finished)
    with pytest.raises(DataError, match="the run is read"):
        live(run=tmp_path, stream="EEG", page=False, **options)


def test_options_of_stream_come_to_the_phantom(tmp_path, monkeypatch):
    pytest.importorskip("mne_lsl", reason="the extra live is not installed")
    asked = []

    def open_phantom(root, **options):
        asked.append({"root": root, **options})
        raise DataError("the phantom is opened")

    monkeypatch.setattr(replay, "open_phantom", open_phantom)
    given = {"run": tmp_path, "subject": 2, "split": "all", "soa": 0.5, "seed": 3}
    plain = {"run": None, "subject": 1, "split": "test", "soa": None, "seed": 0}
    for words in ({**given, "subject": ["2"]}, {}):
        with pytest.raises(DataError, match="the phantom is opened"):
            stream(source="phantom", root=tmp_path, **words)
    assert asked == [{"root": tmp_path, **given}, {"root": tmp_path, **plain}]
    for option in ("overrides", "recording", "column", "repeat"):
        with pytest.raises(ConfigError, match="has no effect on a phantom"):
            stream(source="phantom", root=tmp_path, **{option: ["x"]})


def test_what_volumes_have_no_use_for_is_refused(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(stream_verbs, "_write_scan", lambda *words: written.append(words))
    stream(source=str(tmp_path), to=tmp_path / "scan", speed=2.0, recording=3, duration=4.0)
    assert written == [(tmp_path, tmp_path / "scan", 2.0, 3, 4.0, False)]
    for option, value in {
        "name": "x", "chunk": 21, "repeat": True, "wait": True, "soa": 1.0, "subject": ["1"], "split": "all",
        "column": "x", "drop": 0.1, "jitter": 1.0, "drift": 1.0, "lose": ["Oz@1"], "pause": ["1@1"], "seed": 1,
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=f"--{option} has no effect on volumes"):
            stream(source=str(tmp_path), to=tmp_path / "scan", **{option: value})
