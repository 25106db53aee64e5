"""Arrays, tables and pictures of a user: what is understood, filled in, and refused with one sentence."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from braindecode_vis.base.checks import DataError
from braindecode_vis.base.store import read_responses, read_stimuli, write_responses, write_stimuli
from braindecode_vis.datasets.array_folder import (
    ArraysConfig,
    find_input_files,
    mask_volumes,
    read_array_folder,
    unpack_epochs,
)
from braindecode_vis.datasets.own_data import as_uint8_rgb, assemble_data, choose_split, complete_trials
from braindecode_vis.datasets.trial_values import find_copied_trials

N_TRIALS, N_FEATURES, N_PICTURES = 12, 30, 4


def make_signals(seed=0, shape=(N_TRIALS, N_FEATURES)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def make_pictures(seed=0, n=N_PICTURES):
    return np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)


def make_named(pictures=None):
    """Return pictures by the ids that `make_table` shows."""
    return {str(n): picture for n, picture in enumerate(make_pictures() if pictures is None else pictures)}


def make_table(**columns):
    return pd.DataFrame({"stimulus_id": [str(n % N_PICTURES) for n in range(N_TRIALS)], **columns})


def write_folder(folder, *, table=None, pictures=None, data=None, meta=None):
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "data.npy", make_signals() if data is None else data)
    (make_table() if table is None else table).to_csv(folder / "trials.csv", index=False)
    if pictures is not None:
        np.save(folder / "images.npy", pictures)
        meta = "first_id: 0\n" + (meta or "")
    if meta is not None:
        (folder / "meta.yaml").write_text(meta)
    return folder


def test_what_is_missing_is_filled_in_and_said():
    data = assemble_data(make_signals(), make_table(), make_named())
    trials = data.responses.trials
    assert set(trials["subject"]) == set(trials["run"]) == {"01"}
    assert trials["repetition"].tolist() == [n // N_PICTURES for n in range(N_TRIALS)]
    assert any("set to 01" in note for note in data.notes)
    assert data.responses.dims == ("trial", "feature")
    assert data.responses.coords["warnings"] == list(data.notes)


@pytest.mark.parametrize("name", ["trials.csv", "meta.yaml", "mask.nii.gz"])
@pytest.mark.parametrize("damage", ["link", "loop", "folder"])
def test_what_is_no_file_in_the_place_of_an_optional_one_is_told(tmp_path, name, damage):
    """A broken link passed for a table that was never there, and predictions were scored without it."""
    path = write_folder(tmp_path, pictures=make_pictures()) / name
    path.unlink(missing_ok=True)
    if damage == "folder":
        path.mkdir()
    else:
        path.symlink_to(name if damage == "loop" else "nowhere")
    with pytest.raises(DataError, match=rf"the optional {name} (was not fetched|should be a file)"):
        find_input_files(tmp_path)
    if name != "mask.nii.gz":  # of volumes alone
        with pytest.raises(DataError, match=f"the optional {name}"):
            read_array_folder(tmp_path)


def test_the_data_are_not_copied():
    X = make_signals()
    assert np.shares_memory(assemble_data(X, make_table(), make_named()).responses.data, X)


@pytest.mark.parametrize("ids", [[0, 1, 2, 3], ["0", "1", "2", "3"], [0.0, 1.0, 2.0, 3.0]])
def test_integer_text_and_float_ids_name_the_same_pictures(ids):
    table = pd.DataFrame({"stimulus_id": [ids[n % N_PICTURES] for n in range(N_TRIALS)]})
    data = assemble_data(make_signals(), table, make_named())
    assert data.responses.stimulus_ids.tolist() == [str(n % N_PICTURES) for n in range(N_TRIALS)]


def test_one_picture_under_two_ids_becomes_one_and_is_named(tmp_path):
    """The commonest mistake with arrays: one picture under several ids gave a pixel correlation of 0.963 for 0.85."""
    pictures = make_pictures()
    pictures[3] = pictures[1]
    named = make_named(pictures)
    data = assemble_data(make_signals(), make_table(), named)
    assert len(data.stimuli) == 3
    assert "3" not in set(data.responses.stimulus_ids)
    assert any("'3' is '1'" in note for note in data.notes)
    with pytest.raises(DataError, match="'3' is '1'"):
        assemble_data(make_signals(), make_table(), named, merge_same_pictures=False)
    folder = write_folder(tmp_path, pictures=pictures)
    assert len(ArraysConfig(root=folder).read().stimuli) == 3
    with pytest.raises(DataError, match="'3' is '1'"):
        ArraysConfig(root=folder, same_pictures="refuse").read()


def number(first, n, *, step=1):
    return pd.DataFrame({"stimulus_id": [first + step * (trial % n) for trial in range(N_TRIALS)]})


@pytest.mark.parametrize(
    "table, asked",
    [
        (number(1, 3), r"3 numbers from 1 to 3, and the 4 .*images=\{1: .*dict\(enumerate\(pictures, 1\)\)"),
        (number(1, 4), r"4 numbers from 1 to 4"),
        (number(7, 1), r"the trials show the number 7 alone, and the 4 pictures"),
        (number(0, 3), r"3 numbers from 0 to 2"),
        (
            number(0, 4),
            r"4 numbers from 0 to 3",
        ),  # codes that happen to begin at 0; nobody said that they are places
        (number(10, 4, step=10), r"from 10 to 40, .* mapping: images=\{10: pictures\[0\], \.\.\.\}\.$"),
        (number(2, 2), r"dict\(enumerate\(pictures, 1\)\) if the first picture has the number 1\.$"),
        (pd.DataFrame({"stimulus_id": ["a", "b"] * 6}), r"'a', 'b', .*images=\{'a': pictures\[0\]"),
    ],
)
def test_codes_are_no_places_in_an_array_of_pictures(table, asked):
    """Of codes 1 to 59 with 60 pictures, code 1 showed the second picture, without a word."""
    with pytest.raises(DataError, match=asked):
        assemble_data(make_signals(), table, make_pictures())


def test_numbers_may_be_places_where_every_trial_shows_the_next_picture():
    data = assemble_data(make_signals(), number(0, N_TRIALS), make_pictures(n=N_TRIALS))
    assert data.stimuli.ids.tolist() == [str(n) for n in range(N_TRIALS)]
    with pytest.raises(DataError, match="12 numbers from 0 to 11"):
        assemble_data(make_signals(), number(0, N_TRIALS)[::-1], make_pictures(n=N_TRIALS))


def test_one_file_per_trial_goes_by_the_order_of_their_names(tmp_path):
    for n, picture in enumerate(make_pictures(n=N_TRIALS)):
        Image.fromarray(picture).save(tmp_path / f"p{n:02d}.png")
    data = assemble_data(make_signals(), pd.DataFrame({"run": ["01"] * N_TRIALS}), tmp_path)
    assert data.responses.stimulus_ids.tolist() == [f"p{n:02d}" for n in range(N_TRIALS)]
    assert any("by the order of their names" in note for note in data.notes)


def test_files_are_not_counted_to_find_what_a_code_means(tmp_path):
    for n, picture in enumerate(make_pictures()):
        Image.fromarray(picture).save(tmp_path / f"p{n}.png")
    with pytest.raises(
        DataError, match=r"shows '1', .*what each number means: images=\{1: 'a\.png', \.\.\.\}"
    ):
        assemble_data(make_signals(), number(1, 3), tmp_path)
    mapped = {code: tmp_path / f"p{code - 1}.png" for code in range(1, 4)}
    assert assemble_data(make_signals(), number(1, 3), mapped).stimuli.ids.tolist() == ["1", "2", "3"]


def test_a_folder_says_from_which_number_its_array_of_pictures_counts(tmp_path):
    folder = write_folder(tmp_path, table=number(1, 3), pictures=make_pictures())
    for meta, said in (
        ("", r"first_id: 1.*images/ that are named by these numbers"),
        ("first_id: 0.5", "first_id must be a whole number"),
    ):
        (folder / "meta.yaml").write_text(meta)
        with pytest.raises(DataError, match=said):
            read_array_folder(folder)
    for first in (0, 1):
        (folder / "meta.yaml").write_text(f"first_id: {first}")
        data = read_array_folder(folder)
        shown = data.stimuli.select(["1"])
        np.testing.assert_array_equal(next(iter(shown.iterate_images())), make_pictures()[1 - first])
    assert "first_id" not in data.about


def test_the_same_picture_as_png_and_bmp_is_one(tmp_path):
    pictures = make_pictures()
    for n, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{n}.png")
    Image.fromarray(pictures[0]).save(tmp_path / "again.bmp")
    table = make_table()
    table.loc[0, "stimulus_id"] = "again"
    data = assemble_data(make_signals(), table, tmp_path)
    assert len(data.stimuli) == N_PICTURES
    assert data.responses.stimulus_ids[0] == data.responses.stimulus_ids[4]


def test_files_may_be_named_with_or_without_suffix_and_folder(tmp_path):
    for n, picture in enumerate(make_pictures()):
        (tmp_path / f"kind{n % 2}").mkdir(exist_ok=True)
        Image.fromarray(picture).save(tmp_path / f"kind{n % 2}" / f"p{n}.png")
    shown = [f"p{n % 4}.png" if n % 2 else f"p{n % 4}" for n in range(N_TRIALS)]
    data = assemble_data(make_signals(), pd.DataFrame({"stimulus_id": shown}), tmp_path)
    assert sorted(data.stimuli.ids) == ["p0", "p1", "p2", "p3"]
    assert sorted(set(data.stimuli.table["concept"])) == ["kind0", "kind1"]


def test_one_picture_per_trial_needs_no_ids():
    data = assemble_data(
        make_signals(), pd.DataFrame(index=range(N_TRIALS)).assign(concept="x"), make_pictures(n=N_TRIALS)
    )
    assert data.responses.stimulus_ids.tolist() == [str(n) for n in range(N_TRIALS)]


def test_classes_alone_are_stimuli_without_pictures():
    table = pd.DataFrame({"concept": ["face", "house"] * 6})
    data = assemble_data(make_signals(), table, None)
    assert not data.knows_images
    assert data.stimuli.ids.tolist() == ["face", "house"]


def test_copies_of_trials_are_found():
    X = make_signals()
    X[7] = X[2]
    X[9] = 3 * X[4] + 1e-4 * make_signals(1)[4]
    assert find_copied_trials(X) == [(2, 7), (4, 9)]
    notes = assemble_data(X, make_table(), make_named()).notes
    assert any("2 pair(s) of trials are copies" in note for note in notes)
    assert find_copied_trials(make_signals()) == []


def test_what_all_volumes_share_makes_no_copies():
    """Raw volumes of one brain correlate above .999 with each other; they are no copies, but a rescaled one is."""
    rng = np.random.default_rng(0)
    X = (1000 + 300 * rng.normal(size=(1, 400)) + rng.normal(size=(60, 400))).astype(np.float32)
    X += np.linspace(0, 20, 60, dtype=np.float32)[:, None] * rng.normal(size=400).astype(
        np.float32
    )  # a drift
    assert np.corrcoef(X[:2])[0, 1] > 0.999
    assert find_copied_trials(X) == []
    X[50] = 2 * X[10]
    assert find_copied_trials(X) == [(10, 50)]


def test_trials_that_one_bad_electrode_dominates_are_no_copies():
    """Two trials in which one electrode drifts away look alike in all of their variance, and nowhere else."""
    X = np.random.default_rng(0).normal(size=(60, 16, 50)).astype(np.float32)
    X[[7, 30], 5] += np.linspace(0, 5000, 50, dtype=np.float32)
    assert np.corrcoef(X[[7, 30]].reshape(2, -1))[0, 1] > 0.999
    assert find_copied_trials(X) == []


def test_few_independent_values_are_compared_by_equality_alone():
    """Smooth trials correlate by chance: three sines make every trial."""
    rng = np.random.default_rng(0)
    waves = np.sin(np.arange(100)[None] * np.array([[0.1], [0.2], [0.3]]))
    X = (rng.normal(size=(400, 3)) @ waves).astype(np.float32)
    assert find_copied_trials(X) == []
    X[3] = X[1]
    assert find_copied_trials(X) == [(1, 3)]


@pytest.mark.parametrize(
    "picture",
    [np.zeros((4, 4)), np.zeros((4, 4, 1)), np.zeros((4, 4, 3)), np.zeros((4, 4, 4)), np.zeros((4, 4), bool)],
)
def test_grey_float_and_transparent_pictures_become_rgb(picture):
    assert as_uint8_rgb(picture).shape == (4, 4, 3)
    assert as_uint8_rgb(picture).dtype == np.uint8


REFUSED = {
    "lists of different lengths": ({"X": [[1.0, 2.0], [1.0]]}, "different lengths"),
    "text": ({"X": np.array([["a"]] * N_TRIALS)}, "must be numbers"),
    "one axis": ({"X": np.zeros(N_TRIALS)}, "expected .n_trials, n_features"),
    "nan": ({"X": np.where(np.arange(N_FEATURES) == 3, np.nan, make_signals())}, "non-finite"),
    "lengths": ({"X": make_signals()[:-1]}, "11 trials, but their table has 12 rows"),
    "channels and times swapped": (
        {"X": make_signals(shape=(N_TRIALS, 5, 3)), "ch_names": ["a", "b", "c"]}, "axes look swapped"
    ),
    "times": ({"X": make_signals(shape=(N_TRIALS, 3, 5)), "times": [0, 1, 2]}, "times lists 3 entries"),
    "descending times": ({"X": make_signals(shape=(N_TRIALS, 3, 2)), "times": [1.0, 0.0]}, "must ascend"),
    "constant": ({"X": np.ones((N_TRIALS, N_FEATURES))}, "all 12 trials are the same .every value is 1."),
    "one trial again and again": ({"X": np.tile(make_signals()[:1], (N_TRIALS, 1))}, "no value differs between them"),
    "too small": ({"X": make_signals() * 1e-20}, r"multiply X by a constant \(for example 1e"),
    "too large": ({"X": make_signals().astype(float) * 1e300}, "divide X by a constant"),
    "channel twice": (
        {"X": make_signals(shape=(N_TRIALS, 3, 5)), "ch_names": ["a", "b", "a"]}, "'a' more than once"
    ),
    "milliseconds": (
        {"X": make_signals(shape=(N_TRIALS, 3, 5)), "times": [-200, 0, 200, 400, 600]}, "pass times / 1000"
    ),
    "holes in times": ({"X": make_signals(shape=(N_TRIALS, 3, 2)), "times": [0, np.nan]}, "times holds NaN"),
    "text as times": ({"X": make_signals(shape=(N_TRIALS, 3, 2)), "times": ["a", "b"]}, "numbers of seconds"),
    "a column of text": (
        {"X": pd.DataFrame(make_signals()).assign(who="me")}, "the column 'who' of X holds 'me'; drop it"
    ),
    "unknown picture": ({"trials": make_table(stimulus_id=["0"] * 11 + ["owl"])}, "trial 11 shows 'owl'"),
    "missing id": ({"trials": make_table(stimulus_id=["0"] * 11 + [None])}, "no stimulus_id in row 11"),
    "columns": ({"trials": make_table().rename(columns={"stimulus_id": "stimulus"})}, "did you mean 'stimulus_id'"),
    "twice": ({"trials": pd.concat([make_table(), make_table()], axis=1)}, "more than once"),
    "classes": ({"trials": make_table(concept=["a"] * 11 + ["b"])}, "two classes"),
    "floats": ({"pictures": make_pictures().astype(float)}, "must be between 0 and 1"),
    "channels first": ({"pictures": np.zeros((4, 3, 8, 8), np.uint8)}, "move the channels to the end"),
    "labels as pictures": ({"pictures": ["owl", "cup", "key", "hat"]}, "pass names of classes as labels=..."),
    "split": ({"trials": make_table(split=["train"] * 11 + ["dev"])}, "train or test, not 'dev'"),
    "no class": ({"pictures": None}, "no pictures and no classes"),
    "not one per trial": ({"trials": pd.DataFrame({"concept": ["a"] * N_TRIALS})}, "which picture each trial showed"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_one_sentence(name):
    changed, message = REFUSED[name]
    arguments = {"X": make_signals(), "trials": make_table(), "pictures": make_named(), **changed}
    with pytest.raises(DataError, match=message) as caught:
        assemble_data(arguments.pop("X"), arguments.pop("trials"), arguments.pop("pictures"), **arguments)
    assert "\n" not in str(caught.value)


def test_a_folder_is_read_like_the_arrays_in_it(tmp_path):
    folder = write_folder(
        tmp_path, pictures=make_pictures(), meta="title: Mine\nunit: percent\nmodality: fmri\n"
    )
    data = read_array_folder(folder)
    same = assemble_data(make_signals(), make_table(), make_named())
    np.testing.assert_array_equal(data.responses.data, same.responses.data)
    assert data.stimuli.table["sha256"].tolist() == same.stimuli.table["sha256"].tolist()
    assert (data.about["title"], data.responses.unit, data.responses.dims) == (
        "Mine",
        "percent",
        ("trial", "voxel"),
    )


def test_what_the_store_wrote_is_taken_as_it_is(tmp_path):
    first = assemble_data(make_signals(), make_table(), make_named())
    write_responses(tmp_path / "responses", first.responses)
    write_stimuli(tmp_path / "stimuli", first.stimuli)
    again = read_array_folder(tmp_path)
    pd.testing.assert_frame_equal(again.responses.trials, first.responses.trials)
    assert "responses" not in find_input_files(tmp_path)
    assert "data.npy" in find_input_files(tmp_path)
    ArraysConfig(root=tmp_path).write(tmp_path / "out", seed=0)
    assert read_responses(tmp_path / "out" / "responses").n_trials == N_TRIALS
    assert len(read_stimuli(tmp_path / "out" / "stimuli")) == N_PICTURES


def test_a_changed_byte_of_any_input_changes_the_digest(tmp_path):
    folder = write_folder(tmp_path, pictures=make_pictures(), meta="title: Mine\n")
    before = ArraysConfig(root=folder).hash_inputs()
    assert set(before) == {"data.npy", "trials.csv", "images.npy", "meta.yaml"}
    np.save(folder / "images.npy", make_pictures(1))
    after = ArraysConfig(root=folder).hash_inputs()
    assert [name for name in before if before[name] != after[name]] == ["images.npy"]


def test_ids_of_a_table_stay_text(tmp_path):
    pictures = {f"{n:03d}": picture for n, picture in enumerate(make_pictures())}
    (tmp_path / "images").mkdir()
    for name, picture in pictures.items():
        Image.fromarray(picture).save(tmp_path / "images" / f"{name}.png")
    table = pd.DataFrame({"stimulus_id": [f"{n % 4:03d}" for n in range(N_TRIALS)]})
    data = read_array_folder(write_folder(tmp_path, table=table))
    assert sorted(data.stimuli.ids) == ["000", "001", "002", "003"]


def test_epochs_with_event_names_or_metadata(tmp_path):
    import mne

    rng = np.random.default_rng(0)
    info = mne.create_info(["Oz", "POz", "EOG"], 100.0, ["eeg", "eeg", "eog"])
    events = np.c_[np.arange(N_TRIALS) * 10, np.zeros(N_TRIALS, int), np.tile([1, 2], 6)]
    epochs = mne.EpochsArray(
        rng.normal(size=(N_TRIALS, 3, 20)) * 1e-6,
        info,
        events,
        tmin=-0.1,
        event_id={"face": 1, "house": 2},
        verbose="error",
    )
    data, given = unpack_epochs(epochs)
    assert data.shape == (N_TRIALS, 2, 20)
    assert given["ch_names"] == ["Oz", "POz"]
    assert given["trials"]["concept"].tolist() == ["face", "house"] * 6
    epochs.save(tmp_path / "mine-epo.fif", verbose="error")
    read = read_array_folder(tmp_path)
    assert read.responses.dims == ("trial", "channel", "time")
    assert read.responses.unit == "volt"
    epochs.metadata = pd.DataFrame({"picture": [str(n % 4) for n in range(N_TRIALS)]})
    _, given = unpack_epochs(epochs, column="picture")
    assert given["trials"]["stimulus_id"].tolist()[:4] == ["0", "1", "2", "3"]
    with pytest.raises(DataError, match="must be one of the metadata"):
        unpack_epochs(epochs, column="image")


def test_volumes_are_read_through_their_mask(tmp_path):
    import nibabel as nib

    rng, affine = np.random.default_rng(0), np.diag([3.0, 3.0, 3.0, 1.0])
    volumes, mask = rng.normal(size=(4, 5, 6, N_TRIALS)).astype(np.float32), rng.random((4, 5, 6)) < 0.5
    nib.save(nib.Nifti1Image(volumes, affine), tmp_path / "data.nii.gz")
    make_table(concept=[str(n % 4) for n in range(N_TRIALS)]).to_csv(
        tmp_path / "trials.tsv", sep="\t", index=False
    )
    with pytest.raises(DataError, match=r"needs a mask .* mask.nii.gz"):
        read_array_folder(tmp_path)
    nib.save(nib.Nifti1Image(mask.astype(np.uint8), affine), tmp_path / "mask.nii.gz")
    data = read_array_folder(tmp_path).responses
    np.testing.assert_allclose(data.data, volumes[mask].T)
    np.testing.assert_array_equal(data.coords["mask"], mask)
    nib.save(nib.Nifti1Image(mask.astype(np.uint8), np.eye(4)), tmp_path / "mask.nii.gz")
    with pytest.raises(DataError, match="another grid"):
        read_array_folder(tmp_path)
    nib.save(nib.Nifti1Image(np.zeros_like(mask, np.uint8), affine), tmp_path / "mask.nii.gz")
    with pytest.raises(DataError, match=r"the mask .*mask\.nii\.gz is empty: no voxel is above 0"):
        read_array_folder(tmp_path)
    with pytest.raises(DataError, match=r"is on a surface \(GiftiImage\).*from_arrays\(X, modality"):
        mask_volumes(nib.gifti.GiftiImage(), nib.load(tmp_path / "mask.nii.gz"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "data.npy").write_bytes(b"no array"),
            "cannot be read as a NumPy array .it is damaged",
        ),
        (lambda f: np.save(f / "data.npy", np.array([{}])), "holds objects.; write it with numpy.save"),
        (lambda f: (f / "data.npy").write_bytes(b""), "it is empty"),
        (lambda f: np.save(f / "data.npy", np.float32(1)), "the trials are one number"),
        (lambda f: (f / "trials.csv").write_text(""), "trials.csv is empty; write a row per trial"),
        (lambda f: (f / "images.npy").unlink(), "put pictures into images/, or the class of each trial into"),
        (
            lambda f: (f / "meta.yaml").write_text("channels: [a, a]\ndims: [trial, channel]"),
            "channels lists 2 entries, but the array of trials",
        ),
        (lambda f: (f / "data.npy").unlink(), "holds no data.npy"),
        (lambda f: (f / "trials.csv").unlink(), "no table of the trials"),
        (lambda f: (f / "trials.csv").write_text("stimulus_id,stimulus_id\n"), "more than once"),
        (lambda f: (f / "trials.csv").write_bytes(b"\xff\xfe\x00stimulus"), "cannot be read as a table"),
        (lambda f: (f / "meta.yaml").write_text("titel: x"), "did you mean 'title'"),
        (lambda f: (f / "meta.yaml").write_text("- a"), "must hold a mapping"),
        (lambda f: (f / "meta.yaml").write_text("sfreq: fast"), "sfreq must be a number"),
        (lambda f: (f / "images.npy").write_bytes(b""), "cannot be read as an array of pictures"),
        (lambda f: np.save(f / "images.npy", 0 * make_pictures()), "are black throughout, from picture 0 on"),
        (lambda f: np.savez(f / "data.npz", a=np.zeros(3)), "data.npy and data.npz"),
    ],
)
def test_a_damaged_folder_is_one_sentence(tmp_path, damage, message):
    folder = write_folder(tmp_path, pictures=make_pictures())
    damage(folder)
    with pytest.raises(DataError, match=message):
        read_array_folder(folder)


def test_constant_features_are_named():
    X = make_signals(shape=(N_TRIALS, 3, 5))
    X[:, 1] = 7
    data = assemble_data(X, make_table(), make_named(), ch_names=["Fz", "Cz", "Pz"])
    assert any(
        "1 of 3 channels never vary and so have no information, first Cz" in note for note in data.notes
    )


def test_repetitions_are_counted_within_subject():
    table, _ = complete_trials(pd.DataFrame({"stimulus_id": ["a", "a", "a"], "subject": ["1", "2", "1"]}))
    assert table["repetition"].tolist() == [0, 0, 1]


def test_trials_without_a_signal_are_told_or_refused():
    """Half of an array overwritten with zeros was taken without a word."""
    X = np.random.default_rng(0).standard_normal((N_TRIALS, 30)).astype(np.float32)
    X[-1] = 0
    data = assemble_data(X, make_table(), make_named())
    assert any(f"1 of {N_TRIALS} trials have the same value" in note for note in data.notes)
    X[N_TRIALS // 2 :] = 0
    with pytest.raises(
        DataError,
        match=rf"of {N_TRIALS} trials have the same value everywhere, the first in row {N_TRIALS // 2}",
    ):
        assemble_data(X, make_table(), make_named())
    # Counts of a few cells may all be zero.
    few = np.random.default_rng(0).poisson(0.3, (N_TRIALS, 3)).astype(np.float32)
    assert not any(
        "have the same value" in note for note in assemble_data(few, make_table(), make_named()).notes
    )


@pytest.mark.parametrize(
    "subjects, classes, kind",
    [
        ("aabbccdd", "ppqqppqq", "leave_one_subject_out"),  # two people of each class
        ("aabbccdd", "ppqqqqqq", "kfold"),  # one alone of its class: left out, nobody shows it
        ("aabbccdd", "pqpqpqpq", "kfold"),  # classes vary within people
        ("aaaaaaaa", "pppppppp", "kfold"),  # one person, one class
    ],
)
def test_classes_of_whole_people_are_decoded_by_leaving_people_out(subjects, classes, kind):
    """A fold of trials would let a decoder recognise the person: .890 where unseen people give .671."""
    table = pd.DataFrame({"subject": list(subjects), "stimulus_id": list(classes), "concept": list(classes)})
    trials, _ = complete_trials(table)
    assert choose_split(trials, 0)[0]["kind"] == kind
