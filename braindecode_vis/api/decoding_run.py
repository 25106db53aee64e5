"""`decode`: from data to a run with scores, images and a report; `open_run`: the same object from a run folder.

Makes a configuration from a few arguments, and gives access to a finished run. The stages of
`braindecode_vis.pipeline` compute every number and write it into the run folder.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from braindecode_vis.api.own import GENERATORS, Data, as_component, read_encoder
from braindecode_vis.api.score_frame import ScoreFrame
from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.checks import (
    ConfigError,
    DataError,
    LeakWarning,
    NoResultError,
    check_option,
    for_python,
    say_in_python,
)
from braindecode_vis.base.consent import find_code, give_consent
from braindecode_vis.base.digests import hash_anew
from braindecode_vis.base.parts import ask_part
from braindecode_vis.base.registry import validate_component
from braindecode_vis.base.stimuli import ImageRows, StimulusSet
from braindecode_vis.config import RunConfig, read_config
from braindecode_vis.config.source import validate_config
from braindecode_vis.datasets.array_folder import unpack_epochs
from braindecode_vis.datasets.own_data import choose_split, make_new_trials
from braindecode_vis.datasets.trial_values import check_trials
from braindecode_vis.pipeline import decoding, reporting, scoring
from braindecode_vis.pipeline.finished_run import read_every_file
from braindecode_vis.pipeline.hints import list_hints
from braindecode_vis.pipeline.preparing import preprocess
from braindecode_vis.pipeline.progress import find_listener
from braindecode_vis.pipeline.runs import ProgressListener, Run, check_run_folder, list_changes, read_earlier
from braindecode_vis.pipeline.runs import open_run as open_run_folder
from braindecode_vis.pipeline.summary import describe_choice
from braindecode_vis.report import notebook
from braindecode_vis.scoring.score_row import describe_resampled, format_p_value

if TYPE_CHECKING:
    import mne
    import xarray as xr
    from torch import nn

    from braindecode_vis.pipeline.predicting import RunPredictions
    from braindecode_vis.scoring.crossed import Population


@for_python
class DecodingRun:
    """A finished run: scores, predictions, images, report.

    Made by `decode` and `open_run`, not by hand. A result that is missing is computed when it is first used, and kept
    in the run folder.
    """

    def __init__(self, run: Run) -> None:
        self._run = run

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self._run.folder.path

    @property
    def config(self) -> RunConfig:
        """Every setting of the run."""
        return self._run.config

    @property
    def decodes_categories(self) -> bool:
        """Whether the run names classes instead of finding images."""
        return self._run.config.decodes_categories

    @cached_property
    def scores(self) -> pd.DataFrame:
        """One row per metric and method: value, interval, chance, n, p, protocol, seed."""
        return ScoreFrame(scoring.evaluate(self._run))

    @property
    def hints(self) -> list[str]:
        """Hints about settings that probably cost much, and explanations of scores; the scores remain valid."""
        return [say_in_python(text) for text in list_hints(self._run)]

    @cached_property
    def leaks(self) -> tuple[str, ...]:
        """Leaks found by the checks at the end of the run, which invalidate scores; `audit` makes all checks."""
        found = reporting.check_leaks(self._run)
        if found is None:
            return ()
        return tuple(f"{item.message} {item.where}".strip() for item in found.leaks)

    @cached_property
    def predictions(self) -> Embeddings:
        """Predicted embeddings of the test trials of all folds, with the stimulus id of each row.

        Raises
        ------
        ConfigError
            If the run decodes categories, or its folds have different spaces.
        """
        self._require_images("predictions", "items")
        # Folds test different trials, so that their predictions are joined and not averaged.
        folds = [fold.predicted for fold in decoding.retrieve(self._run).folds]
        spaces = {part.space for part in folds}
        if len(spaces) > 1:
            raise ConfigError(
                f"the target {self.config.target.kind} has a different space in every fold, so their "
                "predictions do not form one array; use predictions_of_fold(number)."
            )
        vectors = np.concatenate([np.asarray(part.vectors) for part in folds])
        return Embeddings(vectors, np.concatenate([part.ids for part in folds]), folds[0].space)

    def predictions_of_fold(self, number: int) -> Embeddings:
        """Return the predicted embeddings of the test trials of one fold.

        Parameters
        ----------
        number
            From 0.
        """
        folds = decoding.retrieve(self._run).folds
        if isinstance(number, bool) or not isinstance(number, int | np.integer):
            raise ConfigError(f"the fold is {number!r}, but must be a number from 0 to {len(folds) - 1}.")
        if not 0 <= number < len(folds):
            raise ConfigError(f"the run has the folds 0 to {len(folds) - 1}, not {number}.")
        return folds[number].predicted

    @cached_property
    def ranks(self) -> pd.DataFrame:
        """One row per test trial: rank of the true image, size of the gallery, similarity, the best ids."""
        self._require_images("ranks", "items")
        return pd.read_parquet(decoding.retrieve(self._run).artifact.path / "ranks.parquet")

    @cached_property
    def items(self) -> pd.DataFrame:
        """One row per test item with its scores, for your own statistics."""
        # Items are left behind by the scores.
        scoring.evaluate(self._run)
        return self._run.seen["items"]

    @cached_property
    def reconstructions(self) -> dict[str, ImageRows]:
        """Images by method, of shape (n_items, height, width, 3): ``seen``, ``decoded``, then the controls.

        Seen images have their own size, the others the size of the generator. They are indexed like arrays and read
        one by one; ``numpy.asarray`` reads all images of a method into memory. With several draws their shape is
        (n_items, n_draws, height, width, 3).
        """
        self._require_images("reconstructions", "items")
        made = decoding.reconstruct(self._run)
        return {"seen": made.seen, **made.images}

    @property
    def captions(self) -> pd.DataFrame:
        """Decoded captions of the rows of `items`: columns trial, source, draw (from 0) and caption.

        Sources are the run's caption decoders (``reconstruction.captions``) and the captions that are scored beside
        them (``evaluation.captions``); ``seen`` is the reference. The table is empty if the run decodes no captions.
        """
        from braindecode_vis.pipeline.predicting import list_captions
        from braindecode_vis.scoring.caption_scores import DECODERS

        self._require_images("captions", "items")
        decoded = decoding.reconstruct(self._run).captions.get("decoded", {})
        found: dict[str, Any] = {DECODERS[kind]: rows for kind, rows in decoded.items()}
        if self._run.config.evaluation.captions is not None:
            scoring.evaluate(self._run)
            sources = self._run.seen.get("caption_sources") or {}
            sources = {**sources, "seen": (self._run.seen.get("captions") or {}).get("seen", [])}
            found |= {
                name: [[text] for text in texts] for name, texts in sources.items() if name not in found
            }
        return list_captions(found)

    def gallery(self, **options: Any) -> Any:
        """Return a matplotlib figure of seen and decoded images: the best, median and worst by score.

        Parameters
        ----------
        **options
            As for `plot_gallery`.
        """
        from braindecode_vis.api.plotting import plot_gallery

        return plot_gallery(self, **options)

    def report(self) -> Path:
        """Write the self-contained page of the run, if it is missing, and return its path."""
        return reporting.report(self._run)

    def audit(self, *, refit: bool = False) -> pd.DataFrame:
        """Return what an audit of the run folder finds: check, level and words, one row per finding.

        Parameters
        ----------
        refit
            Also preprocess the recordings and fit every fold again, on poisoned test trials; it takes about as long as
            the run did.

        Returns
        -------
        DataFrame
            ``attrs["verified"]`` says how chain, data, fit, choice, prediction, material and score were verified.
        """
        audit_run = ask_part("audit_run")
        # What is audited must be finished.
        self.report()
        found = audit_run(self.folder, refit=refit).as_json()
        table = pd.DataFrame(found["findings"])
        table.attrs["verified"] = found["verified"]
        return table

    def encode(self, settings: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Predict this run's responses from images, on its own split; maps and files are written into its folder.

        Parameters
        ----------
        settings
            As in the section ``encode`` of a configuration, for example ``{"model": {"combine": "banded"}}``; by
            default the settings of the run.

        Returns
        -------
        DataFrame
            One row per subject and response (voxel, parcel, or channel and time): correlation on test images with
            interval, p, q, explained variance, noise ceiling and normalised value. ``attrs`` hold ``summary``,
            ``scores`` (rows by network or region) and ``files``.

        Raises
        ------
        ConfigError, DataError
            If the run decodes categories, or a subject has too few test images.
        """
        encode, run = ask_part("encode_responses"), self._run
        if settings is not None:
            asked = validate_component("analysis", {"kind": "encoding", **settings})
            run = replace(run, config=run.config.model_copy(update={"encode": asked}))
        found = encode(run)
        table = ScoreFrame(found["table"])
        table.attrs.update({name: found[name] for name in ("summary", "scores", "files")})
        return table

    def synthesise(
        self, images: str | Path, out: str | Path, *, noise: str = "residual", fold: int | None = None
    ) -> Responses:
        """Write the responses that an encoding model predicts for images that were not shown, and return the trials.

        Parameters
        ----------
        images
            A folder of pictures, tars, tables or HDF5 files, ``phantom:N``, a bank of embeddings, or ``unseen`` for the
            data set's own.
        out
            A folder that does not exist.
        noise
            ``residual`` adds noise with the covariance of the model's residuals on the training trials; ``none`` adds
            nothing.
        fold
            The model is fitted on the training trials of this fold; may be left out if there is only one.
        """
        from braindecode_vis.pipeline.synthetic import read_synthetic, synthesise_into

        folder, _ = synthesise_into(self._run, str(images), Path(out), noise=noise, fold=fold)
        return read_synthetic(folder)[0]

    def compare(
        self,
        *others: DecodingRun | str | Path,
        population: Population | None = None,
    ) -> pd.DataFrame:
        """Return paired differences of other runs to this one on the same test items, with corrected p-values.

        Parameters
        ----------
        *others
            Runs or run folders.
        population
            What the differences generalise to if there are several subjects: ``both`` (other subjects and other
            images; the default from three subjects on), ``images`` (other images, these subjects) or ``subjects``
            (other subjects, these images).
        """
        compare_runs = ask_part("compare_runs")
        folders = [run.folder if isinstance(run, DecodingRun) else Path(run) for run in others]
        # Comparisons read files; runs that are only open in memory have theirs written now.
        for run in (self, *(other for other in others if isinstance(other, DecodingRun))):
            scoring.evaluate(run._run)
        return ScoreFrame(compare_runs([self.folder, *folders], population=population))

    def to_xarray(self, what: str = "predictions", *, fold: int | None = None) -> xr.Dataset:
        """Return responses, predictions or scores as a data set of xarray.

        Parameters
        ----------
        what
            ``responses``, ``predictions`` or ``scores``.
        fold
            Predictions of this fold only; needed if every fold has a different space.
        """
        from braindecode_vis.api import exports

        check_option("what", what, ("responses", "predictions", "scores"))
        if what == "responses":
            responses = preprocess(exports.read_only(self._run)).responses
            return exports.responses_to_xarray(responses, exports.describe_data(self._run))
        if what == "scores":
            return exports.scores_to_xarray(self._run)
        return exports.predictions_to_xarray(self._run, fold)

    def to_epochs(self) -> mne.EpochsArray:
        """Return the preprocessed trials of channels and times as MNE epochs."""
        from braindecode_vis.api import exports

        responses = preprocess(exports.read_only(self._run)).responses
        return exports.responses_to_epochs(responses, exports.describe_data(self._run))

    def to_nifti(self, subject: str | None = None) -> Any:
        """Return the preprocessed trials of voxels as a NIfTI image, one volume per trial.

        Parameters
        ----------
        subject
            Subject of the trials; needed if every subject has a different mask.
        """
        from braindecode_vis.api import exports

        return exports.responses_to_nifti(preprocess(exports.read_only(self._run)).responses, subject)

    def export(
        self, what: str, to: str, out: str | Path, *, fold: int | None = None, subject: str | None = None
    ) -> Path:
        """Write a result of the run for other tools, and return the path; nothing is computed.

        Parameters
        ----------
        what
            ``responses``, ``predictions``, ``scores``, ``images``, ``encoder`` or ``submission``.
        to
            ``netcdf``, ``zarr``, ``bids``, ``csv``, ``parquet``; of responses also ``fif`` and ``nifti``; of images
            ``png``, see `braindecode_vis.api.plotting.export_images`; of the encoder ``safetensors``, ``torch-export``,
            ``onnx`` or ``huggingface``, see `Decoder.export`; a submission to ``challenge``, see
            `braindecode_vis.api.submission`, or ``basic``, see `braindecode_vis.api.plotting.export_for_basic`.
        out
            A file or folder that does not exist yet.
        fold
            Predictions or encoder of this fold only; needed for an encoder or submission if there are several folds.
        subject
            Responses of this subject only.

        Raises
        ------
        ConfigError, DataError
            If the run is unfinished or has no such result, the format is unknown, or the path exists.
        """
        from braindecode_vis.api import exports

        if what == "encoder" or to == "challenge":
            from braindecode_vis.api.decoder import Decoder
            from braindecode_vis.api.fold_decoder import export_fold

            return export_fold(Decoder, self._run, what, to, out, fold=fold, subject=subject)
        if what == "images" or to == "basic":
            from braindecode_vis.api.plotting import export_for_basic, export_images

            exports.check_request(what, to)
            if fold is not None or subject is not None:
                raise ConfigError("images are exported of the whole run; leave fold and subject out.")
            write = export_for_basic if to == "basic" else export_images
            return write(DecodingRun(exports.read_only(self._run)), out)
        return exports.export_run(self._run, what, to, out, fold=fold, subject=subject)

    def predict(
        self,
        X: Any,
        *,
        context: Any = None,
        gallery: Any = None,
        fold: int | None = None,
        out: str | Path | None = None,
        k: int = 5,
        subject: Any = None,
        session: Any = None,
        shown: Sequence[Any] | np.ndarray | None = None,
        split: str | None = None,
        prepared: bool | None = None,
        whiten_new: bool = False,
        limit: int | None = None,
    ) -> RunPredictions:
        """Apply the run to new trials; nothing is fitted on them, and the shown pictures need not be known.

        Parameters
        ----------
        X : array of shape (n_trials, ...), Responses, mne.Epochs, Data or path
            New trials with the axes of the run; a DataFrame of numbers or a tensor counts as an array. `Data` of a
            known data set (see `load`) is preprocessed with the fitted statistics of the run. A path is a folder of
            arrays, a file of trials, or another root of the run's data set.
        context
            Trials of the same subjects whose pictures are known, in any of these forms, usually `Data` with pictures.
            The encoder first learns from these pairs; `in_context` only reads them, and needs them of a new subject.
            With ``split="test"`` those that the data declare as ``train``.
        gallery
            Pictures to search, as in `from_arrays`, from any source; or `Embeddings` of the run's
            target; or the path of a CSV file of captions or attributes, for a gallery without pictures. By default the
            pictures that the trials showed, if they are known, or else those that the run was tested with.
        fold
            The fold whose encoder predicts. By default the only one, or the mean of all folds if they share one space.
        out
            Folder for predictions, tables, images and a page. The same predictions there are replaced; a folder with
            anything else is refused.
        k
            Number of pictures to list for each trial.
        subject, session : scalar or sequence of length n_trials, optional
            Where the trials of an array or of Epochs come from: whitening is done per session, and networks may use
            the subject.
        shown : sequence of length n_trials, optional
            Id of the picture of each trial of an array or of Epochs, or its class for a run that decodes categories;
            equal ids are repetitions, which are averaged if the run averages those of its test trials. A warning says
            if none of them is known.
        split
            ``test`` or ``train``: use only the trials that the data declare so.
        prepared
            Whether the arrays are whitened and scaled already as in the run; needed for a run that whitens, unless the
            unit of the trials shows it.
        whiten_new
            Learn whitening and scaling from the new trials themselves: another, transductive protocol. With `split`,
            from those that the data declare as ``train``, which is not transductive for ``test``.
        limit
            Predict this many trials at most, the first ones, as they are predicted and ranked among all.

        Returns
        -------
        RunPredictions
            With `embeddings`, `retrieved`, `ranks`, `scores`, `reconstructions`, `captions` (or `classes`),
            `gallery()`, `report()` and `save()`.

        Raises
        ------
        ConfigError, DataError
            If the run is unfinished, the trials have other axes than the run, or the gallery is of another space.
        """
        from braindecode_vis.pipeline import prediction_files
        from braindecode_vis.pipeline.finished_run import open_finished
        from braindecode_vis.pipeline.predicting import predict

        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise ConfigError(f"k is {k!r}, but must be a whole number of pictures, 1 or more.")
        if not isinstance(prepared, bool | None):
            raise ConfigError(f"prepared is {prepared!r}, but must be True, False or None.")
        if out is not None:
            prediction_files.check_out(Path(out))
        # Read-only: a prediction must never compute a stage of the run anew.
        run = open_finished(self.folder, self._run.listener)
        ways: dict[str, Any] = {"whiten_new": whiten_new, "part": split}
        columns = {"subject": subject, "session": session, "stimulus_id": shown}
        with tempfile.TemporaryDirectory(prefix="braindecode-vis-") as work:
            new = _read_trials(run, X, Path(work), columns, prepared, ways)
            given = None
            if context is not None:
                ways["part"] = "train" if split == "test" else None
                columns["stimulus_id"] = None
                given = _read_trials(run, context, Path(work) / "context", columns, prepared, ways)
            found = predict(run, new, gallery=gallery, fold=fold, n_top=int(k), limit=limit, context=given)
        # Warned of only where something was stated: without `shown` nothing is expected to be known.
        if shown is not None and (unknown := found.describe_unknown()):
            warnings.warn(unknown, UserWarning, stacklevel=3)
        found.notes = tuple(say_in_python(note) for note in found.notes)
        if out is not None:
            found.save(out)
        return found

    def live(
        self,
        stream: Any,
        *,
        source: str = "lsl",
        source_options: Mapping[str, Any] | None = None,
        listeners: Sequence[Any] = (),
        duration: float | None = None,
        decisions: int | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Decode a stream while it runs, and return a summary.

        Parameters
        ----------
        stream
            A `braindecode_vis.parts.live.stream_roles.StreamSource` (`connect`, `read` and `close`), or the name of a
            stream; `source` gives its kind: ``lsl``, ``fieldtrip``, ``replay`` or ``phantom``.
        source_options
            Settings of a source given by name, for example ``{"markers": "triggers"}``.
        listeners
            See `braindecode_vis.parts.live.stream_roles.Listener`; each gets every decision as soon as it is made.
        duration, decisions
            End after this many seconds or decisions. Ctrl-C ends the session too.
        **options
            Gallery, channels, windows and the like, as for
            `braindecode_vis.parts.live.stream_decoder.RunStreamDecoder`.

        Returns
        -------
        summary
            Number of decisions, number of lost ones by reason, latencies in ms, and, if the shown pictures are known,
            top-1 and top-5 with chance and interval.

        Raises
        ------
        ConfigError, DataError
            If the run is unfinished, or if the stream does not exist, misses channels or has another rate or unit.
        """
        summary: dict[str, Any] = ask_part("open_session")(
            self.folder, stream, source=source, source_options=source_options, listeners=listeners, duration=duration,
            decisions=decisions, **options,
        ).run()  # fmt: skip
        return summary

    def _require_images(self, name: str, instead: str) -> None:
        if self.decodes_categories:
            raise NoResultError(
                f"the run decodes categories and has no {name}; see {instead}, which holds the class of each trial."
            )

    def _repr_html_(self) -> str:
        """Show in a notebook what `print` says, and the first decoded pictures."""
        rows, shown = self._pick_decoded()
        return "".join(
            [
                notebook.show_sentences(self.leaks, label="LEAK", strong=True),
                notebook.show_sentences(list(filter(None, [describe_choice(self._run)])), label="encoder"),
                notebook.show_table(shown, formatters={"p_value": format_p_value}),
                notebook.show_sentences(list(filter(None, [describe_resampled(rows.to_dict("records"))]))),
                self._show_decoded(),
                notebook.show_sentences(self.hints, label="hint"),
                notebook.show_sentences([str(self.folder)], label="folder"),
            ]
        )

    def _show_decoded(self) -> str:
        if self.decodes_categories or not preprocess(self._run).stimuli.has_pixels:
            return ""
        made, items = self.reconstructions, self.items
        n = min(notebook.N_PICTURES, len(made["seen"]))
        pictures = {kind: notebook.take_pictures(made[kind], n) for kind in ("seen", "decoded")}
        names = items["stimulus_id"].astype(str).tolist()[:n]
        return notebook.show_pictures(
            names, pictures, f"The first {n} of {len(made['seen'])} test items, in their order."
        )

    def __str__(self) -> str:
        """Return the scores of the decoded system as a table that fits a terminal: leaks first, hints last."""
        rows, shown = self._pick_decoded()
        leaks = [f"LEAK: {leak}" for leak in self.leaks]
        hints = [f"hint: {hint}" for hint in self.hints]
        table = shown.to_string(
            index=False, float_format="{:.3f}".format, formatters={"p_value": format_p_value}
        )
        words = describe_resampled(rows.to_dict("records"))
        choice = [f"encoder: {text}" for text in [describe_choice(self._run)] if text]
        return "\n".join([*leaks, *choice, table, *filter(None, [words]), *hints, f"folder: {self.folder}"])

    def _pick_decoded(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        rows = self.scores[self.scores["method"] == "decoded"]
        columns = ["metric", "value", "ci_low", "ci_high", "chance", "p_value", "n_queries"]
        several = rows["subject"].nunique() > 1
        return rows, rows[["subject", *columns] if several else columns]

    def __repr__(self) -> str:
        return f"<DecodingRun {self.config.name!r} in {self.folder}>"


@for_python
def decode(
    data: Data,
    *,
    target: str | Mapping[str, Any] = "pixels",
    encoder: str | Mapping[str, Any] | nn.Module | None = None,
    split: str | int | Mapping[str, Any] | None = None,
    context: int | None = None,
    prior: str | Mapping[str, Any] | None = None,
    generator: str | Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    name: str | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    listener: ProgressListener | None = None,
    verify: bool = False,
    verbose: bool = True,
) -> DecodingRun:
    """Fit and test a decoder with one of the honest splits, and return the run.

    Parameters
    ----------
    data
        From `from_arrays`, `from_epochs`, `from_nifti` or `load`.
    target
        Image embedding to predict: ``pixels``, ``pca``, ``efficientnet-lite0``, ...; a mapping gives settings.
        Decoders of classes have none.
    encoder
        ``ridge``, a network such as ``atm_s``, ``auto``, which tries several within a time budget, or for classes
        ``lda`` and ``logistic``; a mapping gives settings. By default ridge, or lda for classes. A torch module that
        maps (trials, channels, samples) to (trials, width) is trained like our own networks:
        ``encoder=MyNet(width=64)``, or ``encoder={"kind": "network", "network": MyNet(width=64), "epochs": 20}``. The
        run keeps its class and arguments and draws new weights in every fold; a linear layer leads from its width to
        the target. Each argument of ``__init__`` must be kept in an attribute of the same name, and to open the run in
        another process, the class must be importable.
    split
        ``published`` (the split that the data declare), ``kfold`` or a number of folds, ``leave-one-image-out``,
        ``leave-one-run-out``, ``leave-one-group-out``, ``leave-one-subject-out``, ...; a mapping gives settings. By
        default the split that the data declare, or else ten folds of images; for classes, leave one run or group out
        if the data have them, or else folds.
    context
        Decode each subject as a new one, from this many of its training trials and those of the other subjects:
        ``split={"kind": "leave_one_subject_out", "own_trials": context}``, with the encoder ``in_context`` by default.
    prior, generator
        As in the configuration; by default no prior, and a generator that works with the target.
    out
        The run folder: new, empty, or the folder of an earlier run with the same data and settings, whose finished
        stages are reused; any other folder is refused. By default a temporary folder, which exists as long as the run
        object.
    name
        Name of the run, in report and tables.
    seed
        Root seed of all random numbers.
    settings
        Further settings by their dotted names, for example ``{"repeats.train": "single"}``.
    listener
        Shows progress in a way of your own.
    verify
        Read every input and artifact again, even if a file looks unchanged.
    verbose
        Show what is computed and how long it still takes, in a notebook or a terminal; False shows nothing. Nothing is
        shown either where the output is a file.

    Returns
    -------
    DecodingRun
        The run with every stage done. A `LeakWarning` is raised if test data reached the training.

    Raises
    ------
    ConfigError, DataError
        If settings or data do not match.

    Examples
    --------
    >>> import numpy as np
    >>> from braindecode_vis import decode, from_arrays
    >>> rng = np.random.default_rng(0)
    >>> pictures = rng.random((60, 4, 4))
    >>> X = pictures.reshape(60, -1) @ rng.normal(size=(16, 40)) + 0.1 * rng.normal(size=(60, 40))
    >>> run = decode(from_arrays(X, images=pictures), split=4)
    >>> bool(run.scores.query("metric == 'top1' and method == 'decoded'").value.item() > 0.3)
    True
    """
    if not isinstance(data, Data):
        raise DataError(
            f"decode takes data made by from_arrays, from_epochs, from_nifti or load, not {type(data).__name__}."
        )
    if settings is not None and not isinstance(settings, Mapping):
        raise ConfigError(
            f'settings is {settings!r}, but must be a mapping such as {{"repeats.train": "single"}}.'
        )
    for role, value in (("target", target), ("prior", prior), ("generator", generator)):
        if not isinstance(value, str | Mapping) and (value is not None or role == "target"):
            raise ConfigError(
                f"{role} is {value!r}, but must be a name or a mapping of settings; describe({role!r}) lists them."
            )
    # Without a folder of its own, the run lives in a temporary one that goes with the object.
    folder = Path(tempfile.mkdtemp(prefix="braindecode-vis-")) if out is None else check_run_folder(Path(out))
    given = re.sub(r"[^A-Za-z0-9_.-]+", "-", folder.name).strip("-._") if out is not None else ""
    content: dict[str, Any] = {"name": name or given or "run", "seed": seed}
    if context is not None:
        if split is not None:
            raise ConfigError("context is a split of its own (leave one subject out); leave split out.")
        if isinstance(context, bool) or not isinstance(context, int | np.integer) or context < 2:
            raise ConfigError(
                f"context is {context!r}, but must be a number of pairs of picture and response, 2 or more: a single "
                "pair says nothing of how a subject responds to other pictures."
            )
        split = {"kind": "leave_one_subject_out", "own_trials": int(context)}
        encoder = encoder or ("in_context" if data.knows_images else None)
    content["encoder"] = read_encoder(encoder, knows_images=data.knows_images)
    content["split"] = _read_split(split, data)
    if not data.knows_images and not _is_category(content["encoder"]):
        raise ConfigError(
            f"the encoder {content['encoder']['kind']!r} predicts pictures, but the data know the class of each trial "
            "only; pass encoder='lda' (or 'logistic', 'network_categories'), or give the data images=... and shown=..."
        )
    if data.knows_images and len(data.stimuli) < 2:
        merged = next((f" ({note.split(':')[0]})" for note in data.notes if "became one" in note), "")
        raise DataError(f"the trials show only one picture{merged}; decoding needs two or more.")
    named = [name for name, value in (("prior", prior), ("generator", generator)) if value is not None]
    if target != "pixels":
        named.insert(0, "target")
    if _is_category(content["encoder"]) and named:
        raise ConfigError(
            f"the encoder {content['encoder']['kind']!r} decodes classes and predicts no picture, so it takes no "
            f"{' and no '.join(named)}; leave {'it' if len(named) == 1 else 'them'} out."
        )
    if not _is_category(content["encoder"]):
        content["target"] = as_component(target)
        kind = content["target"]["kind"]
        content["generator"] = as_component(generator or GENERATORS.get(kind, "nearest"))
        if prior is not None:
            content["prior"] = as_component(prior)
    content["dataset"] = data.as_settings(folder / "data")
    for key, value in (settings or {}).items():
        _set(content, key, value)
    if _is_category(content["encoder"]) and "averaged" in dict(content.get("repeats", {})).values():
        raise ConfigError(
            "categories are decoded trial by trial, but repeats averages the trials of a picture; leave repeats out."
        )
    with give_consent(code=find_code(content)):  # the person wrote it, for this call
        config = validate_config(content, where="decode").take_addresses()
    # Before the data are written, which would overwrite those of the other run.
    _refuse_another_run(folder, config, data)
    run = open_run_folder(config, folder, listener or find_listener(verbose=verbose))
    with hash_anew(verify), run.hold():
        if out is not None:  # another process may have been waited for, which left a run of other data
            _refuse_another_run(folder, config, data)
        data.write_for_run(folder / "data")
        if config.run_analyses:
            ask_part("analyze_in_run")(run)
        reporting.run_all(run)
    decoded = DecodingRun(run)
    if out is None:
        weakref.finalize(decoded, shutil.rmtree, folder, ignore_errors=True)
    if decoded.leaks:
        more = f" (and {len(decoded.leaks) - 1} more)" if len(decoded.leaks) > 1 else ""
        warnings.warn(
            f"test data leaked into training, so the scores are not valid: {decoded.leaks[0]}{more}; see "
            "run.leaks.",
            LeakWarning,
            stacklevel=3,  # above what translates messages
        )
    return decoded


def _refuse_another_run(folder: Path, config: RunConfig, data: Data) -> None:
    """Raise `ConfigError` if the folder holds a run of other settings or data, which would be overwritten."""
    if not (folder / "config.yaml").is_file():
        return  # nothing, or a run that was stopped before its data were read
    earlier = read_earlier(folder)
    if earlier is None:
        raise ConfigError(
            f"{folder} holds a run of another version of this package; choose another out, or delete that folder."
        )
    changes = list_changes(earlier, config)
    if changes:
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        raise ConfigError(
            f"{folder} holds a run with other settings: {', '.join(changes[:3])}{more}; choose another out, or delete "
            "that folder. open_run reads the earlier run."
        )
    if config.dataset.kind == "arrays" and not data.are_in(Path(config.dataset.root)):
        raise ConfigError(
            f"{folder} holds a run of other data; choose another out, or delete that folder. open_run reads the "
            "earlier run."
        )


@for_python
def open_run(
    folder: str | Path,
    *,
    trust_code: str | Sequence[str] = (),
    allow_download: bool = False,
    verify: bool = False,
    verbose: bool = True,
) -> DecodingRun:
    """Open a run folder, made in Python or on the command line.

    Parameters
    ----------
    folder
        Holds ``config.yaml``.
    trust_code
        Modules from outside the package whose code may be imported; not needed for modules that you have imported.
    allow_download
        Allow the download of published weights that the run needs and that are not on this machine.
    verify
        Read every file of the run, and of its data set if it is available, even if a file looks unchanged. Otherwise
        each file is compared with its digest when it is first used.
    verbose
        Show the progress of what this object computes, as in `decode`.

    Raises
    ------
    ConfigError
        If the folder names code that this call does not allow.
    DataError
        If it is not a run folder, or if `verify` finds a file that is not as the run wrote it.
    """
    if not isinstance(folder, str | Path):
        raise DataError(f"open_run takes the folder of a run, not {type(folder).__name__}.")
    path = Path(folder).expanduser().absolute()
    if not (path / "config.yaml").is_file():
        raise DataError(
            f"{path} is not a run folder: it holds no config.yaml; give the folder that run printed."
        )
    with give_consent(code=trust_code, download=allow_download):
        run = open_run_folder(read_config(path), path, find_listener(verbose=verbose), reading=True)
        if verify:
            read_every_file(run)
        return DecodingRun(run)


def _read_trials(
    run: Any, X: Any, work: Path, columns: Mapping[str, Any], prepared: bool | None, ways: dict[str, Any]
) -> Any:
    """Return new trials of any form as the run's encoder takes them."""
    from braindecode_vis.pipeline import new_trials

    if isinstance(X, str | Path):
        return new_trials.read_new(run, Path(X), work, **ways)
    if isinstance(X, Data) and X._settings is not None:
        # What the user said of the new data wins; everything else is read as the run read its own.
        changed = {name: getattr(X._settings, name) for name in X._settings.model_fields_set}
        same = X._settings.kind == run.config.dataset.kind
        dataset = run.config.dataset.model_copy(update=changed) if same else X._settings
        return new_trials.read_dataset_anew(run, dataset, work, **ways)
    responses, stimuli = _take_trials(X, new_trials.find_responses(run), columns)
    return new_trials.prepare_trials(run, responses, stimuli, prepared=prepared, **ways)


def _take_trials(X: Any, own: Responses, columns: Mapping[str, Any]) -> tuple[Responses, StimulusSet | None]:
    """Return trials in memory as `Responses`, and their pictures if they are `Data` with pictures."""
    if isinstance(X, Data):
        return X.responses, X.stimuli
    if isinstance(X, Responses):
        return X, None
    about: dict[str, Any] = {}
    given: dict[str, Any] = {}
    table: pd.DataFrame | None = None
    if type(X).__module__.split(".")[0] == "mne":
        data, given = unpack_epochs(X)
        about = given.pop("about")
        # Names of events mark what was presented in some experiments and blocks in others; only a column is a picture.
        table = given.pop("trials").drop(columns="concept", errors="ignore")
    elif isinstance(X, list | tuple) or hasattr(X, "__array__") or hasattr(X, "tocsr"):
        data = check_trials(X)
        given["dims"] = own.dims if data.ndim == len(own.dims) else None
    else:
        raise DataError(
            f"predict takes an array, Responses, mne.Epochs, Data or a path, not {type(X).__name__}."
        )
    table = pd.DataFrame(index=range(len(data))) if table is None else table
    for name, values in columns.items():
        if values is not None:
            scalar = isinstance(values, str) or np.ndim(values) == 0
            if not scalar and len(values) != len(data):
                asked = "shown" if name == "stimulus_id" else name
                raise DataError(f"{asked} has {len(values)} entries, but X has {len(data)} trials.")
            table = table.assign(**{name: values if scalar else list(values)})
    return make_new_trials(data, table, about=about, **given)


def _is_category(encoder: Mapping[str, Any]) -> bool:
    from braindecode_vis.base import roles
    from braindecode_vis.base.contracts import EncoderSettings
    from braindecode_vis.base.registry import validate_component

    return roles.complete(
        EncoderSettings, validate_component("encoder", dict(encoder), trusted=True)
    ).decodes_categories


def _read_split(split: str | int | Mapping[str, Any] | None, data: Data) -> dict[str, Any]:
    if isinstance(split, Mapping):
        return dict(split)
    if split is not None and not isinstance(split, str | int):
        raise ConfigError(
            f"split is {split!r}, but must be a name such as 'kfold' or 'leave-one-image-out', a number of folds, or a "
            "mapping of settings; the folds of a scikit-learn splitter go into the column split or group of the data."
        )
    if isinstance(split, int):
        return {"kind": "kfold", "n_folds": split}
    if split is not None:
        return {"kind": split.replace("-", "_").replace(" ", "_")}
    return choose_split(data.trials, len(data.stimuli) if data.knows_images else 0)[0]


def _set(content: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    node = content
    for part in parents:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"settings names {key!r}, but {part!r} is the value {node!r}.")
    node[last] = value
