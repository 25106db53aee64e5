"""The words for every number and name: digits, metrics, methods.

Owns how a number becomes text and what a metric or a control means to somebody who sees it for the first time.
Knows nothing of figures or pages.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from braindecode_vis.scoring.metrics.metric_registry import Metric, find_metric

DECODED = "decoded"
DASH = "–"
ScoreRow = Mapping[str, Any]


# ---- numbers to text
def is_missing(value: Any) -> bool:
    """Return whether a value is None, not a number or infinite."""
    return value is None or (isinstance(value, float | np.floating) and not math.isfinite(value))


def count_decimals(values: Iterable[Any]) -> int:
    """Return how many decimals show about three significant digits of the largest of `values`.

    Examples
    --------
    >>> count_decimals([0.787, 0.655]), count_decimals([0.0385]), count_decimals([101.5])
    (3, 4, 1)
    """
    sizes = [abs(float(value)) for value in values if not is_missing(value)]
    top = max(sizes, default=0.0)
    if top == 0 or top >= 1000:
        return 2 if top == 0 else 0
    if 0.1 <= top <= 1:  # shares and correlations keep three decimals, the perfect 1 included
        return 3
    return min(6, max(1, 2 - math.floor(math.log10(top))))  # three significant digits of the largest


def format_number(value: Any, decimals: int | None = None) -> str:
    """Return a number as text with sensible digits; a dash if it is missing.

    Parameters
    ----------
    value
        A number, None or NaN. Integers get thousands separators; anything else than a number is returned as
        text.
    decimals
        Decimals of a float; by default three significant digits without trailing zeros beyond the second
        decimal.

    Examples
    --------
    >>> format_number(0.787123), format_number(0.1), format_number(0.005), format_number(3092)
    ('0.787', '0.10', '0.005', '3,092')
    >>> format_number(float("nan"))
    '–'
    """
    if is_missing(value):
        return DASH
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{int(value):,}"
    if not isinstance(value, float | np.floating):
        return str(value)
    if decimals is not None:
        return _fix_minus(f"{float(value):,.{decimals}f}")
    if 0 < abs(float(value)) < 1e-4:
        return _fix_minus(f"{float(value):.1e}")
    shown = count_decimals([value])
    text = f"{float(value):,.{shown}f}"
    whole, _, fraction = text.partition(".")
    fraction = fraction.rstrip("0") if len(fraction) > 2 else fraction
    return _fix_minus(f"{whole}.{fraction.ljust(min(2, shown), '0')}" if shown else whole)


def _fix_minus(text: str) -> str:
    # A rounded -0.00 is no negative number, and a minus sign is longer than a hyphen.
    negative = text.startswith("-") and any(digit in text for digit in "123456789")
    return f"−{text[1:]}" if negative else text.removeprefix("-")


# ---- names to words
@dataclass(frozen=True)
class MetricNote:
    """What a metric is called and means.

    Parameters
    ----------
    label
        Short name in words.
    meaning
        One sentence for somebody who sees the metric for the first time.
    direction
        1 if higher is better, -1 if lower is better, 0 if unknown.
    """

    label: str
    meaning: str = ""
    direction: Literal[1, -1, 0] = 0


def describe_metric(metric: str, notes: Mapping[str, MetricNote] | None = None) -> MetricNote:
    """Return the words for a metric name; what follows ``@`` (its protocol) is part of the label.

    Parameters
    ----------
    metric
        Name as it is in a score row, for example ``pixcorr`` or ``ssim@28``.
    notes
        Words that take precedence, by full metric name or by the part before ``@``.

    Examples
    --------
    >>> describe_metric("mse@28").direction, describe_metric("top5").label
    (-1, 'Top-5 accuracy')
    >>> describe_metric("best_of_3_mse").label
    'Best of 3 draws: Mean squared error'
    """
    found = find_metric(metric)
    mine = next((notes[key] for key in (metric, found.name) if key in notes), None) if notes else None
    if mine is not None:
        own = Metric(found.name, mine.label, mine.meaning, mine.direction)
        found = found._replace(metric=own)
    elif found.protocol and found.protocol not in found.label:
        return MetricNote(f"{found.label} ({found.protocol})", found.meaning, found.metric.direction)
    return MetricNote(found.label, found.meaning, found.metric.direction)


_CONTROL_WORDS: tuple[tuple[str, str], ...] = (
    (r"^decoded|^reconstruct", "Made from the brain response: the system that is tested."),
    (r"^seen", "The image on the screen."),
    (
        r"nearest",
        "The training image closest to the decoded vector: the result of only copying training images.",
    ),
    (r"^high.?level", "Made from the predicted embedding alone, without the low-level branch."),
    (r"^fused", "The semantic and the low-level branch combined."),
    (
        r"mean.?embedding",
        "Made by the generator from the mean training embedding: its image without a brain response.",
    ),
    (
        r"class.?mean",
        "The average training image of the decoded class: a finer reconstruction must be better than this.",
    ),
    (
        r"mean",
        "The same average image for every trial, without the brain response: the lowest level of "
        "image metrics.",
    ),
    (
        r"shuffl|permut",
        "Brain responses assigned to the wrong images: any score above this comes from the brain.",
    ),
    (
        r"oracle",
        "Made from the true embedding instead of the decoded one: the best result of the image generator.",
    ),
    (
        r"^design",
        "Predicted from order, run, duration and subject only: what the design of the experiment "
        "predicts without a brain.",
    ),
    (r"low.?level", "Layout and colour only, without the semantic stage."),
    (r"random|chance", "A guess that ignores the brain."),
)


def describe_method(name: str) -> str:
    """Return one sentence on a control or gallery row with a well-known name, otherwise an empty text."""
    for pattern, words in _CONTROL_WORDS:  # the first that fits: "class_mean" before "mean"
        if re.search(pattern, name.lower()):
            return words
    return ""


def name_rival(method: str) -> str:
    """Return a control as a sentence names it.

    Examples
    --------
    >>> name_rival("nearest"), name_rival("mean_image")
    ('the nearest image', 'the mean image')
    """
    names = {"nearest": "the nearest image", "shuffled": "shuffled responses"}
    return names.get(method, f"the {method.replace('_', ' ')}")


#: Encoders and networks whose name is not their kind with spaces.
_NAMES: Mapping[str, str] = {
    "atm_s": "ATM-S", "atm_e": "ATM-E", "tsconv": "TSConv", "eegproject": "EEGProject", "eegnet": "EEGNet",
    "simpleconv_image": "SimpleConv (image)", "residual_mlp": "residual MLP", "lda": "LDA",
    "logistic": "logistic regression", "latent_decoder": "latent decoder", "shared_space": "shared space",
    "parcels": "parcel transformer", "pls": "PLS", "labram": "LaBraM", "cbramod": "CBraMod",
    "eegpt": "EEGPT", "bendr": "BENDR", "reve": "REVE", "linear_gaussian": "linear Gaussian model",
    "in_context": "in-context decoder",
}  # fmt: skip


def describe_encoder(encoder: Mapping[str, Any], fitted: Mapping[str, Any] | None = None) -> str:
    """Return what decoded a run in words: the network with its epochs, or the regression with its penalty.

    Parameters
    ----------
    encoder
        Settings as they are in ``config.yaml``.
    fitted
        What was chosen in training, where that is known: `alpha`, or the numbers of the candidates that were `chosen`,
        one of each fold.

    Examples
    --------
    >>> describe_encoder({"kind": "network", "network": {"kind": "atm_s"}, "epochs": 40})
    'ATM-S, 40 epochs'
    >>> describe_encoder({"kind": "network", "network": {"kind": "tsconv"}, "objectives": [{"kind": "mmd"}]})
    'TSConv, objective mmd'
    >>> describe_encoder({"kind": "ridge", "alphas": [1.0, 1000.0]}, {"alpha": 1000.0})
    'ridge, penalty 1,000'
    >>> describe_encoder({"kind": "logistic", "c": [0.01]})
    'logistic regression, C 0.01'
    >>> members = [{"kind": "linear_gaussian"}, {"kind": "network", "network": {"kind": "eegproject"}, "epochs": 20}]
    >>> describe_encoder({"kind": "average", "members": members, "for_generator": 0})
    'mean of linear Gaussian model and EEGProject (20 epochs); images use the linear Gaussian model only'
    >>> describe_encoder({"kind": "auto", "candidates": [{"kind": "lda"}, {"kind": "ridge"}]}, {"chosen": [1, 1]})
    'ridge; chosen among 2 encoders by inner folds'
    """
    kind = str(encoder.get("kind", ""))
    network = encoder.get("network")
    if isinstance(network, Mapping):
        name = str(network.get("model") or network.get("kind", ""))
        epochs = encoder.get("epochs")
        facts = [f"{epochs} epochs" if epochs else "", describe_objectives(encoder)]
        return ", ".join([_NAMES.get(name, name.replace("_", " ")), *filter(None, facts)])
    candidates = encoder.get("candidates")
    if isinstance(candidates, list) and all(isinstance(one, Mapping) for one in candidates):
        return _name_chosen(list(map(describe_encoder, candidates)), (fitted or {}).get("chosen"))
    members = encoder.get("members")
    if isinstance(members, list) and all(isinstance(member, Mapping) for member in members):
        # A penalty or a number of epochs belongs to one member, so it stands in brackets behind it.
        split = [describe_encoder(member).partition(", ") for member in members]
        listed = " and ".join(f"{name} ({facts})" if facts else name for name, _, facts in split)
        asked = encoder.get("for_generator")
        only = (
            f"; images use the {split[asked][0]} only"
            if isinstance(asked, int) and asked < len(split)
            else ""
        )
        return f"{'mean' if kind == 'average' else kind} of {listed}{only}"
    words = _NAMES.get(kind.rsplit(":", 1)[-1], kind.rsplit(":", 1)[-1].replace("_", " "))
    alphas, inverse = (_list_numbers(encoder.get(key)) for key in ("alphas", "c"))
    chosen = (fitted or {}).get("alpha")
    if isinstance(chosen, int | float):
        return f"{words}, penalty {float(f'{chosen:.3g}'):,g}"
    if alphas:
        return f"{words}, penalty " + (
            f"{alphas[0]:,g}" if len(alphas) == 1 else f"chosen among {len(alphas)}"
        )
    if inverse:
        return f"{words}, C " + (f"{inverse[0]:g}" if len(inverse) == 1 else f"chosen among {len(inverse)}")
    return words


def _name_chosen(named: Sequence[str], chosen: Sequence[int] | None) -> str:
    """Return which of several encoders decoded, and in how many folds where folds differ; all of them if unknown."""
    if not isinstance(chosen, list):
        return f"one of {len(named)} encoders, chosen by inner folds ({'; '.join(named)})"
    counts = Counter(chosen)
    if len(counts) == 1:
        found = named[chosen[0]]
    else:
        found = "; ".join(f"{named[one]} in {n} of {len(chosen)} folds" for one, n in sorted(counts.items()))
    return f"{found}; chosen among {len(named)} encoders by inner folds"


def describe_objectives(encoder: Mapping[str, Any]) -> str:
    """Return the kinds and weights of what an encoder was trained on; empty for the one contrast of CLIP and none.

    A weight of 1 is not written, nor a phase that is the whole training.

    Parameters
    ----------
    encoder
        Settings as they are in ``config.yaml``.

    Examples
    --------
    >>> describe_objectives({"objectives": [{"kind": "clip"}, {"kind": "mse", "weight": 9.0}]})
    'objectives clip + 9 mse'
    >>> describe_objectives({"objectives": [{"kind": "bimixco", "phase": [0.0, 0.33]}]})
    'objective bimixco (0 to 33 %)'
    >>> describe_objectives({"objectives": [{"kind": "clip"}]})
    ''
    """
    members = encoder.get("members")
    if isinstance(members, list):
        found = [describe_objectives(member) for member in members if isinstance(member, Mapping)]
        return " and ".join(dict.fromkeys(filter(None, found)))
    objectives = encoder.get("objectives")
    if not isinstance(objectives, list | tuple) or not all(isinstance(one, Mapping) for one in objectives):
        return ""
    if [one.get("kind") for one in objectives] in ([], ["clip"]):
        return ""
    named = " + ".join(map(_describe_objective, objectives))
    return f"objective{'s' if len(objectives) > 1 else ''} {named}"


def _describe_objective(objective: Mapping[str, Any]) -> str:
    kind, weight, end = str(objective.get("kind", "")), objective.get("weight"), objective.get("weight_end")
    weights = [f"{value:g}" for value in (weight, end) if isinstance(value, int | float)]
    # A file that was written by hand leaves out what is the default.
    words = "" if weights in ([], ["1"]) else " to ".join(weights) + " "
    phase = _list_numbers(objective.get("phase"))
    whole = len(phase) != 2 or (phase[0] <= 0 and phase[1] >= 1)
    return f"{words}{kind}" + ("" if whole else f" ({100 * phase[0]:g} to {100 * phase[1]:g} %)")


def _list_numbers(values: Any) -> list[int | float]:
    """Return a list of numbers of a file; an empty one where it holds anything else."""
    right = isinstance(values, list) and all(isinstance(value, int | float) for value in values)
    return values if right else []


def write_within_sentence(label: str) -> str:
    """Return a label with a small first letter, unless it starts with an abbreviation.

    Examples
    --------
    >>> write_within_sentence("Pixel correlation"), write_within_sentence("SSIM")
    ('pixel correlation', 'SSIM')
    """
    return label if label[1:2].isupper() else label[:1].lower() + label[1:]


def sort_methods(rows: Sequence[ScoreRow]) -> list[ScoreRow]:
    """Return score rows with the decoded system first and the controls after, each in their given order."""
    return sorted(rows, key=lambda row: row.get("method") != DECODED)
