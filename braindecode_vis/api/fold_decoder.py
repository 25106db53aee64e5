"""The fitted encoder of one fold of a finished run as a `Decoder`, and its export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.api.exports import check_fold, check_request, describe_data, read_only, read_score_table
from braindecode_vis.api.model_export import CHECKED_TRIALS, FEWEST_CHECKED, CardFacts, export_decoder
from braindecode_vis.api.submission import write_submission
from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.checks import ConfigError
from braindecode_vis.base.store import read_json
from braindecode_vis.generation.captions import read_decoders
from braindecode_vis.pipeline.learning import needs_predictions, pick_test_trials, predict_out_of_fold, train
from braindecode_vis.pipeline.predicting import find_fits
from braindecode_vis.pipeline.preparing import embed, name_fold, preprocess
from braindecode_vis.pipeline.runs import Run


def export_fold(
    cls: Any,
    run: Run,
    what: str,
    to: str,
    out: str | Path,
    *,
    fold: int | None = None,
    subject: str | None = None,
) -> Path:
    """Write the encoder of a fold; see `DecodingRun.export`. Programs are checked on test trials of the fold."""
    check_request(what, to)
    if subject is not None:
        raise ConfigError(f"a subject can be given for responses, not for {what}.")
    decoder = take_decoder(cls, run, fold)
    if what == "submission":
        meta = read_json(preprocess(run).artifact.path / "responses" / "meta.json")
        return write_submission(decoder, out, meta.get("provenance", {}))
    number = _choose_fold(read_only(run), fold)
    trials = _pick_trials(read_only(run), number)
    if trials.n_trials < FEWEST_CHECKED:  # a fold may test one picture only
        return decoder.export(out, to=to)
    return export_decoder(decoder, to, out, trials.select(np.arange(min(CHECKED_TRIALS, trials.n_trials))))


def take_decoder(cls: Any, run: Run, fold: int | None) -> Any:
    """Return the decoder of a fold of a finished run; see `Decoder.from_run`."""
    run = read_only(run)
    number = _choose_fold(run, fold)
    config, prepared, fitted = run.config, preprocess(run), train(run)[number]
    categories = config.decodes_categories
    split = prepared.split.folds if categories else prepared.folds
    rows = split[number].train
    trials = _pick_trials(run, number)
    dumped = {
        name: getattr(config, name).model_dump(mode="json")
        for name in (("encoder",) if categories else ("encoder", "target", "prior", "generator"))
    }
    if not categories and config.prior.kind == "identity":
        dumped["prior"] = None
    asked = config.reconstruction.captions
    captions = [each.model_dump(mode="json") for each in asked] or None
    decoder = cls(**dumped, seed=config.seed, captions=captions)
    decoder._settings = run.encoder
    decoder._dims, decoder._shape = trials.dims, tuple(int(n) for n in trials.data.shape[1:])
    decoder._coords = {k: v for k, v in trials.coords.items() if k in ("ch_names", "times", "sfreq")}
    decoder._unit, decoder.n_features_in_ = trials.unit, int(np.prod(decoder._shape))
    decoder._subjects = tuple(sorted(set(prepared.responses.trials["subject"].iloc[rows].astype(str))))
    decoder._typical = (float(np.mean(trials.data)), float(np.std(trials.data)))
    decoder._facts, decoder._centre = _collect_facts(run, number, len(rows)), None
    if categories:
        decoder._fitted = fitted.decoder
        decoder.classes_ = np.asarray(fitted.decoder.classes)
        return decoder
    bank = embed(run)[number]
    ids = list(pd.unique(prepared.responses.stimulus_ids[rows]))
    decoder._fitted, decoder._target = fitted.encoder, bank.encoder
    decoder._stimuli, decoder._bank = prepared.stimuli.select(ids), bank.embeddings.select(ids)
    decoder._out_of_fold = predict_out_of_fold(run)[number].predicted if needs_predictions(run) else None
    decoder._captions = {}
    if asked:  # they were fitted with the images
        fits = find_fits(run).path / "fits" / name_fold(number)
        decoder._captions = read_decoders(fits, asked, decoder._collect_material("caption"))
    return decoder


def _choose_fold(run: Run, fold: int | None) -> int:
    numbers = check_fold(run, fold)
    if len(numbers) > 1:
        raise ConfigError(
            f"the run has {len(numbers)} folds with an encoder each; choose one of 0 to {len(numbers) - 1} (--fold 0)."
        )
    return numbers[0]


def _pick_trials(run: Run, number: int) -> Responses:
    """Return the test trials of a fold as its encoder takes them."""
    if run.config.decodes_categories:
        prepared = preprocess(run)
        return prepared.responses.select(prepared.split.folds[number].test)
    return pick_test_trials(run, number)


def _collect_facts(run: Run, number: int, n_trials: int) -> CardFacts:
    about, table = describe_data(run), read_score_table(run)
    rows = table[table["method"] == "decoded"]
    plain = rows.astype(object).where(rows.notna(), None).to_dict("records")
    n_folds = len(preprocess(run).split.folds)
    protocol = " ".join(sorted(set(rows["protocol"])))
    if n_folds > 1:
        protocol = f"Fold {number} of {n_folds}; the scores are those of all folds together. {protocol}"
    note = ""
    if not run.config.decodes_categories and not run.config.selection.is_empty:
        note = "The run selected features: the encoder takes trials with these features only, in this order."
    return CardFacts(
        about.get("title", ""), about.get("modality", ""), about.get("citation", ""), about.get("licence", ""),
        protocol, [{str(k): v for k, v in row.items()} for row in plain], n_trials, note,
    )  # fmt: skip
