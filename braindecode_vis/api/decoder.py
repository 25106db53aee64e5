"""`Decoder`: fit, predict, retrieve, reconstruct and caption as a scikit-learn estimator, without a run folder.

Converts arrays into the input of the encoders, and follows the conventions of estimators. It uses the image encoders,
brain encoders, priors and generators of the pipeline, under the same names.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
from pydantic import ValidationError
from sklearn.base import BaseEstimator
from sklearn.utils import ClassifierTags, column_or_1d
from sklearn.utils.multiclass import check_classification_targets

from braindecode_vis.api import decoder_files
from braindecode_vis.api.exports import write_new
from braindecode_vis.api.model_export import (
    CHECKED_TRIALS,
    CardFacts,
    export_decoder,
    fetch_folder,
    is_repo,
    make_noise,
    push_folder,
    write_folder,
)
from braindecode_vis.api.own import (
    GENERATORS,
    Data,
    as_component,
    from_arrays,
    from_epochs,
    join_epochs,
    merge_pictures,
    read_encoder,
)
from braindecode_vis.base import roles
from braindecode_vis.base.arrays import Embeddings, Responses, find_largest
from braindecode_vis.base.checks import ConfigError, DataError, InputError, for_python
from braindecode_vis.base.consent import find_code, give_consent
from braindecode_vis.base.contracts import (
    NOTHING_LENT,
    BrainEncoder,
    CategoryDecoder,
    Context,
    EncoderSettings,
    GeneratorSettings,
    ImageEncoder,
    ImageEncoderSettings,
    ImageGenerator,
    Prior,
    PriorSettings,
)
from braindecode_vis.base.registry import validate_component
from braindecode_vis.base.seeds import derive_seed
from braindecode_vis.base.settings import describe_validation_error
from braindecode_vis.base.stimuli import StimulusSet, read_image_file
from braindecode_vis.config.models import ReconstructionConfig
from braindecode_vis.datasets.own_data import Pictures, index_pictures, make_new_trials
from braindecode_vis.datasets.trial_values import check_trials
from braindecode_vis.generation.captions import CaptionDecoder, fit_decoders, write_with_encoder
from braindecode_vis.pipeline.progress import find_listener
from braindecode_vis.pipeline.runs import watch_lazily

if TYPE_CHECKING:
    from torch import nn

    from braindecode_vis.generation.generator_data import GeneratorData


def _refuse_input(method: Callable[..., Any]) -> Callable[..., Any]:
    """Raise a `ValueError` too for input that does not fit, as scikit-learn's tools expect."""

    @functools.wraps(method)
    def call(self: Decoder, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except InputError:
            raise
        except DataError as error:
            raise InputError(str(error)) from error

    return call


@for_python
class Decoder(BaseEstimator):
    """A brain encoder together with the embedding space that it predicts.

    Parameters
    ----------
    encoder : str or mapping
        ``ridge``, a network such as ``atm_s`` or ``eegproject``, ``auto``, which tries several, or ``lda`` and
        ``logistic`` for classes; a mapping gives settings, as in a configuration. A torch module may stand for a
        network, as in `decode`.
    target : str or mapping
        Image embedding to predict, for example ``pixels`` or ``efficientnet-lite0``; classes need none.
    prior, generator : str or mapping, optional
        What `reconstruct` uses; by default no prior, and a generator that works with the target.
    seed : int
        Root seed of all random numbers.
    captions : mapping or sequence of mappings, optional
        What `caption` uses, as in ``reconstruction.captions`` of a configuration: ``nearest``, ``git``, ``coca`` or
        ``brain``, at most one of each; none by default. A caption bank identifies the training pictures by their ids.
    verbose : bool
        Show the progress of a fit and the time left, in a notebook or a terminal. It is not saved.

    Attributes
    ----------
    n_features_in_ : int
        Number of values per trial.
    classes_ : array of str
        Names of the classes, after a fit on classes.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> pictures = rng.random((40, 8, 8))
    >>> X = pictures.reshape(40, -1) @ rng.normal(size=(64, 50)) + 0.1 * rng.normal(size=(40, 50))
    >>> decoder = Decoder(encoder={"kind": "ridge", "alphas": [1.0]}).fit(X[:30], pictures[:30])
    >>> decoder.predict(X[30:]).shape[0]
    10
    >>> bool(decoder.score(X[30:], pictures[30:]) > 0.5)
    True
    """

    _fitted: Any  # a brain encoder or a category decoder
    _settings: EncoderSettings
    _stimuli: StimulusSet | None
    _bank: Embeddings
    _target: ImageEncoder
    _out_of_fold: Embeddings | None
    _captions: dict[str, CaptionDecoder]  # by kind
    _centre: np.ndarray | None  # of the training pictures, where the pictures themselves are not available
    _knows_images: bool = True  # what it learnt from, or will
    _subjects: tuple[str, ...]
    _typical: tuple[float, float]  # mean and standard deviation of the values of training trials
    _facts: CardFacts

    def __init__(
        self,
        encoder: str | Mapping[str, Any] | nn.Module = "ridge",
        target: str | Mapping[str, Any] = "pixels",
        prior: str | Mapping[str, Any] | None = None,
        generator: str | Mapping[str, Any] | None = None,
        seed: int = 0,
        captions: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        verbose: bool = True,
    ) -> None:
        self.encoder = encoder
        self.target = target
        self.prior = prior
        self.generator = generator
        self.seed = seed
        self.captions = captions
        self.verbose = verbose

    @_refuse_input
    def fit(
        self,
        X: Any,
        y: Any = None,
        *,
        images: Pictures | None = None,
        subject: Any = None,
        session: Any = None,
        run: Any = None,
        group: Any = None,
    ) -> Self:
        """Learn from training trials.

        Parameters
        ----------
        X : array of shape (n_trials, ...), Responses, mne.Epochs or Data
            Training trials.
        y : sequence of length n_trials
            The picture of each trial (an array of pictures), or its id in `images`; for a target of texts its id in the
            captions, or its name; for a decoder of classes, the class. Not needed if `X` is `Data`.
        images
            The pictures, if `y` holds ids; see `from_arrays`.
        subject, session, run, group : scalar or sequence of length n_trials, optional
            Where each trial comes from. Networks may use the subject, and inner folds leave out whole runs.

        Returns
        -------
        Decoder
            Itself.

        Raises
        ------
        DataError
            If trials and pictures do not match.
        """
        self._knows_images = not self._learns_classes(X, y, images)
        settings = validate_component("encoder", self._read_encoder(), trusted=True)
        self._settings = roles.complete(EncoderSettings, settings)
        if self._settings.decodes_categories and images is not None:
            raise DataError(
                f"{self._settings.kind} learns classes and uses no pictures; leave images out, and give "
                "the class of each trial as y."
            )
        if self._settings.decodes_categories and y is not None:
            y = np.asarray(y)
            # Columns of one value are taken with a warning, as scikit-learn does.
            if y.ndim > 1 and y.shape[1:] != (1,):
                raise DataError(
                    f"{self._settings.kind} learns one class per trial: y should be a 1d array, got an array of shape "
                    f"{y.shape} instead; for pictures, choose encoder='ridge' or a network."
                )
            y = column_or_1d(y, warn=True)
            if y.dtype.kind == "f" and not np.isfinite(y).all():
                raise DataError("y holds NaN or inf (infinity); give the class of every trial.")
            check_classification_targets(y)
        captions = self._read_captions()
        if any(each.reads_responses for each in captions) and not self._settings.writes_captions:
            raise ConfigError(
                f"the encoder itself writes captions of kind brain, and {self._settings.kind} learns no "
                "words; choose a network with the objective captioning, and give it captions."
            )
        if self._settings.decodes_categories and captions:
            raise ConfigError(
                f"captions describe pictures, and {self._settings.kind} learns classes; leave captions out."
            )
        names = {"subject": subject, "session": session, "run": run, "group": group}
        data = self._take(X, y, images, {k: v for k, v in names.items() if v is not None})
        responses, stimuli = data.responses, data.stimuli
        if responses.n_trials < 2:
            raise DataError("a fit needs two or more trials, but there is 1 sample.")
        self._dims, self._shape = responses.dims, tuple(responses.data.shape[1:])
        self._coords = {k: v for k, v in responses.coords.items() if k in ("ch_names", "times", "sfreq")}
        self._unit = responses.unit
        self.n_features_in_ = int(np.prod(self._shape))
        self._subjects = tuple(sorted(set(responses.trials["subject"].astype(str))))
        self._typical = (float(np.mean(responses.data)), float(np.std(responses.data)))
        about = data._describe()
        self._facts = CardFacts(
            about.get("title", ""), about.get("modality", ""), about.get("citation", ""), about.get("licence", ""),
            n_trials=responses.n_trials,
        )  # fmt: skip
        self._centre = None
        seed = derive_seed(self.seed, "train", 0)
        labelled = responses.with_trials(
            responses.trials.assign(concept=stimuli.concepts_of(responses.stimulus_ids))
        )
        if self._settings.decodes_categories:
            decoder = roles.build(CategoryDecoder, self._settings, seed=seed)
            with watch_lazily(find_listener(verbose=self.verbose), "fit:") as tell:
                decoder.bind(replace(NOTHING_LENT, progress=tell))
                self._fitted = decoder.fit(labelled, labelled.trials["concept"].to_numpy(dtype=object))
            decoder.bind(NOTHING_LENT)
            # In the type that the user gave, as scikit-learn's conventions ask.
            self.classes_ = np.asarray(decoder.classes) if isinstance(X, Data) else np.unique(np.asarray(y))
            return self
        pictures = _keep_pixels(stimuli) if data.knows_images else stimuli
        self._stimuli = pictures
        target = self._build_target()
        # A target of texts looks at no picture: what each trial showed is known by its id in the captions, or its name.
        if not data.knows_images and not self._read_target().of_texts:
            raise DataError(
                "this decoder finds pictures, but only classes were given; pass pictures as y, or choose encoder='lda' "
                "or a target of texts such as minilm."
            )
        self._bank = target.embed(pictures, list(pictures.ids), self._embed_pretrained)
        self._target = target
        encoder = roles.build(BrainEncoder, self._settings, seed=seed)
        targets = self._bank.select(list(labelled.stimulus_ids))
        learners = (self._play_prior(), self._play_generator(), *captions)
        with watch_lazily(find_listener(verbose=self.verbose), "fit:") as tell:
            encoder.bind(Context(images=self._stimuli, progress=tell))
            encoder.fit(labelled, targets)
            self._out_of_fold = None
            if any(each.needs_predictions for each in learners):
                self._out_of_fold = encoder.predict_out_of_fold(labelled, targets)
        encoder.bind(Context(images=self._stimuli))
        self._fitted = encoder
        self._captions = {}
        if captions:  # what they learn from maps the whole bank
            seed = derive_seed(self.seed, "fit captions", 0)
            self._captions = fit_decoders(captions, self._collect_material("caption"), seed=seed)
        return self

    @_refuse_input
    def predict(self, X: Any) -> np.ndarray:
        """Return predicted embeddings, or the class of each trial.

        Parameters
        ----------
        X : array of shape (n_trials, ...), Responses, mne.Epochs or Data

        Returns
        -------
        array of shape (n_trials, n_features), or of str and shape (n_trials,)
        """
        if self._require_fit().decodes_categories:
            return self.classes_[self.predict_proba(X).argmax(axis=1)]
        return self._predict(X).flat()

    @_refuse_input
    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probability of each class, shape (n_trials, n_classes), in the order of `classes_`."""
        if not self._require_fit().decodes_categories:
            raise ConfigError("only decoders of classes have probabilities; use predict or retrieve.")
        # The decoder orders its classes as texts, scikit-learn by their values: 2 comes before 10.
        place = {str(name): number for number, name in enumerate(self._fitted.classes)}
        order = [place[str(name)] for name in self.classes_.tolist()]
        return np.asarray(self._fitted.decision(self._take_new(X)))[:, order]

    @_refuse_input
    def retrieve(self, X: Any, gallery: Pictures | str | Path | None = None, k: int = 5) -> pd.DataFrame:
        """Return the pictures of a gallery that are nearest to each prediction.

        Parameters
        ----------
        X : array of shape (n_trials, ...), Responses, mne.Epochs or Data
        gallery
            Pictures, as in `from_arrays`; they need not have been shown. Or the path of a CSV file of captions or
            attributes, whose ids are the candidates without pictures; for a target that reads no texts, the file must
            also describe training pictures, from which words are learnt. By default the training pictures.
        k
            Number of pictures to return per trial.

        Returns
        -------
        DataFrame
            Columns `trial`, `place` (from 1), `picture` (id) and `similarity` (cosine after the mean of the training
            pictures).
        """
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise ConfigError(f"k is {k!r}, but must be a whole number of pictures, 1 or more.")
        predicted, candidates = self._predict(X), self._embed_gallery(gallery)
        similarity = self._compare(predicted, candidates)
        k = min(k, len(candidates))
        order = find_largest(similarity, k)  # (n_trials, k)
        return pd.DataFrame(
            {
                "trial": np.repeat(np.arange(len(order)), k),
                "place": np.tile(np.arange(1, k + 1), len(order)),
                "picture": np.asarray(candidates.ids)[order.ravel()],
                "similarity": np.take_along_axis(similarity, order, axis=1).ravel(),
            }
        )

    @_refuse_input
    def reconstruct(self, X: Any) -> np.ndarray:
        """Return an image for each trial, uint8 of shape (n_trials, height, width, 3).

        Parameters
        ----------
        X : array of shape (n_trials, ...), Responses, mne.Epochs or Data
        """
        data = self._collect_material("reconstruct")
        predicted = self._fitted.predict_for_generator(self._take_new(X))
        generator = self._build_generator(data)
        if not generator.accepts(predicted.space):
            raise ConfigError(
                f"the generator cannot turn embeddings of {predicted.space!r} into images; choose nearest."
            )
        if self.prior is not None:
            predicted = self._sample_prior(predicted, data.embeddings, generator)
        return np.asarray(generator.generate(predicted, seed=derive_seed(self.seed, "generator", 0)))

    @_refuse_input
    def caption(self, X: Any) -> pd.DataFrame:
        """Return a decoded caption of each trial from every caption decoder.

        Parameters
        ----------
        X : array of shape (n_trials, ...), Responses, mne.Epochs or Data

        Returns
        -------
        DataFrame
            Columns `trial`, `source` (``nearest-caption``, ``git-tokens``, ``coca``, ``brain``), `draw` (of the prior;
            0) and `caption`, as those of a run.
        """
        from braindecode_vis.pipeline.predicting import list_captions
        from braindecode_vis.pipeline.reconstruction import decode_captions
        from braindecode_vis.scoring.caption_scores import DECODERS

        data, settings = self._collect_material("caption"), self._read_captions()
        if not settings:
            raise ConfigError(
                "this decoder has no captions; pass captions={'kind': 'nearest', 'bank': 'captions.csv'} (or coca, "
                "or git) and fit it."
            )
        learnt = [each.kind for each in settings if not each.reads_responses]
        if missing := [kind for kind in learnt if kind not in self._captions]:
            raise ConfigError(f"the caption decoder {missing[0]} was added after the fit; fit again.")
        trials = self._take_new(X)
        predicted = drawn = self._fitted.predict_for_generator(trials)
        if self.prior is not None and any(each.reads_draws for each in settings):
            drawn = self._sample_prior(predicted, data.embeddings, self._build_generator(data))
        written = write_with_encoder(settings, self._fitted, trials)
        found = decode_captions(settings, self._captions, drawn, predicted, written)
        return list_captions({DECODERS[kind]: texts for kind, texts in found.items()})

    @_refuse_input
    def score(self, X: Any, y: Any, *, images: Pictures | None = None) -> float:
        """Return the share of trials whose picture is nearest among the distinct pictures of `y`, or the accuracy.

        Parameters
        ----------
        X, y, images
            As in `fit`. The chance level is one over the number of distinct pictures or classes.
        """
        if self._require_fit().decodes_categories:
            return float(np.mean(self.predict(X) == np.asarray(y)))
        data = self._take(X, y, images, {})
        stimuli = _keep_pixels(data.stimuli)
        similarity = self._compare(self._predict(data.responses), self._embed(stimuli))
        own = stimuli.find_rows(data.responses.stimulus_ids)
        true = similarity[np.arange(len(own)), own]
        # Ties count against the trial, so that a collapsed prediction scores nothing.
        return float(np.mean((similarity >= true[:, None]).sum(axis=1) == 1))

    def save(self, path: str | Path, *, include_pictures: bool = True) -> Path:
        """Write the fitted decoder into a folder, without pickle, and return its path.

        Parameters
        ----------
        path
            Folder, created if it does not exist; an earlier decoder there is replaced.
        include_pictures
            Also write the training pictures, their embeddings and the caption decoders. Without them, `retrieve`
            needs a gallery, and `reconstruct` and `caption` are not possible.
        """
        self._require_fit()
        return decoder_files.write_decoder(self, Path(path), include_pictures=include_pictures)

    @classmethod
    def load(
        cls, path: str | Path, *, trust_code: str | Sequence[str] = (), allow_download: bool = False
    ) -> Decoder:
        """Read what `save` wrote.

        Parameters
        ----------
        path
            The folder.
        trust_code
            Modules from outside the package whose code may be imported; not needed for modules that you have imported.
        allow_download
            Allow the download of weights that its components name, if they were saved with this consent.

        Raises
        ------
        ConfigError
            If the folder names code or weights that this call does not allow.
        DataError
            If the folder holds no decoder, or a damaged one.
        """
        folder = Path(path).expanduser().absolute()
        with give_consent(code=trust_code, download=allow_download):
            return decoder_files.read_decoder(cls, folder)

    def __getstate__(self) -> dict[str, Any]:
        """Return plain values and the files that `save` writes, for copies and for other processes."""
        state: dict[str, Any] = {"parameters": self.get_params(deep=False)}
        if hasattr(self, "_fitted"):
            state["files"] = decoder_files.pack_decoder(self)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state["parameters"])  # type: ignore[misc]
        if "files" not in state:
            return
        # The folder goes with the object: embeddings and pictures are memory maps into it.
        folder = decoder_files.unpack_decoder(state["files"])
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        # Whoever opens a pickle, or sends an object to another process, has allowed what the object is made of.
        code = find_code(decoder_files.list_components(state["parameters"]))
        self.__dict__.update(Decoder.load(folder, trust_code=code, allow_download=True).__dict__)
        self.verbose = state["parameters"].get("verbose", True)

    @classmethod
    def from_run(cls, run: Any, fold: int | None = None) -> Decoder:
        """Return the fitted decoder of one fold of a finished run; nothing is computed.

        Parameters
        ----------
        run
            From `decode` or `open_run`, or the folder of a finished run. If the run selects voxels or channels, the
            decoder takes trials with these only.
        fold
            Number of the fold, from 0; needed if there are several.

        Raises
        ------
        DataError
            If it is no run or no folder of one, or the run is unfinished.
        """
        from braindecode_vis.api import fold_decoder
        from braindecode_vis.pipeline.finished_run import open_finished

        opened = open_finished(Path(run)) if isinstance(run, str | Path) else getattr(run, "_run", None)
        if opened is None:
            raise DataError(
                f"Decoder.from_run takes a run of decode or open_run, or the folder of one, not {type(run).__name__}."
            )
        return fold_decoder.take_decoder(cls, opened, fold)

    def export(self, out: str | Path, *, to: str, X: Any = None, licence: str | None = None) -> Path:
        """Write the fitted encoder for other programs, with a model card, and return the path.

        Parameters
        ----------
        out
            A file (``.pt2``, ``.onnx``; ``NAME.json`` with its inputs and the card ``NAME.md`` are written beside it)
            or a folder; it must not exist.
        to
            ``safetensors``; ``torch-export`` or ``onnx``, which are run and compared with the encoder; or
            ``huggingface``, as `from_pretrained` reads it, without the training pictures.
        X
            Trials for the comparison; by default noise with the mean and spread of the training trials.
        licence
            Licence of the weights, for the card, for example ``mit``.

        Raises
        ------
        ConfigError, DataError
            If the path exists, or the network cannot be exported.
        """
        self._require_fit()
        if X is None:
            noise = make_noise(self._shape, self._typical)
            trials = self._take_new(noise)
            # A subject that the network knows, so that its own layer is compared.
            name = self._subjects[0] if self._subjects else "1"
            trials = trials.with_trials(trials.trials.assign(subject=name))
        else:
            trials = self._take_new(X)
            trials = trials.select(np.arange(min(CHECKED_TRIALS, trials.n_trials)))
        return export_decoder(self, to, out, trials, licence=licence)

    def push_to_hub(
        self,
        where: str | Path,
        *,
        upload: bool = False,
        include_pictures: bool = False,
        licence: str | None = None,
        private: bool = True,
        token: str | None = None,
    ) -> str:
        """Write a Hugging Face folder with a model card, or upload it; return its path or address.

        Parameters
        ----------
        where
            A path (``./mine``, an absolute one, or a `Path`), or the name of a repository, ``owner/name``.
        upload
            Allow the upload of the files to the hub; needed for a repository.
        include_pictures
            Also share the training pictures and their embeddings; check first that their licence allows it.
        licence
            Licence of the weights, for example ``mit``.
        private
            Whether a new repository is private.
        token
            Access token of the hub; by default the one that the hub's own tools have stored.

        Raises
        ------
        ConfigError
            If a repository is named without `upload`, or the folder exists.
        DataError
            If the hub refuses or cannot be reached.
        """
        self._require_fit()
        if not is_repo(where):
            if upload:
                raise ConfigError(f"{where} is a path; name a repository as owner/name to upload.")
            with write_new(where, "huggingface") as folder:
                write_folder(self, folder, licence=licence, include_pictures=include_pictures)
            return str(Path(where).expanduser().absolute())
        if not upload:
            raise ConfigError(
                f"{where} is the name of a repository; pass upload=True to send the decoder to the hub, or write a "
                f"path as ./{where}."
            )
        with tempfile.TemporaryDirectory(prefix="braindecode-vis-") as work:
            write_folder(self, Path(work) / "decoder", licence=licence, include_pictures=include_pictures)
            return push_folder(Path(work) / "decoder", str(where), private=private, token=token)

    @classmethod
    def from_pretrained(
        cls,
        where: str | Path,
        *,
        download: bool = False,
        revision: str | None = None,
        token: str | None = None,
        cache: str | Path | None = None,
        trust_code: str | Sequence[str] = (),
        allow_download: bool = False,
    ) -> Decoder:
        """Read a decoder from a Hugging Face folder, or download it from the hub.

        Parameters
        ----------
        where
            A folder, or the name of a repository, ``owner/name``.
        download
            Allow the download; needed for a repository.
        revision
            Branch, tag or commit of the repository.
        token
            Access token of the hub; by default the one that the hub's own tools have stored.
        cache
            Folder for downloads; by default the folder of the hub's own tools.
        trust_code, allow_download
            As in `load`.

        Raises
        ------
        ConfigError
            If a repository is named without `download`, or the decoder needs code from outside the package.
        DataError
            If there is no decoder, or it cannot be downloaded.
        """
        if not is_repo(where):
            return cls.load(where, trust_code=trust_code, allow_download=allow_download)
        if not download:
            raise ConfigError(
                f"there is no folder {where}; pass download=True to fetch the repository of this name from the hub."
            )
        folder = fetch_folder(
            str(where), revision=revision, token=token, cache=None if cache is None else Path(cache)
        )
        return cls.load(folder, trust_code=trust_code, allow_download=allow_download)

    def _find_centre(self) -> np.ndarray:
        """Return the mean of the training pictures in the space of comparison, shape (n_features,)."""
        if self._centre is not None:
            return self._centre
        return np.asarray(self._fitted.map_targets(self._bank).flat().mean(axis=0))

    def _read_encoder(self) -> dict[str, Any]:
        # `auto` tries other encoders for classes than for images; a default would not be one that was named.
        return read_encoder(self.encoder, knows_images=self._knows_images or self.encoder != "auto")

    def _learns_classes(self, X: Any, y: Any, images: Pictures | None) -> bool:
        """Say whether these are the classes of trials, and neither pictures nor ids of some."""
        if isinstance(X, Data):
            return not X.knows_images
        if y is None or images is not None or _holds_pictures(y) or self._read_target().of_texts:
            return False
        first = y[0] if isinstance(y, Sequence) and len(y) else None
        return not (isinstance(first, Path) or (isinstance(first, str) and Path(first).is_file()))

    def _require_fit(self) -> EncoderSettings:
        if not hasattr(self, "_fitted"):
            from sklearn.exceptions import NotFittedError

            raise NotFittedError("this Decoder has not been fitted; call fit first.")
        return self._settings

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        # Only a decoder of classes is a classifier, and which it is, its encoder says.
        settings = validate_component("encoder", self._read_encoder(), trusted=True)
        if roles.complete(EncoderSettings, settings).decodes_categories:
            tags.estimator_type = "classifier"
            tags.classifier_tags = ClassifierTags()
            tags.target_tags.required = True
        return tags

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_fitted")

    def _read_target(self) -> ImageEncoderSettings:
        named = validate_component("target", as_component(self.target), trusted=True)
        return roles.complete(ImageEncoderSettings, named)

    def _build_target(self) -> ImageEncoder:
        settings = self._read_target()
        target = roles.build(roles.find_image_encoder_role(settings), settings)
        target.bind(Context(images=self._stimuli))
        return target

    def _embed_pretrained(self, encoder: Any) -> Embeddings:
        assert self._stimuli is not None
        with find_listener(verbose=self.verbose).progress("encoding images", len(self._stimuli)) as advance:
            vectors = encoder.encode(_count(self._stimuli.iterate_images(), advance))
        return Embeddings(vectors, self._stimuli.ids, encoder.space)

    def _embed(self, stimuli: StimulusSet) -> Embeddings:
        vectors = self._target.encode(stimuli.iterate_images())
        return self._fitted.map_targets(Embeddings(vectors, stimuli.ids, self._bank.space))

    def _embed_gallery(self, gallery: Pictures | None) -> Embeddings:
        if gallery is None:
            if not len(self._bank):
                raise DataError(
                    "this decoder was shared without its training pictures; pass gallery=pictures."
                )
            return self._fitted.map_targets(self._bank)
        if isinstance(gallery, str | Path) and Path(gallery).suffix == ".csv":
            return self._describe_gallery(Path(gallery))
        files, arrays, ids = index_pictures(gallery)
        pictures = arrays if arrays is not None else [read_image_file(path) for path in files]
        vectors = self._target.encode(iter(pictures))
        return self._fitted.map_targets(Embeddings(vectors, ids, self._bank.space))

    def _describe_gallery(self, path: Path) -> Embeddings:
        """Return the images that a file describes as candidates, without reading them."""
        from braindecode_vis.config import RetrievalConfig
        from braindecode_vis.embeddings.image_descriptions import read_captions_or_attributes
        from braindecode_vis.embeddings.text import open_clip_texts
        from braindecode_vis.pipeline.galleries import GallerySource, TextSide

        if not len(self._bank) or self._stimuli is None:
            raise DataError(
                "this decoder was shared without its training pictures, which are needed to compare with "
                "words; save it with include_pictures=True."
            )
        known = read_captions_or_attributes(path, self._stimuli.concept_of)
        source = GallerySource(self._fitted, self._bank, list(self._bank.ids), RetrievalConfig())
        text = open_clip_texts(validate_component("target", as_component(self.target), trusted=True))
        side = TextSide(source, self._target, known, clip=None if text is None else text.encode)
        return side.place(list(known), list(known.values()), None)

    def _compare(self, predicted: Embeddings, candidates: Embeddings) -> np.ndarray:
        """Return cosines after the mean of the training pictures, shape (n_trials, n_candidates)."""
        from braindecode_vis.base.arrays import normalise_rows

        mean = self._find_centre()
        return normalise_rows(predicted.flat() - mean) @ normalise_rows(candidates.flat() - mean).T

    def _predict(self, X: Any) -> Embeddings:
        if self._require_fit().decodes_categories:
            raise ConfigError("a decoder of classes predicts no embeddings; use predict or predict_proba.")
        return self._fitted.predict(self._take_new(X))

    def _play_prior(self) -> Any:
        named = as_component(self.prior or "identity")
        return roles.complete(PriorSettings, validate_component("prior", named, trusted=True))

    def _play_generator(self) -> Any:
        named = as_component(self.generator or GENERATORS.get(as_component(self.target)["kind"], "nearest"))
        return roles.complete(GeneratorSettings, validate_component("generator", named, trusted=True))

    def _read_captions(self) -> tuple[Any, ...]:
        """Return the settings of the caption decoders."""
        given: Any = self.captions or ()
        named = [given] if isinstance(given, str | Mapping) else list(given)
        try:
            read = ReconstructionConfig.model_validate({"captions": [as_component(each) for each in named]})
        except ValidationError as error:
            raise ConfigError(f"Decoder: {describe_validation_error(error)}.") from error
        return read.captions

    def _collect_material(self, verb: str) -> GeneratorData:
        """Return the training data for prior, generator and captions, which `verb` needs."""
        from braindecode_vis.generation.generator_data import GeneratorData

        if self._require_fit().decodes_categories:
            raise ConfigError(
                f"a decoder of classes makes no images{'' if verb == 'reconstruct' else ' or captions'}."
            )
        if self._stimuli is None:
            raise DataError(
                f"this decoder was shared without its training pictures, which {verb} needs; save it with "
                "include_pictures=True."
            )
        return GeneratorData(
            self._target, self._fitted.map_for_generator(self._bank), self._stimuli, self._out_of_fold
        )

    def _build_generator(self, data: GeneratorData) -> Any:
        generator = roles.build(ImageGenerator, self._play_generator(), data)
        generator.bind(data.context)
        return generator

    def _sample_prior(self, predicted: Embeddings, embeddings: Embeddings, generator: Any) -> Embeddings:
        settings = self._play_prior()
        prior = roles.build(Prior, settings, seed=derive_seed(self.seed, "fit prior", 0))
        prior.bind(replace(NOTHING_LENT, encoder=self._fitted))
        known = settings.find_images(embeddings, generator, embeddings)
        if not settings.needs_predictions:
            prior.fit(None, embeddings, images=known)
        elif self._out_of_fold is None or not len(self._out_of_fold):
            raise ConfigError("the prior learns from predictions of training trials; set prior before fit.")
        else:
            prior.fit(self._out_of_fold, embeddings.select(self._out_of_fold.ids), images=known)
        return prior.sample(predicted, n_draws=1, seed=derive_seed(self.seed, "prior", 0))

    def _take(self, X: Any, y: Any, images: Pictures | None, names: Mapping[str, Any]) -> Data:
        """Return trials with the pictures that they showed."""
        if isinstance(X, Data):
            return X
        X = join_epochs(X)
        if y is None:
            raise DataError(
                "fit and score need y: this estimator requires y to be passed, but the target y is None; give the "
                "picture, its id, or the class of each trial."
            )
        if isinstance(X, Responses):
            X, given = (
                X.data,
                {"dims": X.dims, **{k: X.coords[k] for k in ("times", "ch_names") if k in X.coords}},
            )
        elif hasattr(X, "get_data") and hasattr(X, "event_id"):
            if self._settings.decodes_categories:
                return from_epochs(X, labels=y, **names)
            # Labels are asked for, and not looked at here: the pictures come from y.
            taken = from_epochs(X, labels=["any"] * len(X)).responses
            X, given = taken.data, {"times": taken.coords["times"], "ch_names": taken.coords["ch_names"]}
        else:
            given = {}
        if self._settings.decodes_categories or (images is None and self._read_target().of_texts):
            return from_arrays(X, labels=[str(label) for label in np.asarray(y).tolist()], **given, **names)
        if images is not None:
            return from_arrays(X, images=images, shown=y, **given, **names)
        if not _holds_pictures(y) and not (
            isinstance(y, Sequence) and len(y) and isinstance(y[0], str | Path)
        ):
            raise DataError(
                "y holds no pictures: pass one picture per trial (an array of shape (n_trials, height, width[, 3]) "
                "or paths), or ids together with images=..."
            )
        pictures, shown = merge_pictures(y)
        return from_arrays(X, images=pictures, shown=shown, **given, **names)

    def _take_new(self, X: Any) -> Responses:
        """Return trials of unknown pictures as the encoder takes them; refuse another number of features."""
        X = X.responses if isinstance(X, Data) else join_epochs(X)
        if isinstance(X, Responses):
            responses = X
        elif hasattr(X, "get_data") and hasattr(X, "event_id"):
            responses = from_epochs(X, labels=["unknown"] * len(X)).responses
        else:
            if isinstance(X, str | bytes) or not (hasattr(X, "__len__") or hasattr(X, "__array__")):
                raise DataError(
                    f"X must be an array of trials, Responses, mne.Epochs or Data, not {type(X).__name__}."
                )
            X = check_trials(X)
            # Not `from_arrays`: new trials may be constant, or copies of each other.
            responses, _ = make_new_trials(X, None, dims=self._dims if X.ndim == len(self._dims) else None)
            responses = replace(responses, coords={**responses.coords, **self._coords})
        found = tuple(responses.data.shape[1:])
        if found != self._shape:
            n_found = int(np.prod(found))
            count = f"X has {n_found} features, but Decoder is expecting {self.n_features_in_} features as input: "
            raise DataError(
                f"{count if n_found != self.n_features_in_ else ''}the decoder was fitted on trials of "
                f"{' x '.join(map(str, self._shape))} ({', '.join(self._dims[1:])}), but these have the "
                f"shape {' x '.join(map(str, found))}."
            )
        theirs, ours = responses.coords.get("ch_names"), self._coords.get("ch_names")
        if theirs is not None and ours is not None and list(theirs) != list(ours):
            raise DataError(
                "the channels of these trials have other names, or another order, than those of the fit."
            )
        return responses


def _holds_pictures(y: Any) -> bool:
    """Return whether `y` holds arrays of pictures; numpy cannot stack a list of several sizes to count its axes."""
    return np.ndim(y[0]) >= 2 if isinstance(y, Sequence) and len(y) else np.asarray(y).ndim > 2


def _count(images: Iterable[np.ndarray], advance: Callable[[int], None]) -> Iterator[np.ndarray]:
    for image in images:
        yield image
        advance(1)


def _keep_pixels(stimuli: StimulusSet) -> StimulusSet:
    """Return the same pictures held in memory if they have one size, so that a saved decoder needs no other file."""
    if stimuli.pixels is not None:
        return stimuli
    images = list(stimuli.iterate_images())
    if len({image.shape for image in images}) > 1:
        return stimuli  # files of different sizes are referred to by their paths
    return StimulusSet(stimuli.table, pixels=np.stack(images))
