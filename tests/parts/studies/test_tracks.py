"""Tracks and entries: frozen splits, what an entry must be, and how it is scored, placed, shown and audited."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import BraindecodeVisError, ConfigError, DataError
from braindecode_vis.cli import main
from braindecode_vis.config import read_config
from braindecode_vis.parts.studies.judging import hidden_labels as hidden_module
from braindecode_vis.parts.studies.judging import tracks as tracks_module
from braindecode_vis.parts.studies.judging.entries import (
    check_seal,
    open_source,
    read_card,
    read_entry,
    seal_entry,
)
from braindecode_vis.parts.studies.judging.entry_board import make_entry_board, read_published
from braindecode_vis.parts.studies.judging.entry_scores import audit_entry, read_table, score_entry
from braindecode_vis.parts.studies.judging.hidden_labels import read_hidden_entry, spend_day
from braindecode_vis.parts.studies.judging.tracks import (
    FLOORS,
    Track,
    TrackSplit,
    describe_track,
    list_tracks,
    read_split,
    read_track,
)

ROOT = Path(__file__).resolve().parents[3]
SUBJECTS = ("01", "02", "03")
CARD = {
    "name": "mine", "team": "us", "code": "none", "weights": "none", "licence": "CC-BY-4.0", "extra_data": [],
    "hours": 0.1, "hardware": "one core",
    "chosen": {"on": "fixed", "epoch": "the last one", "settings": "as in the paper"}, "seeds": [0], "space": "toy",
}  # fmt: skip


def call(words):
    """Run the command and return its exit code."""
    before, sys.argv = sys.argv, ["braindecode-vis", *words]
    try:
        with pytest.raises(SystemExit) as end:
            main()
    finally:
        sys.argv = before
    return end.value.code or 0


@pytest.fixture(scope="module")
def split():
    return read_split(read_track("phantom_mixture"))


def write_entry(folder, split, *, signal=1.0, seeds=(0,), dim=24, images=False, **card):
    """Write an entry whose predictions follow the gallery by as much as `signal`."""
    rng = np.random.default_rng(7)
    gallery = rng.normal(size=(len(split.gallery), dim)).astype(np.float32)
    place = {name: row for row, name in enumerate(split.gallery)}
    folder.mkdir(parents=True)
    (folder / "entry.yaml").write_text(yaml.safe_dump(CARD | {"seeds": list(seeds)} | card))
    for seed in seeds:
        noise = np.random.default_rng(seed + 100)
        at = folder / "predictions" / (f"seed-{seed}" if len(seeds) > 1 else "")
        at.mkdir(parents=True)
        for subject, ids in split.queries.items():
            own = gallery[[place[name] for name in ids]]
            np.save(at / f"{subject}.npy", signal * own + noise.normal(size=own.shape).astype(np.float32))
    np.save(folder / "gallery.npy", gallery)
    (folder / "gallery.txt").write_text("\n".join(split.gallery) + "\n")
    if images:
        from PIL import Image

        for subject, ids in split.queries.items():
            (folder / "images" / subject).mkdir(parents=True)
            for name in ids:
                Image.new("RGB", (16, 16), (len(name), 90, 120)).save(
                    folder / "images" / subject / f"{name}.png"
                )
    return folder


def accept(folder, split, entries):
    entry = read_entry(folder, read_track(split.track), split)
    return seal_entry(entry, entries, score_entry(entry, n_bootstrap=50).as_json())


# --- tracks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_tracks())
def test_a_track_fits_together(name):
    track = read_track(name)
    if track.ids == "shipped":
        split = read_split(track)
        assert split.sha256 == track.sha256
        assert tuple(split.queries) == track.subjects
        smallest = min(len(ids) for ids in split.galleries)
        assert track.chance["top1"] == pytest.approx(1 / smallest)
    else:
        with pytest.raises(DataError, match="made from your own copy"):
            read_split(track)
    assert read_config(track.configuration, list(track.changes)).dataset.kind == track.dataset


def test_a_page_says_how_its_data_is_made():
    assert "--drive mixture" in describe_track(read_track("phantom_mixture"))["Data"]


def test_the_table_names_what_was_asked_for():
    wanted = (
        "things_eeg2_within things_eeg2_loso things_meg_small things_meg_large nsd_40h nsd_1h nsd_new_subject "
        "nsd_imagery god deeprecon things_eeg2_sub08 laion_fmri_tau laion_fmri_ood v4_photographs "
        "digits69 phantom_mixture"
    )
    assert set(list_tracks()) == set(wanted.split())


def test_a_changed_split_is_another_split(split, tmp_path):
    ids = list(split.queries["01"])
    other = TrackSplit(split.track, {"01": ids[:-1]}, split.galleries)
    path = other.write(tmp_path / "split.json")
    with pytest.raises(DataError, match="its ids are others"):
        read_split(read_track(split.track), path)


def test_published_ids_become_a_split(tmp_path, monkeypatch, capsys):
    published = tmp_path / "tau.json"
    published.write_text(
        json.dumps({"variants": [{"variant_id": 0, "train_ids": ["c"], "test_ids": ["b", "a"]}]})
    )
    assert call(["tracks", "make", "laion_fmri_tau", "--root", str(published), "--out", str(tmp_path)]) == 2
    assert "another pool or another release" in capsys.readouterr().err
    from braindecode_vis.parts.studies.judging import tracks

    known = read_track("laion_fmri_tau").model_copy(update={"published_sha256": ""})
    monkeypatch.setattr(tracks, "read_track", lambda name: known)
    path, split, agrees = tracks.make_split("laion_fmri_tau", tmp_path, published)
    assert (split.gallery, agrees, path.is_file()) == (["a", "b"], None, True)


@pytest.mark.shared
def test_a_run_of_a_track_is_an_entry_that_another_team_audits(shared, tmp_path, capsys):
    root, run, entries = shared / "data" / "digits69", tmp_path / "run", tmp_path / "entries"
    assert call(["run", "--track", "digits69", "--root", str(root), "--out", str(run)]) == 0
    assert call(["submit", str(run), "--track", "digits69", "--out", str(entries), "--bring-run"]) == 0
    capsys.readouterr()
    folder = entries / "digits69" / "braindecode_vis--digits69_ridge"
    assert call(["score", str(folder), "--track", "digits69", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["scores"]
    own = {row["metric"]: row for row in rows if row["method"] == "decoded"}
    ran = {
        row["metric"]: row
        for row in json.loads((run / "scores.json").read_text())
        if row["method"] == "decoded"
    }
    for metric in ("top1", "top5", "2_way"):
        assert own[metric]["value"] == pytest.approx(ran[metric]["value"], abs=1e-6)
        assert own[metric]["chance"] == ran[metric]["chance"]
    with pytest.raises(ConfigError, match="cannot audit its own entry"):
        audit_entry(folder, "Braindecode_vis")
    assert audit_entry(folder, "others")["passed"]
    _, floors, troubles = read_table(read_track("digits69"), entries / "digits69")
    assert [row.audited for row in floors] == ["others"]
    assert not troubles
    other = [
        "run",
        "--track",
        "digits69",
        "--root",
        str(root),
        "--out",
        str(tmp_path / "o"),
        "--set",
        "split.kind=kfold",
    ]
    assert call(other) == 2
    assert "tests other pictures of subject 01 than the track digits69" in capsys.readouterr().err


# --- entries ------------------------------------------------------------------------------------------------------


def change_card(**fields):
    def change(folder, split):
        path = folder / "entry.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | fields))

    return change


def change_rows(change_array):
    def change(folder, split):
        path = folder / "predictions" / "02.npy"
        np.save(path, change_array(np.load(path)))

    return change


def put_nan(array):
    array[3, 2] = np.nan
    return array


def copy_targets(folder, split, scale=3.0):
    gallery = np.load(folder / "gallery.npy")
    place = {name: row for row, name in enumerate(split.gallery)}
    np.save(folder / "predictions" / "03.npy", scale * gallery[[place[name] for name in split.queries["03"]]])


def name_other_ids(folder, split):
    (folder / "predictions" / "01.txt").write_text("\n".join(["nothing", *split.queries["01"][1:]]) + "\n")


def write_text(text):
    """Return a change that puts a line of YAML in the place of the hardware."""

    def change(folder, split):
        path = folder / "entry.yaml"
        content = yaml.safe_load(path.read_text())
        del content["hardware"]
        path.write_text(yaml.safe_dump(content) + f"hardware: {text}\n")

    return change


def put_pictures(folder, split, wrong=b""):
    from PIL import Image

    for subject, ids in split.queries.items():
        (folder / "images" / subject).mkdir(parents=True)
        for name in ids:
            Image.new("RGB", (4, 4)).save(folder / "images" / subject / f"{name}.png")
    if wrong:
        (folder / "images" / "01" / f"{split.queries['01'][0]}.png").write_bytes(wrong)
    else:
        (folder / "images" / "01" / "more.png").write_bytes(b"x")


def link_run(folder, split):
    secret = folder.parent / "secret"
    secret.mkdir()
    (secret / "config.yaml").write_text("a: 1")
    (folder / "run").symlink_to(secret)


def save_twice(folder, split):
    from safetensors.numpy import save_file

    save_file({"a": np.load(folder / "predictions" / "01.npy")}, folder / "predictions" / "01.safetensors")


def add_seed(folder, split):
    shutil.copytree(folder / "predictions", folder.parent / "seed")
    shutil.move(folder.parent / "seed", folder / "predictions" / "seed-7")


#: Opened as PostScript, it would run a program.
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"


def write_large(folder, split):
    path = folder / "images" / "01" / "a.png"
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(10 << 30)  # a hole in the file; no block of the disk is used


WRONG = {
    "ids": (name_other_ids, "misses 1 of 40 ids of the queries of subject 01"),
    "subject": (lambda f, s: (f / "predictions" / "02.npy").unlink(), "no predictions of subject 02"),
    "more subjects": (lambda f, s: np.save(f / "predictions" / "09.npy", np.ones((2, 2))), "'09', which is no subject"),
    "rows": (change_rows(lambda a: a[:-1]), "has 39 rows, but there are 40 ids"),
    "NaN": (change_rows(put_nan), "02.npy"),
    "width": (change_rows(lambda a: a[:, :-1]), "all need the same"),
    "one number": (change_rows(lambda a: a[:, 0]), "numbers of shape"),
    "copies": (copy_targets, "40 of 40 predictions of subject 03 .* targets were copied into"),
    "split": (change_card(split="0" * 64), "names the split 0000000000000000..., but the track"),
    "licence": (change_card(licence="CC-BY-NC-ND-4.0"), "forbids that others change or pass on"),
    "unknown licence": (change_card(licence="WTF"), "is not known here"),
    "not chosen": (change_card(chosen={"on": "luck", "epoch": "last", "settings": "none"}), "chosen.on is 'luck'"),
    "name": (change_card(name="../up"), "name is '../up'"),
    "seeds": (change_card(seeds=[0, 1]), "has no folder seed-0"),
    "no gallery": (lambda f, s: (f / "gallery.npy").unlink(), "has no gallery.npy"),
    "pickle": (lambda f, s: (f / "predictions" / "01.pkl").write_bytes(b"x"), "no file of an entry"),
    "link": (lambda f, s: (f / "gallery.safetensors").symlink_to("/etc/passwd"), "is a link"),
    "10 GB": (write_large, "holds 10.0 GB, and an entry at most 2 GB"),
    "no card": (lambda f, s: (f / "entry.yaml").unlink(), "entry.yaml is missing"),
    "no YAML": (lambda f, s: (f / "entry.yaml").write_text("a: [b"), "is not YAML"),
    "no fields": (lambda f, s: (f / "entry.yaml").write_text(""), "must hold the fields of docs/TRACKS.md"),
    "a day that is none": (write_text("2026-13-45"), "is not YAML .month must be in 1..12"),
    "a number of 5000 digits": (write_text("1" * 5000), "is not YAML .Exceeds the limit"),
    "code in YAML": (write_text("!!python/object/apply:os.system [ls]"), "is not YAML .could not determine"),
    "aliases": (write_text("[&a [x, x], [*a, *a]]"), "hardware is"),
    "steering a terminal": (write_text('"\\e[2J"'), "hardware is .*should match pattern"),
    "negative seed": (change_card(seeds=[-1]), "seeds.0 is -1, but input should be"),
    "endless hours": (change_card(hours=float("inf")), "hours is inf"),
    "small copies": (lambda f, s: copy_targets(f, s, 1e-20), "targets were copied into"),
    "saved twice": (save_twice, "holds 01.npy and 01.safetensors; keep one"),
    "another seed": (add_seed, "holds 01.npy, which belongs to none of the seeds .0."),
    "no picture": (lambda f, s: put_pictures(f, s, b"nothing"), "is no PNG or JPEG picture"),
    "a picture that runs": (lambda f, s: put_pictures(f, s, POSTSCRIPT), "is no PNG or JPEG picture"),
    "more pictures": (put_pictures, "more.png is the picture of no query"),
    "linked run": (link_run, "run is a link"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_said_and_nothing_is_accepted(wrong, split, tmp_path, capsys):
    change, said = WRONG[wrong]
    folder, entries = write_entry(tmp_path / "entry", split), tmp_path / "entries"
    change(folder, split)
    assert call(["submit", str(folder), "--track", split.track, "--out", str(entries)]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(said, error), error
    assert not entries.exists()


@pytest.mark.parametrize("name", ["../outside.npy", "/etc/x.npy", "a/../../x.npy"])
def test_a_zip_that_climbs_is_refused(name, tmp_path):
    with zipfile.ZipFile(tmp_path / "entry.zip", "w") as archive:
        archive.writestr(name, b"x")
    with (
        pytest.raises(DataError, match="leaves the folder of the entry"),
        open_source(tmp_path / "entry.zip"),
    ):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["entry.zip"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_holds_each_file_once(tmp_path):
    with zipfile.ZipFile(tmp_path / "entry.zip", "w") as archive:
        archive.writestr("entry.yaml", "a: 1")
        archive.writestr("entry.yaml", "a: 2")
    with (
        pytest.raises(DataError, match="must be unique, but 'entry"),
        open_source(tmp_path / "entry.zip"),
    ):
        pass


@pytest.mark.parametrize("packing", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_zip_is_refused(packing, tmp_path):
    path = tmp_path / "entry.zip"
    with zipfile.ZipFile(path, "w", packing) as archive:
        archive.writestr("gallery.npy", np.random.default_rng(0).bytes(4000))
    content = bytearray(path.read_bytes())
    content[60:100] = b"\xff" * 40
    path.write_bytes(content)
    with pytest.raises(DataError, match="is not a ZIP that can be read"), open_source(path):
        pass


def test_a_zip_is_an_entry(split, tmp_path):
    folder = write_entry(tmp_path / "entry", split)
    with zipfile.ZipFile(tmp_path / "entry.zip", "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(tmp_path))
    assert (
        call(["submit", str(tmp_path / "entry.zip"), "--track", split.track, "--out", str(tmp_path / "all")])
        == 0
    )
    assert check_seal(tmp_path / "all" / split.track / "us--mine", whole=True)["split"] == split.sha256


def test_the_card_of_the_page_is_one(tmp_path):
    page = (ROOT / "docs" / "TRACKS.md").read_text()
    (tmp_path / "entry.yaml").write_text(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])
    card = read_card(tmp_path / "entry.yaml")
    assert (card.chosen.on, card.seeds, len(card.extra_data)) == ("validation", (0, 1, 2, 3, 4), 1)


def test_a_name_is_taken_once(split, tmp_path):
    folder = write_entry(tmp_path / "entry", split)
    path = accept(folder, split, tmp_path / "all")
    before = (path / "seal.json").read_bytes()
    change_card(name="MINE")(folder, split)
    with pytest.raises(DataError, match="already; choose another name"):
        accept(folder, split, tmp_path / "all")
    assert (path / "seal.json").read_bytes() == before
    assert len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize(
    "file", ["entry.yaml", "predictions/01.npy", "gallery.txt", "scores.json", "more.txt"]
)
def test_a_seal_shows_what_was_changed(file, split, tmp_path):
    path = accept(write_entry(tmp_path / "entry", split), split, tmp_path / "all")
    with (path / file).open("ab") as opened:
        opened.write(b" ")
    with pytest.raises(DataError, match="not as it was sealed"):
        check_seal(path, whole=True)


# --- scores -------------------------------------------------------------------------------------------------------


def test_ids_decide_and_not_the_order_of_rows(split, tmp_path):
    plain = write_entry(tmp_path / "plain", split)
    turned = write_entry(tmp_path / "turned", split)
    for subject, ids in split.queries.items():
        path = turned / "predictions" / f"{subject}.npy"
        np.save(path, np.load(path)[::-1])
        path.with_suffix(".txt").write_text("\n".join(reversed(ids)) + "\n")
    track = read_track(split.track)
    first, second = (score_entry(read_entry(f, track, split), n_bootstrap=50) for f in (plain, turned))
    assert np.array_equal(first.items["top1"], second.items["top1"])
    assert first.items["top1"].mean() > 0.5


@pytest.mark.parametrize(
    "column, card, centred",
    [
        ("clean", {}, False),
        ("test-selected", {"chosen": CARD["chosen"] | {"on": "test"}}, False),
        ("transductive", {"transductive": True}, False),
        ("transductive", {}, True),
        ("transductive", {"chosen": CARD["chosen"] | {"on": "test"}}, True),
    ],
)
def test_columns_are_computed_and_not_only_stated(column, card, centred, split, tmp_path):
    folder = write_entry(tmp_path / "entry", split, **card)
    if centred:
        for path in (folder / "predictions").glob("*.npy"):
            np.save(path, np.load(path) - np.load(path).mean(axis=0))
    found = score_entry(read_entry(folder, read_track(split.track), split), n_bootstrap=50)
    assert found.column == column
    assert bool(found.signs) == centred


def test_floors_are_at_chance_and_seeds_are_averaged(split, tmp_path):
    folder = write_entry(tmp_path / "entry", split, seeds=(0, 1, 2, 3, 4), signal=0.5)
    entry = read_entry(folder, read_track(split.track), split)
    found = score_entry(entry, n_bootstrap=50)
    assert not any("seed" in note for note in found.notes)
    values = {(row.method, row.metric): row for row in found.rows if row.subject == "all"}
    assert values["mean image", "top1"].value == pytest.approx(1 / 40)
    assert values["mean image", "2_way"].value == pytest.approx(0.5, abs=1e-9)
    # 120 queries at chance, five standard errors: sqrt(.025 * .975 / 120) = .014.
    assert abs(values["shuffled", "top1"].value - 0.025) < 0.07
    assert values["decoded", "top1"].resampled.startswith("3 subjects and 40 images (crossed")
    assert set(np.round(found.items["top1"] * 5, 6)) <= {0.0, 1.0, 2.0, 3.0, 4.0, 5.0}
    alone = score_entry(read_entry(write_entry(tmp_path / "one", split), entry.track, split), n_bootstrap=50)
    assert any(note.startswith("1 seed:") for note in alone.notes)


def test_the_gallery_of_the_judge_decides(split, tmp_path):
    """A gallery that was made from the predictions finds everything, and nothing in the gallery of the judge."""
    folder = write_entry(tmp_path / "entry", split, signal=0.0)
    honest = np.load(folder / "gallery.npy")
    made = np.mean([np.load(folder / "predictions" / f"{who}.npy") for who in SUBJECTS], axis=0)
    np.save(folder / "gallery.npy", made)
    entry = read_entry(folder, read_track(split.track), split)
    assert score_entry(entry, n_bootstrap=50).items["top1"].mean() > 0.7
    judged = score_entry(entry, gallery=Embeddings(honest, split.gallery, "judge"), n_bootstrap=50)
    assert judged.items["top1"].mean() < 0.15  # chance .025
    assert any("judge computed" in note for note in judged.notes)
    with pytest.raises(DataError, match="misses 39 pictures"):
        score_entry(entry, gallery=Embeddings(honest[:1], split.gallery[:1], "judge"))


def test_queries_are_ranked_in_the_gallery_of_their_fold(tmp_path):
    ids = [f"p{n:02d}" for n in range(24)]
    split = TrackSplit("v4_photographs", {"PE": ids}, [ids[::2], ids[1::2]])
    folder = write_entry(tmp_path / "entry", split, signal=0.6)
    found = score_entry(read_entry(folder, read_track("v4_photographs"), split), n_bootstrap=50)
    row = next(row for row in found.rows if (row.metric, row.method) == ("top1", "decoded"))
    assert row.chance == pytest.approx(1 / 12)
    assert "folds" in row.resampled
    gallery, own = np.load(folder / "gallery.npy"), np.load(folder / "predictions" / "PE.npy")
    places = {name: row for row, name in enumerate(split.gallery)}
    for number, name in enumerate(ids):
        rivals = [places[other] for other in ids[number % 2 :: 2]]
        unit = gallery[rivals] / np.linalg.norm(gallery[rivals], axis=1, keepdims=True)
        first = rivals[int((unit @ own[number]).argmax())] == places[name]
        assert found.items["top1"][number] == first


def test_entries_share_a_place_unless_their_difference_excludes_0(split, tmp_path):
    for name, signal in (("strong", 3.0), ("twin", 2.9), ("weak", 0.1), ("floor", 0.2)):
        card = {"name": name, "floor": "ridge" if name == "floor" else ""}
        accept(write_entry(tmp_path / name, split, signal=signal, **card), split, tmp_path / "all")
    accept(
        write_entry(
            tmp_path / "tested", split, signal=3.0, name="tested", chosen=CARD["chosen"] | {"on": "test"}
        ),
        split,
        tmp_path / "all",
    )
    (tmp_path / "all" / split.track / "broken").mkdir()
    columns, floors, troubles = read_table(read_track(split.track), tmp_path / "all" / split.track)
    assert [(row.card.name, row.place) for row in columns["clean"]] == [
        ("strong", 1),
        ("twin", 1),
        ("weak", 3),
    ]
    assert [row.card.name for row in columns["test-selected"]] == ["tested"]
    assert [row.card.name for row in floors] == ["floor"]
    assert len(troubles) == 1
    assert "not sealed" in troubles[0]


# --- board --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def board(split, tmp_path_factory):
    """Return a folder of entries and its site."""
    top = tmp_path_factory.mktemp("board")
    for name, signal in (("strong", 3.0), ("twin", 2.9), ("weak", 0.1)):
        accept(
            write_entry(top / name, split, signal=signal, name=name, images=name == "weak"),
            split,
            top / "all",
        )
    accept(write_entry(top / "tr", split, signal=2, name="tr", transductive=True), split, top / "all")
    folder = accept(
        write_entry(top / "bad", split, name="bad", extra_data=["<script>alert(1)</script>"]),
        split,
        top / "all",
    )
    listed = make_entry_board(top / "all", top / "site")
    return top, folder, listed


def test_a_site_has_a_page_for_everything_and_loads_nothing(board):
    top, _, listed = board
    site = top / "site"
    pages = sorted(site.rglob("*.html"))
    assert len(pages) == 2 + len(list_tracks()) + 5
    for page in pages:
        text = page.read_text()
        assert "default-src 'none'" in text
        assert "<script" not in text
        assert not re.search(r'(?:src|href)="(?:https?:)?//', text)
        for href in re.findall(r'href="([^"#]+)"', text):
            assert href == "data:," or (page.parent / href).resolve().is_file(), (page, href)
    weak = (site / "entries" / "phantom_mixture" / "us--weak.html").read_text()
    assert weak.count('<img src="data:') == 12
    assert json.loads((site / "entries.json").read_text()) == json.loads(json.dumps(listed))
    history = (site / "history.html").read_text()
    assert history.count("phantom_mixture/us--") == 5


def test_tables_of_columns_are_apart_and_each_has_the_floors(board):
    text = (board[0] / "site" / "phantom_mixture.html").read_text()
    sections = re.split(r'<section aria-labelledby="column-', text)[1:]
    entries = [re.findall(r"us--(\w+)\.html", section) for section in sections]
    assert entries == [["strong", "twin", "bad", "weak"], [], ["tr"]]
    for section in sections:
        assert re.findall(r'<tr class="floor"><td>floor</td><th scope="row">([^<]+)', section) == list(FLOORS)
    assert "1 seed, fewer than five" in text
    assert "&lt;script&gt;" in text
    found = {(row["card"]["name"], row["column"]): row["place"] for row in board[2]}
    assert found["strong", "clean"] == found["twin", "clean"] == 1
    assert found["weak", "clean"] > 1


def test_a_badge_is_for_this_entry_and_of_another_team(board):
    _, folder, _ = board
    seal = json.loads((folder / "seal.json").read_text())
    verdict = {"auditor": "others", "entry": seal["entry"], "passed": True, "refit": True}
    wrong = ({"auditor": "US"}, {"entry": "0"}, {"passed": False}, {"refit": False})
    for change, audited in (({}, "others"), *((change, "") for change in wrong)):
        (folder / "audit.json").write_text(json.dumps(verdict | change))
        columns, _, _ = read_table(read_track("phantom_mixture"), folder.parent)
        assert {row.audited for row in columns["clean"] if row.card.name == "bad"} == {audited}
    (folder / "audit.json").unlink()


def test_a_damaged_entry_is_named_and_the_others_are_shown(board, tmp_path):
    top, _, _ = board
    shutil.copytree(top / "all", tmp_path / "all")
    path = tmp_path / "all" / "phantom_mixture" / "us--twin" / "scores.json"
    path.write_text(path.read_text().replace('"value"', '"vaIue"', 1))
    assert len(make_entry_board(tmp_path / "all", tmp_path / "site")) == 4
    assert "us--twin: " in (tmp_path / "site" / "phantom_mixture.html").read_text()


def test_a_copy_of_a_sealed_entry_is_not_a_second_one(board, tmp_path):
    shutil.copytree(board[0] / "all", tmp_path / "all")
    track = tmp_path / "all" / "phantom_mixture"
    shutil.copytree(track / "us--twin", track / "us--more")
    _, _, troubles = read_table(read_track("phantom_mixture"), track)
    assert troubles == ["us--more: it is the entry us--twin; a folder has the name of its entry."]


def test_the_best_entry_that_calls_itself_a_floor_is_the_floor(split, tmp_path):
    for name, signal in (("a-sham", 0.0), ("ridge", 2.0)):
        folder = write_entry(tmp_path / name, split, signal=signal, name=name, floor="ridge")
        accept(folder, split, tmp_path / "all")
    make_entry_board(tmp_path / "all", tmp_path / "site")
    page = (tmp_path / "site" / "phantom_mixture.html").read_text()
    assert "ridge by us, an entry" in page
    assert "a-sham by us, an entry" not in page


def test_a_site_takes_the_place_of_a_site_alone(board, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("all of it")
    with pytest.raises(DataError, match="holds other files"):
        make_entry_board(board[0] / "all", tmp_path / "mine")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="holds no entries"):
        make_entry_board(tmp_path / "none", tmp_path / "site")
    (tmp_path / "none" / "nothing").mkdir()
    with pytest.raises(DataError, match="is no folder of a track"):
        make_entry_board(tmp_path / "none", tmp_path / "site")


@pytest.mark.further
def test_the_workflow_scores_a_folder_of_a_pull_request(split, tmp_path):
    """The steps of the template that are commands, but for the installation."""
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(tmp_path))
    for words in (["init", "-q", "-b", "main"], ["commit", "-q", "--allow-empty", "-m", "base"]):
        subprocess.run([*git, *words], check=True)
    subprocess.run([*git, "remote", "add", "origin", str(tmp_path)], check=True)
    subprocess.run([*git, "checkout", "-q", "-b", "submission"], check=True)
    write_entry(tmp_path / "incoming" / "phantom_mixture" / "of a team", split, signal=0.5)
    command = tmp_path / "bin" / "braindecode-vis"
    command.parent.mkdir()
    code = "import sys; from braindecode_vis.cli import main; sys.exit(main())"
    command.write_text(f"#!/bin/sh\nexec {sys.executable} -P -c '{code}' \"$@\"\n")
    command.chmod(0o755)
    steps = yaml.safe_load((ROOT / ".github" / "workflows" / "entry.yml").read_text())["jobs"]["score"][
        "steps"
    ]
    env = os.environ | {
        "PATH": f"{command.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "GITHUB_BASE_REF": "main",
    }
    subprocess.run([*git, "add", "incoming"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "an entry"], check=True)
    scripts = [step["run"] for step in steps if "run" in step and step["name"] != "install"]
    for script in scripts:
        subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, env=env, check=True)
    assert len(scripts) == 3
    # A submission that writes a sealed entry itself.
    subprocess.run([*git, "add", "entries"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "a seal of my own"], check=True)
    assert subprocess.run(["bash", "-e", "-c", scripts[0]], cwd=tmp_path, env=env, check=False).returncode
    assert "us--mine.html" in (tmp_path / "site" / "phantom_mixture.html").read_text()
    # A run by itself: its settings can name code.
    card = tmp_path / "incoming" / "phantom_mixture" / "of a team" / "entry.yaml"
    card.rename(card.with_name("config.yaml"))
    shutil.rmtree(tmp_path / "entries")
    assert subprocess.run(["bash", "-e", "-c", scripts[1]], cwd=tmp_path, env=env, check=False).returncode
    assert not [*(tmp_path / "entries").iterdir()]


# --- hidden labels ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hidden(tmp_path_factory):
    """Return a track of made data, its true split, the folder with both halves, and pixels of the candidates."""
    from braindecode_vis.pipeline.preparing import preprocess

    top = tmp_path_factory.mktemp("hidden")
    fields = dict.fromkeys(("title", "training", "queries", "gallery", "target"), "any")
    chance = {"top1": 0.1, "top5": 0.5, "2_way": 0.5}
    known = {
        "name": "toy",
        "dataset": "synthetic_digits",
        "configuration": "synthetic_digits",
        "subjects": ("01",),
        "headline": "top1",
    }
    track = Track(**known, chance=chance, ids="data", **fields)
    with pytest.MonkeyPatch.context() as patch:
        for module in (tracks_module, hidden_module):
            patch.setattr(module, "read_track", lambda name: track)
        committed = hidden_module.hide_labels("toy", top / "test")
        run = tracks_module.open_track_run(track, top / "test", None)
        split = tracks_module.split_of_run(run, "toy")
    stimuli = preprocess(run).stimuli
    ids = [str(name) for name in stimuli.ids]
    pixels = np.stack(
        [np.asarray(stimuli.read_image(name), np.float32).mean(axis=-1).ravel() for name in ids]
    )
    return track, split, top / "test", committed, dict(zip(ids, pixels, strict=True))


def write_hidden_entry(folder, hidden, predictions, **card):
    _, split, _, _, pixels = hidden
    folder.mkdir(parents=True)
    (folder / "entry.yaml").write_text(yaml.safe_dump(CARD | card))
    (folder / "predictions").mkdir()
    for subject, rows in predictions.items():
        np.save(folder / "predictions" / f"{subject}.npy", rows.astype(np.float32))
    np.save(folder / "gallery.npy", np.stack([pixels[name] for name in split.gallery]))
    return folder


def test_the_public_half_shows_no_label(hidden, monkeypatch):
    track, split, top, committed, _ = hidden
    public, secret = top / "public", json.loads((top / "sealed" / "order.json").read_text())
    assert json.loads((public / "commitment.json").read_text())["commitment"] == committed
    assert hidden_module.commit(secret["queries"], secret["salt"]) == committed
    for subject, ids in secret["queries"].items():
        assert sorted(ids) == sorted(split.queries[subject])
        assert list(ids) != sorted(ids)
        assert len(np.load(public / "responses" / f"{subject}.npy")) == len(ids)
        assert not set((public / "training" / f"{subject}.txt").read_text().split()) & set(split.gallery)
    named = json.loads((public / "split.json").read_text())["queries"]
    assert all(name.startswith("q") for ids in named.values() for name in ids)
    monkeypatch.setattr(hidden_module, "read_track", lambda name: track)
    with pytest.raises(DataError, match="a second order would not fit"):
        hidden_module.hide_labels("toy", top)


def test_both_sides_play_and_a_cheater_gets_one_answer_a_day(hidden, tmp_path):
    """A team learns from the public half and is scored; a cheater asks twenty times on a day."""
    track, split, top, _, pixels = hidden
    sealed = tmp_path / "sealed"
    shutil.copytree(top / "sealed", sealed)
    predictions = {}
    for subject in split.queries:
        asked = np.load(top / "public" / "responses" / f"{subject}.npy")
        x = np.load(top / "public" / "training" / f"{subject}.npy").reshape(-1, asked[0].size)
        names = (top / "public" / "training" / f"{subject}.txt").read_text().splitlines()
        y = np.stack([pixels[name] for name in names])
        fit = np.linalg.solve(x @ x.T + 10 * np.eye(len(x)), y - y.mean(axis=0))
        predictions[subject] = asked.reshape(len(asked), -1) @ x.T @ fit + y.mean(axis=0)
    honest = write_hidden_entry(tmp_path / "honest", hidden, predictions, team="honest")
    entry = read_hidden_entry(honest, sealed, track, split)
    spend_day(sealed, "honest", "mine", "2026-12-01")
    found = score_entry(entry, n_bootstrap=50)
    chance = 1 / len(split.gallery)
    assert found.items["top1"].mean() > 3 * chance

    rng = np.random.default_rng(0)
    for number in range(20):
        guess = {
            who: np.stack([pixels[name] for name in rng.choice(split.gallery, len(ids))])
            + rng.normal(size=(len(ids), 1)) * 0.01
            + rng.normal(size=(len(ids), len(next(iter(pixels.values())))))
            for who, ids in split.queries.items()
        }
        folder = write_hidden_entry(
            tmp_path / f"try{number}", hidden, guess, team="Cheats", name=f"try{number}"
        )
        entry = read_hidden_entry(folder, sealed, track, split)
        if number:
            with pytest.raises(DataError, match="one score a day"):
                spend_day(sealed, entry.card.team, entry.card.name, "2026-12-01")
        else:
            spend_day(sealed, entry.card.team, entry.card.name, "2026-12-01")
    ledger = json.loads((sealed / "ledger.json").read_text())
    assert sum(row["scored"] for row in ledger) == 2
    assert len(ledger) == 21
    spend_day(sealed, "cheats", "later", "2026-12-02")


def test_pictures_and_mistakes_of_hidden_entries(hidden, tmp_path, monkeypatch, capsys):
    """Pictures beside the names of stimuli would be labels; a gallery that cannot be ranked costs no day."""
    from PIL import Image

    from braindecode_vis.parts.studies.judging import tracks

    track, split, top, _, pixels = hidden
    sealed = tmp_path / "sealed"
    shutil.copytree(top / "sealed", sealed)
    monkeypatch.setattr(tracks, "read_track", lambda name: track)
    rng = np.random.default_rng(3)
    width = len(next(iter(pixels.values())))
    guess = {who: rng.normal(size=(len(ids), width)) for who, ids in split.queries.items()}
    folder = write_hidden_entry(tmp_path / "entry", hidden, guess)
    for who, ids in split.queries.items():
        (folder / "images" / who).mkdir(parents=True)
        for name in hidden_module.name_queries(len(ids)):
            Image.new("RGB", (4, 4)).save(folder / "images" / who / f"{name}.png")
    words = ["submit", str(folder), "--track", "toy", "--sealed", str(sealed), "--out", str(tmp_path / "all")]
    words += ["--split", str(split.write(tmp_path / "split.json"))]
    gallery = np.load(folder / "gallery.npy")
    np.save(folder / "gallery.npy", 0 * gallery)
    assert call(words) == 2
    assert "norm 0" in capsys.readouterr().err
    assert json.loads((sealed / "ledger.json").read_text()) == []
    np.save(folder / "gallery.npy", gallery)
    assert call(words) == 0
    assert not (tmp_path / "all" / "toy" / "us--mine" / "images").exists()
    shutil.move(tmp_path / "all", tmp_path / "first")
    assert call(words) == 2
    assert "one score a day" in capsys.readouterr().err
    assert not (tmp_path / "all").exists()


def test_no_message_shows_a_label(hidden, tmp_path):
    """Targets as guesses, and NaN, are refused by the names of queries: a message must not be an oracle."""
    track, split, top, _, pixels = hidden
    secret = json.loads((top / "sealed" / "order.json").read_text())["queries"]
    right = {who: np.stack([pixels[name] for name in ids]) for who, ids in secret.items()}
    broken = {who: rows + 1.5 * np.arange(rows.size).reshape(rows.shape) for who, rows in right.items()}
    next(iter(broken.values()))[2, 3] = np.nan
    for number, rows in enumerate((right, broken)):
        folder = write_hidden_entry(tmp_path / str(number), hidden, rows)
        with pytest.raises(DataError) as error:
            read_hidden_entry(folder, top / "sealed", track, split)
        assert not any(name in str(error.value) for name in split.gallery)
        assert re.search(r"q0000\d", str(error.value))
    secret = tmp_path / "sealed"
    shutil.copytree(top / "sealed", secret)
    order = json.loads((secret / "order.json").read_text())
    first = next(iter(order["queries"].values()))
    first[0], first[1] = first[1], first[0]
    (secret / "order.json").write_text(json.dumps(order))
    with pytest.raises(DataError, match="does not fit its commitment"):
        read_hidden_entry(tmp_path / "0", secret, track, split)


# --- results of others --------------------------------------------------------------------------------------------


STATUS = ("author's figure", "figure of other authors", "second hand", "read in code", "rerun")


def test_published_rows_are_those_of_the_research_page():
    text = (ROOT / "docs" / "research" / "PUBLISHED.md").read_text()
    for name in list_tracks():
        for row in read_published(name):
            line = [line for line in text.splitlines() if row["method"] in line and row["top1"] in line]
            assert line, row
            assert any(row["top5"] in found for found in line), row
            assert row["column"].split()[0] in ("clean", "test-selected", "transductive")
            assert row["status"] in STATUS


@pytest.mark.shared
def test_public_predictions_are_an_entry(shared, tmp_path, capsys):
    """ATM-S, subject 8, as its authors released it: top-1 .360, top-5 .725; how its epoch was chosen is not stated."""
    import torch

    source = shared / "data" / "reality" / "atm_s_sub08"
    if not source.is_dir():
        pytest.skip("the published outputs in ../shared/data/reality are not here")
    folder = tmp_path / "atm"
    (folder / "predictions").mkdir(parents=True)
    made = torch.load(source / "ATM_S_eeg_features_sub-08_test.pt", weights_only=True)
    gallery = torch.load(source / "ViT-H-14_features_test.pt", weights_only=True)["img_features"]
    np.save(folder / "predictions" / "08.npy", made.numpy())
    np.save(folder / "gallery.npy", gallery.numpy())
    ids = (source / "image_ids.txt").read_text()
    (folder / "predictions" / "08.txt").write_text(ids)
    (folder / "gallery.txt").write_text(ids)
    chosen = {
        "on": "test",
        "epoch": "not stated by the authors, so counted as chosen on the test",
        "settings": "theirs",
    }
    card = CARD | {
        "name": "ATM-S",
        "team": "ATM-authors",
        "licence": "MIT",
        "chosen": chosen,
        "space": "OpenCLIP ViT-H-14",
    }
    (folder / "entry.yaml").write_text(yaml.safe_dump(card))
    assert (
        call(
            ["submit", str(folder), "--track", "things_eeg2_sub08", "--out", str(tmp_path / "all"), "--json"]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    rows = {row["metric"]: row for row in found["scores"] if row["method"] == "decoded"}
    assert (rows["top1"]["value"], rows["top5"]["value"], round(rows["2_way"]["value"], 4)) == (
        0.36,
        0.725,
        0.9703,
    )
    assert (found["column"], found["signs"]) == ("test-selected", [])


@pytest.mark.parametrize(
    "words, said",
    [
        (["tracks", "digits69", "--hide"], "--hide belongs to tracks make"),
        (["board"], "board needs run folders, or --entries"),
        (["board", "runs", "--entries", "entries"], "--entries takes no runs"),
        (["tracks", "nothing"], "but must be one of deeprecon, digits69"),
        (["tracks", "make"], "tracks takes"),
        (["run"], "run needs a configuration"),
        (["run", "digits69_ridge", "--track", "digits69"], "run needs a configuration"),
        (["run", "--track", "digits69", "--cluster", "debug"], "run needs a configuration"),
        (["score", "x.npy", "--gallery", "y.npy"], "belong to --track"),
        (["score", "x", "--track", "digits69", "--targets", "y.npy"], "score takes only the entry"),
        (["score", "x", "--track", "digits69", "--seed", "3"], "score takes only the entry"),
        (["submit", "a", "b", "--track", "digits69"], "are for run folders"),
        (["submit", "nothing", "--track", "digits69"], "is not a folder; give the folder or the ZIP"),
    ],
)
def test_verbs_say_what_they_need(words, said, capsys):
    assert call(words) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_errors_are_ours(split, tmp_path):
    with pytest.raises(BraindecodeVisError):
        read_entry(tmp_path / "none", read_track(split.track), split)
