"""Seeds are aggregated over means of subjects, and scores are set beside their ceilings."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from braindecode_vis.arrays import SCORE_KEYS
from braindecode_vis.checks import DataError
from braindecode_vis.metrics import aggregate


def make_table(seed, values):
    rows = [
        dict.fromkeys(SCORE_KEYS)
        | {"method": "decoded", "metric": "top1", "subject": who, "split": "test", "protocol": "p", "seed": seed,
           "value": value, "chance": 0.005}
        for who, value in values.items()
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_the_spread_is_that_of_the_mean_over_subjects():
    tables = [
        make_table(0, {"1": 0.1, "2": 0.3, "all": 0.9}),
        make_table(1, {"1": 0.3, "2": 0.1, "all": 0.9}),
    ]
    tables.append(make_table(2, {"1": 0.2, "2": 0.3, "all": 0.9}))
    found = aggregate.aggregate_seeds(tables).set_index("subject")
    mean = found.loc["mean"]
    assert mean["value"] == pytest.approx(np.mean([0.2, 0.2, 0.25]))
    assert mean["sd_seeds"] == pytest.approx(np.std([0.2, 0.2, 0.25], ddof=1))
    assert (mean["n_subjects"], mean["n_seeds"], mean["chance"]) == (2, 3, 0.005)
    low, high = stats.t.interval(0.95, 2, loc=mean["value"], scale=stats.sem([0.2, 0.2, 0.25]))
    assert (mean["ci_low"], mean["ci_high"]) == (pytest.approx(low), pytest.approx(high))
    assert found.loc["1", "sd_seeds"] == pytest.approx(0.1)
    assert set(found.index) == {"1", "2", "all", "mean"}


def test_tables_that_do_not_belong_together_are_refused():
    one = make_table(0, {"1": 0.1})
    for other, words in (
        (make_table(0, {"1": 0.2}), "one repeats"),
        (make_table(1, {"2": 0.2}), "same scores"),
    ):
        with pytest.raises(DataError, match=words):
            aggregate.aggregate_seeds([one, other])
    with pytest.raises(DataError, match="at least two"):
        aggregate.aggregate_seeds([one])
    assert "mean" not in set(aggregate.aggregate_seeds([one, make_table(1, {"1": 0.2})])["subject"])


def test_scores_relative_to_their_ceiling():
    table = pd.DataFrame({"value": [0.5, 0.5], "chance": [0.5, 0.0], "noise_ceiling": [0.75, None]})
    found = aggregate.add_ceiling_columns(table)
    assert found["of_ceiling"].iloc[0] == pytest.approx(2 / 3)
    assert found["of_ceiling_above_chance"].iloc[0] == 0
    assert found["of_ceiling"].isna().tolist() == [False, True]
    with pytest.raises(DataError, match="at chance"):
        aggregate.add_ceiling_columns(pd.DataFrame({"value": [1.0], "chance": [0.2], "noise_ceiling": [0.2]}))
