"""Tables of the shipped configurations, of the kinds of each role, and of their settings."""

from __future__ import annotations

import pandas as pd

from braindecode_vis.base.checks import check_option
from braindecode_vis.base.consent import give_consent
from braindecode_vis.base.registry import ROLES, find_component, list_kinds
from braindecode_vis.config import find_config, list_shipped, read_header
from braindecode_vis.config.explain import explain, explain_class


def list_configs() -> pd.DataFrame:
    """Return the shipped configurations: what each one is, and the paper and published number that it follows, if any.

    Returns
    -------
    DataFrame
        Columns `name`, `about`, `source` and `as_published`; ``describe("config", name)`` says what departs.

    Examples
    --------
    >>> "digits69_ridge" in set(list_configs()["name"])
    True
    """
    rows = []
    for path in list_shipped().values():
        header = read_header(path)
        rows.append(
            {
                "name": path.stem, "about": header.about, "source": header.source,
                "as_published": header.as_published,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def describe(role: str, kind: str | None = None) -> pd.DataFrame:
    """Return the kinds of a role, or the settings of one kind.

    Parameters
    ----------
    role
        ``dataset``, ``split``, ``target``, ``encoder``, ``network``, ``objective``, ``augmentation``, ``prior``,
        ``generator`` or ``analysis``; ``config`` for the configurations.
    kind
        A kind, to list its settings with types, defaults and meaning. For ``config``: a shipped configuration or a
        file, to read in its header which paper it follows.

    Returns
    -------
    DataFrame
        Columns `kind` and `about`, or `setting`, `type`, `default` and `about`, or `part` and `text` (of ``config``).

    Examples
    --------
    >>> describe("encoder")["kind"].tolist()[:2]
    ['ridge', 'linear_gaussian']
    >>> "alphas" in set(describe("encoder", "ridge")["setting"])
    True
    >>> describe("config", "things_eeg2_nice_vitl")["part"].unique().tolist()
    ['about', 'source', 'as published', 'same as published', 'departs']
    """
    check_option("the role", role, [*ROLES, "config"])
    if role == "config":
        if kind is None:
            return list_configs().rename(columns={"name": "kind"})[["kind", "about"]]
        return pd.DataFrame(read_header(find_config(kind)).list_parts(), columns=["part", "text"])
    if kind is None:
        return pd.DataFrame(explain(role)[0].kinds, columns=["kind", "about"])
    if ":" not in kind:
        check_option(f"the kind of {role}", kind, list_kinds(role))
    with give_consent(code=kind if ":" in kind else ()):
        model = find_component(role, kind)
    rows = []
    for option in explain_class(kind, model).options:
        entry = model.model_fields[option.name]
        default = "required" if entry.is_required() else entry.get_default(call_default_factory=True)
        rows.append({"setting": option.name, "type": option.type, "default": default, "about": option.text})
    return pd.DataFrame(rows, columns=["setting", "type", "default", "about"])
