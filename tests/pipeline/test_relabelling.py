"""Which runs have p-values by refits on relabelled images; without a relabelling the ranks are those of the run."""

import numpy as np
import pytest

import braindecode_vis as bdv
from braindecode_vis.pipeline.decoding import retrieve
from braindecode_vis.pipeline.relabelling import describe_folding
from braindecode_vis.pipeline.scoring import make_scoring_task
from braindecode_vis.scoring import refits

QUICK = {"evaluation.n_permutations": 100, "evaluation.n_bootstrap": 100, "encoder.n_inner_folds": 2}


def decode(folder, split, *, labels=None, **settings):
    rng = np.random.default_rng(0)
    pictures = rng.random((12, 4, 4))
    shown = np.tile(np.arange(12), 2)
    X = pictures.reshape(12, -1)[shown] @ rng.normal(size=(16, 20)) + rng.normal(size=(24, 20))
    data = bdv.from_arrays(X.astype(np.float32), images=pictures, shown=shown, subject=labels)
    return bdv.decode(data, split=split, settings={**QUICK, **settings}, out=folder)._run


def test_an_order_that_changes_nothing_gives_the_ranks_of_the_run(tmp_path, monkeypatch):
    """Penalty chosen in inner folds, repetitions averaged, gallery of all folds: the first order is that of the run."""

    def rank(folds, gram, orders, *, advance):
        return plain(folds, gram, np.concatenate([np.arange(len(gram))[None], orders]), advance=advance)

    plain = refits.rank_relabelled
    monkeypatch.setattr("braindecode_vis.pipeline.relabelling.rank_relabelled", rank)
    run = decode(tmp_path, 6)
    found = describe_folding(run, None)
    ranks = np.concatenate([fold.retrieval.n_above for fold in retrieve(run).folds])
    np.testing.assert_array_equal(found.refits.n_above[0], ranks)
    assert (found.refits.n_above[1:] != ranks).any()
    assert found.remembered
    assert not found.within
    assert "101 refits on relabelled images" in found.words  # with the order that was added
    assert make_scoring_task(run)[0].folding.numbers == list(range(6))


@pytest.mark.parametrize(
    ("split", "settings", "labels"),
    [
        (2, {"encoder.n_features": [5, None]}, None),  # features are chosen by the targets
        (2, {"target": {"kind": "pca", "n_components": 3}}, None),  # a space in every fold
        (2, {"retrieval.centre": "zscore"}, None),
        # Images that were trained on are recognised under any label.
        ({"kind": "leave_one_group_out", "by": "subject"}, {}, ["01"] * 12 + ["02"] * 12),
    ],
)
@pytest.mark.filterwarnings("ignore::braindecode_vis.base.checks.LeakWarning")
def test_where_refits_are_no_products_the_null_is_wider(tmp_path, split, settings, labels):
    found = describe_folding(decode(tmp_path, split, labels=labels, **settings), None)
    assert found.refits is None
    assert "p-values: images are permuted within folds, the null widened by sqrt 2" in found.words
