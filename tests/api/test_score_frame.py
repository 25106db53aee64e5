"""Tables that Python shows never print a p-value as zero."""

import pickle

import numpy as np
import pandas as pd

from braindecode_vis.api.score_frame import ScoreFrame


def test_no_rounding_makes_a_p_value_zero():
    table = ScoreFrame(
        {
            "metric": ["top1", "top5"], "value": [0.25, 0.5], "p_value": [0.0001, 0.0123], "p_holm": [np.nan, 0.5],
            "q_value": [1e-5, 0.2],
        }
    )  # fmt: skip
    rounded = table.round(3)
    shown = [
        repr(rounded),
        rounded.to_string(index=False),
        rounded.query("value > 0")[["metric", "p_value"]].to_string(),
    ]
    for text in shown:
        assert "< 0.001" in text
        assert "0.000" not in text
    for html in (rounded._repr_html_(), rounded.to_html(formatters={"value": str})):
        assert "&lt; 0.001" in html
        assert "0.012" in html
    # The numbers are as they were, and a plain table is one call away.
    assert table["p_value"].tolist() == [0.0001, 0.0123]
    pd.testing.assert_frame_equal(pd.DataFrame(pickle.loads(pickle.dumps(table))), pd.DataFrame(table))
    assert "0.0001" in repr(pd.DataFrame(table))
