"""The declarations of the benchmarks run at tiny sizes, and what is measured becomes a page."""

import importlib
import importlib.util
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from braindecode_vis.base.registry import list_kinds, validate_component

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def table():
    """The benchmarks, imported as `python benchmarks/table.py` does."""
    environment, known = dict(os.environ), set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("table")
    sys.path.remove(str(FOLDER))
    for name in set(sys.modules) - known:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    os.environ.clear()
    os.environ.update(environment)


# What would take seconds to load, or writes raw recordings, is left to `make bench-quick`.
@pytest.mark.parametrize(
    "name",
    [
        "ridge",
        "ridge-five",
        "ridge-choice",
        "ranks",
        "top-10",
        "resampling",
        "network",
        "training",
        "mvnn",
        "masking",
        "lss",
        "by-voxel",
    ],
)
def test_a_row_runs_and_its_peers_compute_the_same(table, tmp_path, name):
    row = next(row for row in table.ROWS if row.name == name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peers advise and deprecate
        work = row.make(tmp_path, **row.tiny)
        ours = work.ours()
        for peer in work.peers:
            try:
                theirs = work.build(peer)()
            except ModuleNotFoundError:
                continue  # the table says so
            difference = work.compare(ours, theirs)
            assert isinstance(difference, str) or difference <= row.tolerance, peer


@pytest.mark.parametrize(
    "name",
    [
        "subjects",
        "evaluate",
        *(
            pytest.param(name, marks=pytest.mark.further)
            for name in ("evaluate-pictures", "reconstruct", "predict", "folds", "ridge-voxels")
        ),
        "look-up",
        "bank",
        "read",
        "rank",
        "mask-voxels",
    ],
)
def test_a_step_that_grows_runs(table, tmp_path, name):
    growth = next(growth for growth in table.GROWTHS if growth.name == name)
    growth.make(tmp_path, growth.tiny)()


def test_names_and_sizes_are_complete(table):
    names = [each.name for each in (*table.ROWS, *table.GROWTHS)]
    assert len(set(names)) == len(names)
    for row in table.ROWS:
        for size in (row.tiny, *row.quick, *row.full, *row.large):
            assert row.size.format(**size)
    for growth in table.GROWTHS:
        assert min(len(growth.quick), len(growth.full)) >= 4


def test_a_page_holds_every_row_also_those_that_were_lost_or_not_measured(table):
    from measuring import Curve, Pairs, fit_exponent

    row = next(row for row in table.ROWS if row.name == "ranks")
    lost = Pairs(row, "3 x 4", "a peer", [1.5, 2.0, 1.0], (3.0, 2.0), (10.0, 0.2), 0.5)
    missing = Pairs(row, "3 x 4", "another", failure="not installed: pip install another")
    curve = Curve(table.GROWTHS[0], (1, 2, 4, 8), [1.0, 4.0, 16.0, 64.0], [0.1, 0.2, 0.3, 0.9])
    page = table.write_document([lost, missing], [curve], [("--help", 0.3)], command="make bench")
    assert "**1.50** (1.25 to 1.75, 3)" in page
    assert "TOO LARGE" in page
    assert "- Exact rank of the true item, 3 x 4: 1.50 of a peer" in page
    assert "not installed: pip install another" in page
    assert "2.00 ± 0.00, **does not hold** (1.15)" in page
    assert "0.00 ± 0.00, holds (1.15)" in page  # below 1 MB nothing is told apart
    assert "| --help | 0.30 |" in page
    power, error = fit_exponent([1, 2, 4, 8], [1.0, 2.0, 4.1, 7.9])
    assert np.isclose(power, 1, atol=0.02)
    assert 0 < error < 0.02


def test_a_row_that_is_measured_again_takes_its_place_in_the_page(table):
    from measuring import Pairs

    row, other = (next(row for row in table.ROWS if row.name == name) for name in ("training", "ranks"))
    slow = Pairs(row, "3 x 4", "a peer", [1.5], (3.0, 2.0), (10.0, 0.2), "other draws")
    beside = Pairs(other, "3 x 4", "a peer", [1.2], (3.0, 2.0), (10.0, 0.2), 0.5)
    page = table.write_document([slow, beside], [], [("--help", 0.3)], command="make bench")
    quick = Pairs(row, "3 x 4", "a peer", [0.9], (1.8, 2.0), (10.0, 0.2), "other draws")
    for _ in range(2):  # also of a page that was renewed before
        page = table.renew_rows(page, [quick])
        assert "| Training, three epochs | 3 x 4 | a peer | 0.90 (0.90 to 0.90, 1) |" in page
        assert "1.50" not in page
        assert "less:\n\n- Exact rank of the true item, 3 x 4: 1.20 of a peer\n\n" in page
        assert page.count("- Training, three epochs, load") == page.count(row.words) == 1
    assert page.endswith("| --help | 0.30 |\n")
    page = table.renew_rows(page, [Pairs(row, "5 x 5", "a peer", [0.9])])
    tasks = [line.split(" | ")[:2] for line in page.split("\n") if line.startswith("| ")]
    new = tasks.index(["| Training, three epochs", "5 x 5"])
    assert tasks[new - 1] == ["| Training, three epochs", "3 x 4"]  # behind the other sizes of its task


@pytest.fixture
def live(table):
    """The benchmark of live decoding, imported beside the others."""
    return importlib.import_module("live")


def test_a_lost_and_a_doubled_decision_of_a_stream_are_counted(live):
    from braindecode_vis.parts.live.stream_roles import Decision

    class Source:
        decisions = [Decision(0, 1.0, "a"), Decision(1, 2.0, "b", lost="gap: lost"), Decision(2, 2.0, "b")]

    expected = live.Counter({("a", 1.0): 1, ("b", 2.0): 1, ("c", 3.0): 1})
    row, memory = live.judge_session(
        "here", "", expected, Source(), {"lost": {"gap": 1}, "n_lost": 1}, [1.0, 2, 30]
    )
    assert (row.found, row.holds, memory.holds) == ("1 / 1", False, False)
    page = live.renew_section("# Page\n", {"replay": [row]}, quick=True)
    again = live.renew_section(page + "kept", {"replay": [row, memory]}, quick=False)
    assert "**0 / 0, missed**" in page
    assert again.count("## Live decoding") == 1
    assert again.endswith("kept")
    assert again.count("begin of benchmarks/live.py") == 1


def test_the_nearest_of_clusters_are_those_of_brute_force(live, tmp_path):
    rows = live.measure_million(tmp_path, live.SIZES["tiny"])
    assert "the same as by brute force" in rows[0].words


@pytest.fixture
def ladder(monkeypatch):
    """The ablation ladder, imported by its path."""
    place = importlib.util.spec_from_file_location("ladder", FOLDER / "studies" / "ladder.py")
    module = importlib.util.module_from_spec(place)
    monkeypatch.setitem(sys.modules, "ladder", module)
    place.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "kind, missing",
    [
        ("trials", {"diffusion_prior"}),
        ("voxels", {"diffusion_prior", "salient"}),
    ],
)
def test_the_ladder_has_a_row_for_every_objective(ladder, tmp_path, kind, missing):
    """Voxels have no time before the stimulus.

    The prior that is trained with the encoder is for images, and no rung of retrieval.
    """
    rows, used = ladder.list_worth(kind, tmp_path), []
    for name, rung in rows.items():
        validate_component("encoder", rung.encoder)
        of = rows[rung.reference or ladder.PLAIN]
        # What a row is compared with reads the same data; a plain row with data of its own is its own subject.
        assert of.settings == rung.settings or "objectives" not in rung.encoder, name
        used += rung.encoder.get("objectives", [{"kind": "clip"}])
    assert {one["kind"] for one in used} == set(list_kinds("objective")) - missing
    assert [one["masked"] for one in used if "masked" in one] == [1]


def test_the_ladder_asks_every_objective_at_its_defaults(ladder, tmp_path):
    rows = ladder.list_defaults(tmp_path)
    asked = [rung.encoder.get("objectives", [{"kind": "clip"}])[-1] for rung in rows.values()]
    plain = [one for one in asked if set(one) == {"kind"}]
    assert sorted({one["kind"] for one in plain}) == sorted(list_kinds("objective"))
    for rung in rows.values():
        validate_component("encoder", rung.encoder)


@pytest.fixture
def reality(table):
    """The ladder on real recordings, imported beside the others."""
    return importlib.import_module("reality")


@pytest.mark.parametrize(
    "kind, classes",
    [("neurons", False), ("voxels", False), ("series", False), ("voxels", True), ("series", True)],
)
def test_a_row_on_reality_is_a_valid_encoder(reality, kind, classes):
    rows = reality.list_rows(kind, classes)
    for rung in rows.values():
        validate_component("encoder", rung.encoder)
    assert next(iter(rows)) == "ridge"
    assert len(reality.list_objectives(rows["network, CLIP"])) == 12
    kinds = {rung.encoder["kind"] for rung in rows.values()}
    assert kinds >= {"ridge", "linear_gaussian", "average", "network"}


def test_sessions_that_are_opened_took_no_part_in_choices(reality):
    assert not set(reality.OPENED) & set(reality.CHOICE)
    assert not set(reality.SESSIONS) & set(reality.DATA)


def test_values_of_both_roles_have_the_mean_of_two_way_identification(reality):
    """Each picture is left out as query and as distractor; the mean of the pseudo-values is the score itself."""
    from braindecode_vis.base.arrays import Embeddings
    from braindecode_vis.scoring.retrieval import compute_k_way_hits, compute_ranks

    rng = np.random.default_rng(0)
    ids = [f"i{number}" for number in range(12)]
    gallery = Embeddings(rng.normal(size=(12, 5)).astype(np.float32), ids, "x")
    order = rng.permutation(12)
    seen = gallery.vectors[order] + rng.normal(size=(12, 5)).astype(np.float32)
    queries = Embeddings(seen, [ids[number] for number in order], "x")
    ranked = compute_ranks(queries, gallery, n_top=12)
    values = reality.count_both_roles(ranked)
    np.testing.assert_allclose(
        values.mean(), compute_k_way_hits(ranked, 2).mean(), rtol=1e-12
    )  # sums of halves
    without = [
        compute_k_way_hits(compute_ranks(queries.select(rest), gallery.select(rest), n_top=1), 2).mean()
        for rest in ([name for name in ids if name != gone] for gone in queries.ids)
    ]
    np.testing.assert_allclose(values, 12 * values.mean() - 11 * np.array(without), rtol=1e-9)


def test_rows_that_ran_are_read_and_not_run_again(reality, tmp_path, capsys):
    ran = ["--data", "phantom_mixture", "--only", "linear Gaussian", "--size", "tiny"]
    reality.main([str(tmp_path), "--out", str(tmp_path / "out"), *ran])
    printed = capsys.readouterr().out
    first = (tmp_path / "out" / "reality.md").read_text()
    reality.main([str(tmp_path), "--out", str(tmp_path / "out"), *ran])
    reality.main([str(tmp_path), "--out", str(tmp_path / "out"), "--tables"])
    again = capsys.readouterr().out
    assert printed.count("phantom_mixture, ") == 2
    assert "phantom_mixture, " not in again
    assert (tmp_path / "out" / "reality.md").read_text() == first
    assert "| linear Gaussian |" in first


def test_what_is_not_there_is_left_out(reality, tmp_path, capsys):
    reality.main([str(tmp_path), "--out", str(tmp_path / "out"), "--data", "digits69"])
    assert "left out" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        reality.main([str(tmp_path), "--out", str(tmp_path / "out"), "--data", "v4_210225"])


def test_photographs_that_the_prior_learns_from_are_not_tested(monkeypatch, capsys):
    """A session of the diffusion prior's photographs was taken as the one to decode, whose test it had then seen."""
    spec = importlib.util.spec_from_file_location("photographs", FOLDER / "studies" / "photographs.py")
    photographs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(photographs)
    given = ["photographs.py", "ROOT", "--taesd", "T", "--out", "OUT", "--session", photographs.OTHERS[0]]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit):
        photographs.main()
    sentence = f"learns from the photographs of {photographs.OTHERS[0]}; test another session"
    assert sentence in capsys.readouterr().err
