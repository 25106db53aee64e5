"""What is on both sides of a fold is named: images, concepts, sessions, pictures, trials, and what may not."""

import numpy as np
import pytest

from braindecode_vis.base import store
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.datasets import trial_values
from braindecode_vis.datasets.drawn.images import render_batch
from braindecode_vis.datasets.trial_values import find_copied_trials
from braindecode_vis.pipeline.leaks import split_overlap
from braindecode_vis.pipeline.leaks.likeness import find_like_pictures
from braindecode_vis.pipeline.leaks.run_files import open_audited
from braindecode_vis.pipeline.leaks.split_overlap import (
    check_copies,
    check_identity,
    check_likeness,
    check_pixels,
    check_rows,
    check_sides,
    check_used,
    count_units,
    find_copies,
    measure_known_classes,
)
from braindecode_vis.preprocessing.splits import Fold
from tests.parts.audit.small_runs import read_name, write_artifact, write_bank, write_prepared, write_trained

N = 24
ROWS = np.arange(N)
FOLDS = [(ROWS[:16], ROWS[16:])]


@pytest.fixture
def open_small(tmp_path):
    """Return a function that writes trials and opens them."""

    def write_and_open(folds=FOLDS, *, data=None, **options):
        data = np.random.default_rng(0).normal(size=(N, 12)).astype(np.float32) if data is None else data
        write_prepared(tmp_path, data, folds, **options)
        return open_audited(tmp_path)

    return write_and_open


@pytest.fixture(scope="module")
def pictures():
    return render_batch(np.arange(N), np.zeros(N, int), size=64, seed=0)


def by_check(findings):
    return {item.check: item for item in findings}


# --- rows and sides ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folds", "words"),
    [
        (FOLDS, ""),
        ([(ROWS[:17], ROWS[16:])], "1 trial(s) are in both training and test, first row 16"),
        ([(ROWS[:16], np.r_[ROWS[16:], 20, 21])], "2 trial(s) are tested more than once"),
        ([(ROWS[:12], ROWS[16:]), (ROWS[:12], ROWS[14:19])], "3 trial(s) are tested more than once"),
        ([(ROWS[:0], ROWS[16:])], "one side of the fold is empty"),
    ],
)
def test_rows_that_are_tested_twice_or_trained_on_are_named(open_small, folds, words):
    found = check_rows(open_small(folds))
    assert [item.level for item in found] == ["leak" if words else "ok"]
    assert words in found[0].message


def test_an_image_on_both_sides_is_a_leak_though_no_split_declares_it(open_small):
    """What is decoded is the image; a concept, a session or a subject may be shared unless the split says not."""
    ids = [f"i{row % 16:02d}" for row in ROWS]
    found = by_check(check_sides(open_small(ids=ids, concepts=[f"c{row % 4}" for row in range(N)])))
    assert found["image"].level == "leak"
    assert (
        "8 image(s) are in both training and test, first i00, i01, i02, ...; the split"
        in found["image"].message
    )
    assert {found[side].level for side in ("concept", "session", "subject", "run")} == {"ok"}


def test_a_class_may_be_tested_by_its_pictures(open_small):
    """Whoever decodes classes is warned only where a picture of the class comes back."""
    labels = [f"c{row % 4}" for row in ROWS]
    fields = {"split": {"kind": "leave_one_run_out"}}
    found = by_check(check_sides(open_small(ids=labels, concepts=labels, fields=fields)))
    assert found["image"].level == "ok"
    assert "a category is decoded" in found["image"].message


def test_what_several_folds_share_is_counted(open_small):
    ids = [f"i{row % 16:02d}" for row in ROWS]
    folds = [(ROWS[8:], ROWS[:8]), (np.r_[ROWS[:8], ROWS[16:]], ROWS[8:16]), (ROWS[:16], ROWS[16:])]
    found = by_check(check_sides(open_small(folds, ids=ids)))
    assert "(and in 1 more fold(s))" in found["image"].message


@pytest.mark.parametrize(
    ("by", "protocol", "level"),
    [
        (["trial", "concept"], "own", "leak"),
        (["trial"], "Zero-shot over concepts", "leak"),
        (["trial"], "own", "ok"),
    ],
)
def test_concepts_are_shared_unless_the_split_or_its_name_says_not(open_small, by, protocol, level):
    run = open_small(concepts=[f"c{row % 4}" for row in ROWS], by=by, protocol=protocol)
    assert by_check(check_sides(run))["concept"].level == level


# --- the same picture -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "level"), [("published", "leak"), ("leave_one_run_out", "warning")])
def test_one_picture_under_two_ids_is_a_leak_for_images_and_a_warning_for_classes(
    open_small, pictures, kind, level
):
    pixels = pictures.copy()
    pixels[20] = pixels[3]
    options = {
        "pixels": pixels,
        "concepts": [f"c{row % 4}" for row in ROWS],
        "fields": {"split": {"kind": kind}},
    }
    found = check_pixels(open_small(**options))[0]
    assert (found.level, found.where) == (level, "fold 0")
    assert "1 picture(s) have the same pixels in training and test, first i003, i020" in found.message


def test_two_pictures_are_enough_to_be_one(open_small, pictures):
    """A run of one training and one test picture, which is the same but for a grey level."""
    first = np.clip(pictures[0], 0, 254)
    pair = np.stack([first, first + 1])
    run = open_small([([0], [1])], data=np.eye(2, 4), pixels=pair)
    (found,) = check_likeness(run)
    assert (found.level, "first i000 and i001" in found.message) == ("leak", True)


def test_changed_copies_are_found_where_every_test_picture_is_one(pictures):
    """How near different pictures usually are is learnt from training pictures, among which there are no copies."""
    noisy = pictures.astype(int) + np.random.default_rng(0).integers(-6, 7, pictures.shape)
    stack = np.concatenate([pictures, np.clip(noisy, 0, 255).astype(np.uint8)])
    names = [f"p{row:02d}" for row in range(2 * N)]
    pairs = find_like_pictures(StimulusSet.from_pixels(stack, names), names, set(names[N:])).pairs
    assert {(first, second) for first, second, _ in pairs} == set(zip(names[:N], names[N:], strict=True))


def test_three_pictures_do_not_tell_how_near_pictures_usually_are(pictures):
    """Frames of a film are near each other, and no copies, where all but one of them are tested."""
    share = 0.06 * np.arange(18)[:, None, None, None]
    film = ((1 - share) * pictures[0] + share * pictures[1]).round().astype(np.uint8)
    stack = np.concatenate([pictures[2:4], film])
    names = [f"p{row:02d}" for row in range(len(stack))]
    assert find_like_pictures(StimulusSet.from_pixels(stack, names), names, set(names[3:])).pairs == []


# --- the same trial ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([], ""),
        ([(3, 20)], "first rows 3 (i003) and 20 (i020)"),
        ([(3, 7)], ""),  # both are trained on
        ([(18, 20)], ""),
        ([(3, 20), (3, 21), (4, 22)], "3 trial(s) have a copy on the other side"),
    ],
)
def test_a_trial_in_two_rows_is_a_leak_where_the_rows_are_on_both_sides(open_small, pairs, words):
    data = np.random.default_rng(0).normal(size=(N, 12)).astype(np.float32)
    for first, second in pairs:
        data[second] = data[first]
    (found,) = check_copies(open_small(data=data))
    assert found.level == ("leak" if words else "ok")
    assert words.replace("3 trial(s)", "2 trial(s)") in found.message  # rows 3, 20 and 21 are one trial


def test_few_trials_of_a_file_are_mapped_at_a_time(tmp_path, monkeypatch):
    """The check of 30 000 trials of NSD mapped 1.5 GB, which counted as memory of the run."""
    np.save(tmp_path / "data.npy", np.random.default_rng(0).standard_normal((90, 40), dtype=np.float32))
    held = np.load(tmp_path / "data.npy", mmap_mode="r")
    for module, find, n_blocks in ((split_overlap, find_copies, 0), (trial_values, find_copied_trials, 1)):
        released = []
        monkeypatch.setattr(module, "ROWS_OF_A_MAP", 50)
        monkeypatch.setattr(module, "release_pages", lambda array, seen=released: seen.append(array is held))
        find(held)
        assert all(released)
        assert len(released) >= 2 + n_blocks


def test_copies_are_found_as_by_comparing_all_pairs():
    generator = np.random.default_rng(0)
    data = generator.integers(0, 2, (40, 2, 70)).astype(np.float32)
    data[:, :, 3:] = 0  # alike where a few values are compared first
    data[5], data[6] = 0, 0
    codes = find_copies(data)
    for i in range(40):
        for j in range(i):
            same = np.array_equal(data[i], data[j]) and data[i].min() < data[i].max()
            assert (codes[i] == codes[j]) == same


def test_a_copy_with_noise_of_a_copy_is_one_trial(open_small):
    data = np.random.default_rng(0).normal(size=(N, 300)).astype(np.float32)
    data[9] = 1.5 * data[4] + 1e-5
    data[19] = data[9] + 1e-6 * np.random.default_rng(1).normal(size=300)
    (found,) = check_copies(open_small(data=data))
    assert "1 trial(s) have a copy on the other side" in found.message


def test_a_person_under_two_ids_has_copies_on_both_sides(open_small):
    """Whole subjects are left out, but the second is the first at another gain, with a little noise."""
    one = np.random.default_rng(0).normal(size=(N // 2, 300))
    other = 1.01 * one + 1e-3 * np.random.default_rng(1).normal(size=one.shape)
    names = np.repeat(["1", "2"], N // 2)
    folds = [(ROWS[names == "1"], ROWS[names == "2"]), (ROWS[names == "2"], ROWS[names == "1"])]
    found = check_copies(open_small(folds, data=np.concatenate([one, other]), columns={"subject": names}))
    assert [(item.level, item.where) for item in found] == [("leak", "fold 0"), ("leak", "fold 1")]
    assert "12 trial(s) have a copy" in found[0].message


# --- as used ----------------------------------------------------------------------------------------------


def test_averages_are_counted_once_for_each_image_of_a_subject(open_small):
    run = open_small(ids=[f"i{row // 2:02d}" for row in ROWS], columns={"subject": ["1", "2", "1", "1"] * 6})
    rows = np.arange(8)
    assert len(count_units(run.trials, rows, "single")) == 8
    assert len(count_units(run.trials, rows, "averaged")) == 6  # images 0 and 2 were seen by two subjects


@pytest.mark.parametrize(
    ("n_trials", "predicted", "asked", "words"),
    [
        (16, range(16), range(16, 24), ""),
        (None, range(16), range(16, 24), ""),
        (17, range(16), range(16, 24), "learnt from 17 trials, but the fold has 16"),
        (
            16,
            range(18),
            range(16, 24),
            "2 image(s) outside the training set were used in training predictions",
        ),
        (
            16,
            range(16),
            range(15, 24),
            "1 image(s) are either only queries or only in the test set, first i015",
        ),
    ],
)
def test_trials_that_later_stages_used_are_those_of_the_fold(tmp_path, n_trials, predicted, asked, words):
    names = np.array([f"i{row:03d}" for row in ROWS])
    data = np.random.default_rng(0).normal(size=(N, 4)).astype(np.float32)
    prepared = write_prepared(tmp_path, data, FOLDS)
    bank = write_bank(tmp_path, prepared, names, np.eye(N, dtype=np.float32))

    def write_predictions(path):
        store.write_json(path / "ids.json", {"ids": names[list(predicted)].tolist()})

    def write_ranks(path):
        (path / "fold00").mkdir()
        content = {"query_ids": names[list(asked)].tolist(), "gallery_ids": names.tolist()}
        store.write_json(path / "fold00" / "retrieval.json", content)

    trained = write_trained(tmp_path, prepared, bank, n_trials=n_trials)
    made_of = {"train": read_name(trained)}
    write_artifact(tmp_path, "out_of_fold", upstream=made_of, unit="fold00", write=write_predictions)
    upstream = {"train": read_name(trained), "preprocess": read_name(prepared)}
    retrieved = write_artifact(tmp_path, "retrieve", upstream=upstream, write=write_ranks)
    write_artifact(tmp_path, "evaluate", upstream={"retrieve": read_name(retrieved)})
    found = check_used(open_audited(tmp_path))
    assert [item.level for item in found] == ["leak" if words else "ok"]
    assert words in found[0].message


# --- classes that a person gives away ---------------------------------------------------------------------

WITHIN = [(ROWS[ROWS % 4 != 0], ROWS[ROWS % 4 == 0])]
WHO = np.repeat(np.arange(6), 4)


@pytest.mark.parametrize(
    ("labels", "columns", "folds", "level", "words"),
    [
        (
            WHO % 2,
            {"subject": WHO},
            WITHIN,
            "leak",
            "6 subject(s) in both training and test show one class each, first 0 (c0)",
        ),
        (WHO % 2, {"subject": WHO}, [(ROWS[:16], ROWS[16:])], "ok", "no subject or group"),
        (WHO % 2, {"group": WHO}, WITHIN, "leak", "leave whole groups out (split.kind=leave_one_group_out)"),
        (ROWS // 2 % 2, {"subject": WHO}, WITHIN, "ok", ""),  # both classes in everybody
        (WHO % 2, {}, WITHIN, "ok", ""),  # one subject
        (WHO * 0, {"subject": WHO}, WITHIN, "ok", ""),  # one class
        # Patients and controls as groups are the classes, and not who was recorded.
        (WHO % 2, {"subject": WHO, "group": WHO % 2}, [(ROWS[:16], ROWS[16:])], "ok", ""),
    ],
)
def test_a_class_that_a_person_gives_away_is_a_leak(open_small, labels, columns, folds, level, words):
    """Trials of a person on both sides: recognising the person was called decoding, .890 against .671 on new people."""
    named = [f"c{label}" for label in labels]
    columns = {name: [str(value) for value in values] for name, values in columns.items()}
    run = open_small(
        folds, ids=named, concepts=named, columns=columns, fields={"split": {"kind": "leave_one_run_out"}}
    )
    (found,) = check_identity(run)
    assert found.level == level
    assert words in found.message


def test_small_groups_of_one_class_are_no_leak_by_chance(open_small):
    """Half of all pairs show one of two classes by chance; if all do, it is no chance."""
    rng = np.random.default_rng(0)
    groups = np.arange(N) // 2
    every_other = [(ROWS[::2], ROWS[1::2])]
    labels = rng.permutation(ROWS % 2).astype(str)
    assert 0.3 < np.mean([len(set(labels[groups == g])) == 1 for g in range(12)]) < 0.7
    fold = Fold(*every_other[0])
    assert measure_known_classes(groups.astype(str), labels, [fold])[0] < 0.1
    assert measure_known_classes(groups.astype(str), (groups % 2).astype(str), [fold])[0] == 1


def test_many_folds_of_few_trials_tell_as_much_as_one():
    """Two of eight people show one class; each of forty folds tests two trials, which alone say nothing."""
    n = 80
    who = np.arange(n) % 8
    labels = np.where(who < 2, 0, np.arange(n) // 8 % 2).astype(str)
    parts = np.random.default_rng(0).permutation(n).reshape(40, 2)
    folds = [Fold(np.setdiff1d(np.arange(n), part), part) for part in parts]
    share, names = measure_known_classes(who.astype(str), labels, folds)
    assert names == ["0", "1"]
    by_chance = n * (0.625**10 + 0.375**10)
    assert share == pytest.approx((20 - by_chance) / (n - by_chance), rel=1e-9)
    everybody = measure_known_classes(who.astype(str), (who % 2).astype(str), folds)
    assert everybody == (1.0, [str(number) for number in range(8)])


def test_one_person_of_one_class_among_others_is_a_share(tmp_path):
    """One of six shows one class, five show both: a sixth of the trials is known."""
    who = np.repeat(np.arange(6), 20)
    labels = np.where(who == 0, 0, np.arange(120) % 2)
    # Fifths by turns, so that both classes are tested in everybody.
    folds = [(np.flatnonzero(np.arange(120) % 5), np.flatnonzero(np.arange(120) % 5 == 0))]
    share, names = measure_known_classes(who.astype(str), labels.astype(str), [Fold(*folds[0])])
    assert share == pytest.approx(1 / 6, abs=0.001)
    assert names == ["0"]
    named = [f"c{label}" for label in labels]
    data = np.random.default_rng(0).normal(size=(120, 5)).astype(np.float32)
    fields = {"split": {"kind": "leave_one_run_out"}}
    columns = {"subject": who.astype(str)}
    write_prepared(tmp_path, data, folds, ids=named, concepts=named, columns=columns, fields=fields)
    (found,) = check_identity(open_audited(tmp_path))
    assert found.level == "warning"
    assert "1 subject(s) in both training and test" in found.message
    assert "or remove those with only one class" in found.message


@pytest.mark.parametrize(
    ("runs", "by", "level"),
    [
        (np.repeat([0, 1], 12), ["group"], "warning"),
        (np.zeros(N, int), ["group"], "ok"),  # nobody named runs
        (np.repeat([0, 1], 12), ["image"], "ok"),  # nothing is claimed of groups
    ],
)
def test_groups_that_cut_a_run_are_a_warning(open_small, runs, by, level):
    groups = np.where(ROWS % 12 < 6, "a", "b")
    folds = [(ROWS[groups == "a"], ROWS[groups == "b"])]
    columns = {"run": runs.astype(str), "group": groups, "session": runs.astype(str)}
    found = by_check(check_sides(open_small(folds, by=by, columns=columns)))
    assert found["run"].level == found["session"].level == level
    if level == "warning":
        assert (
            "groups divide it, so the drift of one run is in both training and test" in found["run"].message
        )
