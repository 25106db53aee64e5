import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import pdist, squareform
from scipy.stats import skew, spearmanr

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import DataError
from braindecode_vis.parts.analyses.hubness import (
    bound_geometry,
    compute_concept_similarity,
    compute_effective_dimension,
    compute_hubness,
    compute_modality_gap,
    compute_uniformity,
    cross_geometry,
)
from braindecode_vis.parts.analyses.rsa import (
    compare_layers_with_brain,
    compare_rdms,
    compute_noise_ceiling,
    compute_rdm,
)
from braindecode_vis.scoring.crossed import crossed_interval, half_width_of_parts

RNG = np.random.default_rng(0)


def make(vectors, space="s", prefix="i"):
    return Embeddings(np.asarray(vectors, np.float32), [f"{prefix}{n}" for n in range(len(vectors))], space)


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_hubness_against_a_loop():
    queries, gallery = make(RNG.standard_normal((50, 8))), make(RNG.standard_normal((30, 8)))
    counts = np.zeros(30)
    for query in unit(queries.vectors.astype(float)):
        counts[np.argsort(-(unit(gallery.vectors.astype(float)) @ query))[:5]] += 1
    found = compute_hubness(queries, gallery, k=5)
    assert found.skewness == pytest.approx(skew(counts))
    assert found.largest_share == pytest.approx(counts.max() / 50)
    assert found.never_share == pytest.approx((counts == 0).mean())
    assert found.hub_id == f"i{counts.argmax()}"


def test_a_planted_hub_is_found_and_an_item_is_not_its_own_neighbour():
    vectors = RNG.standard_normal((300, 40))
    spread = compute_hubness(make(vectors), make(vectors), k=1)
    assert spread.largest_share == pytest.approx(1 / 300)  # compared with another set, each finds its copy
    items = make(vectors)
    assert compute_hubness(items, items, k=1).largest_share > 1 / 300
    gallery = vectors.copy()
    gallery[17] = vectors.mean(axis=0)
    shifted = make(vectors + 3 * vectors.mean(axis=0) / np.linalg.norm(vectors.mean(axis=0)))
    hub = compute_hubness(shifted, make(gallery), k=10)
    assert hub.hub_id == "i17"
    assert hub.skewness > compute_hubness(make(vectors), make(gallery), k=10).skewness


@pytest.mark.parametrize("shape", [(400, 12), (12, 400)])
def test_effective_dimension_against_the_eigenvalues(shape):
    vectors = RNG.standard_normal(shape) * np.geomspace(1, 0.01, shape[1])
    values = np.linalg.svd(vectors - vectors.mean(0), compute_uv=False) ** 2
    assert compute_effective_dimension(vectors) == pytest.approx(values.sum() ** 2 / (values**2).sum())
    assert compute_effective_dimension(np.outer(np.arange(5.0), np.ones(3))) == pytest.approx(1)
    assert compute_effective_dimension(np.ones((4, 3))) == 0


def test_concept_similarity_against_all_pairs(monkeypatch):
    from braindecode_vis.parts.analyses import hubness as geometry

    monkeypatch.setattr(geometry, "_BLOCK", 7)
    vectors, concepts = RNG.standard_normal((40, 6)) + 1, np.array(list("abcde"))[RNG.integers(5, size=40)]
    cosines = (
        unit(vectors.astype(np.float32).astype(float)) @ unit(vectors.astype(np.float32).astype(float)).T
    )
    rows, columns = np.triu_indices(40, 1)
    same = concepts[rows] == concepts[columns]
    values = cosines[rows, columns]
    found = compute_concept_similarity(make(vectors), concepts)
    assert found.within == pytest.approx(values[same].mean())
    assert found.between == pytest.approx(values[~same].mean())
    assert found.between_sd == pytest.approx(values[~same].std())
    assert compute_concept_similarity(make(vectors), np.arange(40)).within is None
    with pytest.raises(DataError, match="all images show one concept"):
        compute_concept_similarity(make(vectors), ["a"] * 40)


def test_modality_gap_by_hand_and_by_id():
    right = make(RNG.standard_normal((30, 5)))
    order = RNG.permutation(30)
    same = Embeddings(right.vectors[order] * 3, right.ids[order], "s")  # length does not matter
    none = compute_modality_gap(same, right)
    assert none.gap == pytest.approx(0, abs=1e-6)
    assert none.alignment == pytest.approx(0, abs=1e-6)
    assert none.uniformity_left == pytest.approx(none.uniformity_right)
    moved = make(unit(right.vectors) + np.array([4, 0, 0, 0, 0]))
    gap = compute_modality_gap(moved, right)
    a, b = unit(moved.vectors.astype(float)), unit(right.vectors.astype(float))
    assert gap.gap == pytest.approx(np.linalg.norm(a.mean(0) - b.mean(0)))
    assert gap.matching == pytest.approx((a * b).sum(1).mean())
    assert gap.other == pytest.approx((a @ b.T)[~np.eye(30, dtype=bool)].mean())
    assert gap.alignment == pytest.approx(((a - b) ** 2).sum(1).mean())
    assert gap.uniformity_left == pytest.approx(np.log(np.exp(-2 * pdist(a) ** 2).mean()))


def test_collapse_has_no_uniformity():
    assert compute_uniformity(np.ones((5, 3))) == pytest.approx(0)
    assert compute_uniformity(RNG.standard_normal((200, 30))) < -2


def test_a_zero_vector_makes_no_nan():
    vectors = RNG.standard_normal((6, 3))
    vectors[2] = 0
    items = make(vectors)
    assert np.isfinite(compute_hubness(items, items).skewness)
    assert np.isfinite(compute_concept_similarity(items, list("aabbcc")).between)


def test_dissimilarities_and_their_bad_rows():
    vectors = RNG.standard_normal((9, 4, 5))
    np.testing.assert_allclose(compute_rdm(vectors), pdist(vectors.reshape(9, -1), "correlation"))
    vectors[3] = 2
    with pytest.raises(DataError, match="row 3 is constant"):
        compute_rdm(vectors)
    compute_rdm(vectors, metric="euclidean")
    with pytest.raises(DataError, match="at least three rows"):
        compute_rdm(vectors[:2])


def make_brain(latent, noise, n_subjects=4):
    rng, n = np.random.default_rng(1), len(latent)
    brain = {}
    for s in range(n_subjects):
        patterns = latent @ rng.standard_normal((latent.shape[1], 60)) + noise * rng.standard_normal((n, 60))
        order = rng.permutation(n)
        brain[f"sub-{s}"] = Embeddings(
            patterns[order].astype(np.float32), np.array([f"i{k}" for k in order]), f"b{s}"
        )
    return brain


def test_the_layer_that_made_the_responses_wins():
    latent = RNG.standard_normal((40, 6))
    layers = {"early": make(RNG.standard_normal((40, 30))), "middle": make(latent), "late": make(latent**3)}
    match = compare_layers_with_brain(make_brain(latent, 1.0), layers, n_bootstrap=100, n_permutations=100)
    by_name = {m.layer: m for m in match.layers}
    assert by_name["middle"].rho > by_name["late"].rho > by_name["early"].rho
    assert by_name["middle"].p_value == pytest.approx(1 / 101)
    assert by_name["early"].p_value > 0.02
    assert by_name["middle"].ci_low < by_name["middle"].rho
    assert match.ceiling_low < match.ceiling_high
    assert (match.n_images, match.n_subjects) == (40, 4)
    first = next(iter(make_brain(latent, 1.0).values()))
    alone = compare_layers_with_brain({"s": first}, layers, n_bootstrap=10, n_permutations=10)
    assert alone.ceiling_low is None
    expected = spearmanr(
        compute_rdm(first.vectors), compute_rdm(layers["late"].select(first.ids).vectors)
    ).statistic
    assert alone.layers[2].rho == pytest.approx(expected)


def test_pure_noise_is_at_chance():
    """The p-value of unrelated responses is uniform: over forty of them, few are small."""
    layer, values = {"x": make(RNG.standard_normal((15, 20)))}, []
    for seed in range(40):
        noise = np.random.default_rng(100 + seed).standard_normal((15, 20))
        match = compare_layers_with_brain(
            {"s": make(noise)}, layer, n_bootstrap=1, n_permutations=60, seed=seed
        )
        values.append(match.layers[0].p_value)
    assert np.mean(np.array(values) < 0.05) <= 0.15  # binomial: P(more than 6 of 40) < 0.004
    assert 0.35 < np.mean(values) < 0.65


def test_images_that_are_missing_are_named():
    brain = {"s": make(RNG.standard_normal((6, 5)))}
    with pytest.raises(DataError, match="no embedding of stimulus 'i5'"):
        compare_layers_with_brain(brain, {"x": make(RNG.standard_normal((5, 5)))})


def test_the_noise_ceiling_bounds_the_true_model():
    rdms = [squareform(compute_rdm(b.select([f"i{k}" for k in range(30)]).vectors))
            for b in make_brain(RNG.standard_normal((30, 5)), 0.5).values()]  # fmt: skip
    low, high = compute_noise_ceiling(rdms)
    assert 0 < low < high <= 1
    assert compute_noise_ceiling([rdms[0], rdms[0]]) == (pytest.approx(1), pytest.approx(1))


@pytest.mark.filterwarnings("default")  # of what the library imports
def test_rsatoolbox_has_the_same_dissimilarities_correlations_and_ceilings():
    pytest.importorskip("rsatoolbox")
    from rsatoolbox.data import Dataset
    from rsatoolbox.inference.noise_ceiling import boot_noise_ceiling
    from rsatoolbox.rdm import RDMs, calc_rdm, compare

    latent = RNG.standard_normal((30, 5))
    order = [f"i{k}" for k in range(30)]
    brain = {name: rows.select(order).vectors for name, rows in make_brain(latent, 0.5).items()}
    theirs = {name: calc_rdm(Dataset(rows.astype(np.float64)), "correlation") for name, rows in brain.items()}
    for name, rows in brain.items():
        # Both are double precision; only the order of sums differs.
        np.testing.assert_allclose(compute_rdm(rows), theirs[name].dissimilarities[0], rtol=1e-12, atol=1e-14)
    model = calc_rdm(Dataset(latent + 0.5 * RNG.standard_normal(latent.shape)), "correlation")
    subjects = {name: rdm.get_matrices()[0] for name, rdm in theirs.items()}
    found = compare_rdms(subjects, {"m": model.get_matrices()[0]}, n_bootstrap=9, n_permutations=9)
    all_rdms = RDMs(np.concatenate([rdm.dissimilarities for rdm in theirs.values()]))
    assert found.layers[0].rho == pytest.approx(compare(model, all_rdms, "spearman").mean(), rel=1e-12)
    pearson = compare_rdms(
        subjects, {"m": model.get_matrices()[0]}, measure="pearson", n_bootstrap=9, n_permutations=9
    )
    assert pearson.layers[0].rho == pytest.approx(compare(model, all_rdms, "corr").mean(), rel=1e-12)
    for measure, method in (("spearman", "spearman"), ("pearson", "corr")):
        ceiling = compute_noise_ceiling(list(subjects.values()), measure)
        # Sums of ranks of several subjects tie, and rounding parts some of those ties here.
        np.testing.assert_allclose(ceiling, boot_noise_ceiling(all_rdms, method), rtol=1e-4)


def test_intervals_of_the_geometry_hold_their_value():
    """Resampled images repeat, which lowers a dimension: the value once lay above its own interval."""
    draws = np.random.default_rng(0).normal(5.0, 0.5, 400)
    low, high, words = bound_geometry(7.0, draws, 40, "image")
    assert low < 7.0 < high
    assert high - low == pytest.approx(np.subtract(*np.quantile(draws, [0.975, 0.025])))
    assert words == "images"
    low, high, words = bound_geometry(
        7.0, draws, 5, "group"
    )  # few groups have Student's t, and two have none
    assert high - low == pytest.approx(2 * stats.t.ppf(0.975, 4) * draws.std() * (5 / 4) ** 0.5)
    assert words == "5 groups (t)"
    assert np.isnan(bound_geometry(7.0, draws, 2, "group")[0])


def test_intervals_of_the_geometry_of_several_subjects_are_crossed():
    """With the parts of a mean, resampled, they are those of the crossed interval."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(5, 1)) + rng.normal(size=(1, 30)) + rng.normal(size=(5, 30))
    draws = [
        table[rng.integers(0, 5, (4000, 5))].mean(axis=(1, 2)),
        table[:, rng.integers(0, 30, (4000, 30))].mean(axis=(0, 2)),
        table.ravel()[rng.integers(0, 150, (4000, 150))].mean(axis=1),
    ]
    low, high, words = cross_geometry(float(table.mean()), draws, (5, 30), "image")
    # 4000 resamples know a spread to 1.1 %; of single cells subjects and images are not taken off.
    assert (high - low) / 2 == pytest.approx(crossed_interval(table).half_width, rel=0.05)
    assert words == "5 subjects and 30 images (crossed)"
    low, high, words = cross_geometry(0.0, draws, (2, 30), "image")
    assert np.isnan(low)
    assert words.startswith("no interval: 2 subjects")


def test_geometries_are_compared_from_three_images_on():
    three = np.array([[0, 1, 2], [1, 0, 3], [2, 3, 0.0]])
    options = {"n_bootstrap": 9, "n_permutations": 9}
    (found,) = compare_rdms({"01": three}, {"turned": 4 - three - 4 * np.eye(3)}, **options).layers
    assert found.rho == pytest.approx(-1)
    skewed, two = three.copy(), three[:2, :2]
    skewed[0, 1] = 2.5
    for subjects, models in (
        ({"01": two}, {"m": two}),
        ({"01": three}, {"m": two}),
        ({"01": three}, {"m": skewed}),
    ):
        with pytest.raises(DataError, match=r"symmetric matrix of [23] images, at least 3, is expected"):
            compare_rdms(subjects, models, **options)


@pytest.mark.parametrize("n_units", [2, 3, 50])
def test_what_few_units_show_of_their_variance_is_made_whole(n_units):
    """Resamples of n units show (n - 1) / n of what varies; one unit alone shows nothing."""
    rng = np.random.default_rng(0)
    draws = [scale * rng.standard_normal(500) for scale in (0.0, 1.0, 0.0)]
    low, high, words = cross_geometry(0.5, draws, (5, n_units), "image")
    variance = draws[1].var() * n_units / (n_units - 1)
    half = half_width_of_parts(0.0, float(variance), 0.0, 5, n_units)
    assert (low, high) == (pytest.approx(0.5 - half), pytest.approx(0.5 + half))
    assert words == f"5 subjects and {n_units} images (crossed)"
