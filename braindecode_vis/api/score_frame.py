"""Tables of scores in Python: a p-value is never printed as zero, even if the table is rounded."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pandas as pd

from braindecode_vis.scoring.score_row import format_p_value


class ScoreFrame(pd.DataFrame):
    """A table whose columns `p_value`, `p_holm`, `q_value` and the like are shown by `format_p_value`.

    The numbers are those of a plain table; ``pandas.DataFrame(table)`` returns the plain table.

    Examples
    --------
    >>> print(ScoreFrame({"metric": ["top1"], "p_value": [0.0001]}).round(3))
      metric p_value
    0   top1 < 0.001
    """

    @property
    def _constructor(self) -> type[ScoreFrame]:
        return ScoreFrame

    def to_string(self, *args: Any, **options: Any) -> Any:
        """Return the table as text; see `pandas.DataFrame.to_string`."""
        return super().to_string(*args, **self._add_formatters(options))

    def to_html(self, *args: Any, **options: Any) -> Any:
        """Return the table as HTML; see `pandas.DataFrame.to_html`."""
        return super().to_html(*args, **self._add_formatters(options))

    def _repr_html_(self) -> str | None:
        shown = pd.DataFrame(self).copy()
        for name, form in self._list_formatters().items():
            shown[name] = [form(value) for value in shown[name]]
        found: str | None = shown._repr_html_()  # type: ignore[operator]
        return found

    def _add_formatters(self, options: dict[str, Any]) -> dict[str, Any]:
        asked = options.get("formatters")
        if asked is None or isinstance(asked, dict):
            options["formatters"] = self._list_formatters() | (asked or {})
        return options

    def _list_formatters(self) -> dict[Hashable, Any]:
        return {
            name: format_p_value
            for name in self.columns
            if str(name).startswith(("p_", "q_")) and pd.api.types.is_numeric_dtype(self.dtypes[name])
        }
