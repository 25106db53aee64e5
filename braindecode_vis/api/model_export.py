"""Fitted encoders for other programs: safetensors with a model card, `torch.export`, ONNX, and Hugging Face folders.

Writes the exported files, checks an exported program against its encoder, and writes the model card. Only
`push_folder` and `fetch_folder` upload and download, and only if the caller asks for it.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from braindecode_vis import __version__
from braindecode_vis.api.exports import check_request, write_new
from braindecode_vis.base import store
from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.checks import BraindecodeVisError, ConfigError, DataError, require
from braindecode_vis.training.auto import AutoConfig

#: An exported program may differ from its encoder by this share of the spread of predictions: float32 sums in another
#: order, through a few dozen layers.
TOLERANCE = 1e-3
CHECKED_TRIALS = 64
FEWEST_CHECKED = 3  # the spread of one prediction is none
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_METRICS_SHOWN = 12


@dataclass(frozen=True)
class CardFacts:
    """What a model card says beside the settings.

    Parameters
    ----------
    title, modality, citation, data_licence
        Facts about the data, if they are known.
    protocol
        How training and test trials were split.
    scores
        Rows as in ``scores.json``, of the decoded system.
    n_trials
        Number of training trials; None if it is not known.
    note
        What a user must know to prepare the input of the model.
    """

    title: str = ""
    modality: str = ""
    citation: str = ""
    data_licence: str = ""
    protocol: str = ""
    scores: list[dict[str, Any]] = field(default_factory=list)
    n_trials: int | None = None
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return plain values from which the class can be built again."""
        return asdict(self)


def export_decoder(
    decoder: Any, to: str, out: str | Path, trials: Responses, *, licence: str | None = None
) -> Path:
    """Write a fitted decoder in one of the formats of an encoder.

    Parameters
    ----------
    decoder
        Fitted.
    to
        ``safetensors``, ``torch-export``, ``onnx`` or ``huggingface``.
    out
        A file for programs, a folder otherwise; it must not exist.
    trials
        Trials on which the exported program is checked.
    licence
        Licence of the weights, as the identifier that Hugging Face uses (``mit``, ``cc-by-4.0``).

    Raises
    ------
    ConfigError, DataError
        If the path exists, the network cannot be exported, or the program predicts other numbers.
    """
    check_request("encoder", to)
    path = Path(out).expanduser().absolute()
    if to in ("torch-export", "onnx"):
        with write_new(path, to) as file:
            checked = export_program(
                decoder._fitted, trials, to, file, name=str(_describe_axes(decoder)["encoder_kind"]),
                classes=decoder._settings.decodes_categories,
            )  # fmt: skip
            described = {**_describe_axes(decoder), "format": to, **checked}
            store.write_json(file.with_name(f"{file.name}.json"), described)
            card = write_card(decoder, licence=licence, how=_tell_program(decoder, to, file.name, checked))
            file.with_name(f"{file.name}.md").write_text(card)
    elif to == "safetensors":
        with write_new(path, to) as folder:
            folder.mkdir()
            decoder._fitted.write(folder)
            store.write_json(
                folder / "config.json", {**_describe_axes(decoder), "encoder": decoder._read_encoder()}
            )
            (folder / "README.md").write_text(
                write_card(decoder, licence=licence, how=_tell_safetensors(decoder))
            )
    else:
        with write_new(path, to) as folder:
            write_folder(decoder, folder, licence=licence, include_pictures=False)
    return path


def write_folder(decoder: Any, folder: Path, *, licence: str | None, include_pictures: bool) -> None:
    """Write a decoder with its card, as `Decoder.from_pretrained` reads it."""
    decoder.save(folder, include_pictures=include_pictures)
    how = (
        "```python\nimport braindecode_vis as bdv\n\n"
        'decoder = bdv.Decoder.from_pretrained("FOLDER")  # or "owner/name", download=True\n'
        f"decoder.predict(X)  # X of shape (n_trials, {', '.join(map(str, decoder._shape))})\n```"
    )
    if not include_pictures and not decoder._settings.decodes_categories:
        how += (
            "\n\nThe training pictures and their embeddings are not included: pass a gallery to "
            "`retrieve`; `reconstruct` is not possible."
        )
    (folder / "README.md").write_text(write_card(decoder, licence=licence, how=how))


# --- programs ------------------------------------------------------------------------------------------------


def export_program(
    encoder: Any, trials: Responses, to: str, file: Path, *, name: str, classes: bool
) -> dict[str, Any]:
    """Write the prediction of an encoder as a program, and check it against the encoder.

    Parameters
    ----------
    encoder
        A fitted brain encoder or category decoder.
    trials
        At least two trials, on which the program is checked.
    to
        ``torch-export`` or ``onnx``.
    file
        Where to write.
    name
        Name of the encoder, for messages.
    classes
        Whether the encoder decodes classes.

    Returns
    -------
    dict
        Names and shapes of the inputs, how many trials were compared, the `largest_difference`, and the
        `spread_of_predictions` (standard deviation) beside it.

    Raises
    ------
    ConfigError
        If the network cannot be exported, or an optional library is missing.
    DataError
        If the program predicts other numbers.
    """
    if trials.n_trials < FEWEST_CHECKED:
        raise DataError(
            f"an exported program is checked on {FEWEST_CHECKED} or more trials; pass more trials as X."
        )
    import torch

    module, inputs = encoder.as_module(trials)
    expected = np.asarray(encoder.decision(trials) if classes else encoder.predict(trials).vectors)
    if to == "onnx":
        for library in ("onnx", "onnxscript", "onnxruntime"):
            require(library, "exporting to ONNX")
    trial = torch.export.Dim("trial")
    # Traced with two trials and checked with another number, so that a number that was frozen shows.
    few = tuple(tensor[:2] for tensor in inputs.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch's own way of exporting
        try:
            program = torch.export.export(module, few, dynamic_shapes=tuple({0: trial} for _ in few))
            if to == "torch-export":
                torch.export.save(program, file)
                loaded = torch.export.load(file).module()
                predicted = loaded(*inputs.values()).detach().numpy()
            else:
                made = torch.onnx.export(
                    program, dynamo=True, input_names=list(inputs), output_names=["prediction"], verbose=False
                )
                assert made is not None
                made.save(file, external_data=False)
                predicted = _run_onnx(file, {key: tensor.numpy() for key, tensor in inputs.items()})
        except BraindecodeVisError:
            raise
        except Exception as error:  # torch and onnx raise what they like
            reason = " ".join(str(error).split())[:160].rstrip(".")
            raise ConfigError(
                f"the encoder {name} cannot be exported to {to} ({type(error).__name__}: {reason}); choose safetensors."
            ) from error
    difference, spread = float(np.abs(predicted - expected).max()), float(expected.std())
    if predicted.shape != expected.shape or difference > TOLERANCE * max(spread, 1e-6):
        raise DataError(
            f"the program exported to {to} differs from the encoder by up to {difference:.3g}, where predictions have "
            f"a spread of {spread:.3g}; choose safetensors."
        )
    return {
        "inputs": {key: [None, *tensor.shape[1:]] for key, tensor in inputs.items()},
        "output": [None, *expected.shape[1:]], "n_checked": trials.n_trials,
        "averaged_repetitions": np.unique(trials.n_averaged).tolist(),
        "largest_difference": difference, "spread_of_predictions": spread,
    }  # fmt: skip


def _run_onnx(file: Path, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    runtime = require("onnxruntime", "checking ONNX")
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    # A network that asks for no subject may have lost that input.
    feed = {entry.name: inputs[entry.name] for entry in session.get_inputs()}
    return np.asarray(session.run(None, feed)[0])


def make_noise(shape: tuple[int, ...], typical: tuple[float, float]) -> np.ndarray:
    """Return trials of noise with the mean and standard deviation of the training trials, to check programs on."""
    mean, spread = typical
    values = np.random.default_rng(0).normal(size=(CHECKED_TRIALS, *shape))
    return (mean + spread * values).astype(np.float32)


# --- model cards ---------------------------------------------------------------------------------------------


def write_card(decoder: Any, *, licence: str | None, how: str) -> str:
    """Return a model card in the format of Hugging Face: metadata, then what, data, protocol, scores, licence, use.

    Parameters
    ----------
    decoder
        Fitted decoder; the facts about data and scores come from its run.
    licence
        Of the weights.
    how
        How to load and call it, in Markdown.
    """
    hub = _import_hub()
    facts, axes = decoder._facts, _describe_axes(decoder)
    name = f"{axes['predicts']} from {facts.modality or 'brain responses'}"
    slug = re.sub(r"[^a-z0-9]+", "-", facts.title.lower()).strip("-") or "own"
    results = [
        hub.EvalResult(
            task_type="brain-decoding", dataset_type=slug,
            dataset_name=facts.title or "data without a title", metric_type=str(row["metric"]),
            metric_value=float(row["value"]), metric_name=f"{row['metric']} ({row['subject']})",
        )
        for row in facts.scores[:_METRICS_SHOWN]
    ]  # fmt: skip
    data = hub.ModelCardData(
        license=licence, library_name="braindecode_vis", model_name=name if results else None,
        eval_results=results or None,
        tags=["brain-decoding", *([facts.modality.lower()] if facts.modality else []), str(axes["encoder_kind"])],
    )  # fmt: skip
    shape = " x ".join(f"{n} {dim}s" for dim, n in zip(axes["dims"], axes["shape"], strict=True))
    trained = "" if facts.n_trials is None else f" It was fitted on {facts.n_trials} trials."
    parts = [
        f"# {name[0].upper()}{name[1:]}",
        f"A `{axes['encoder_kind']}` encoder of braindecode_vis {__version__} that predicts {axes['predicts']} from "
        f"trials of {shape}, in {axes['unit']}.{trained}",
        "## Data",
        facts.title or "No title was given.",
        *([f"Citation: {facts.citation}"] if facts.citation else []),
        *([f"Licence of the data: {facts.data_licence}"] if facts.data_licence else []),
        "## Protocol",
        facts.protocol or "This decoder has no scores, so no protocol is stated.",
        "## Scores",
        _tabulate(facts.scores) if facts.scores else "None were computed.",
        "## Licence",
        f"The weights: {licence}." if licence else "No licence was stated for the weights; ask their author.",
        "## Use",
        *([facts.note] if facts.note else []),
        how,
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def _tabulate(rows: list[dict[str, Any]]) -> str:
    lines = ["| metric | subject | value | 95 % interval | chance | n |", "|---|---|---|---|---|---|"]
    for row in rows:
        low, high, chance = (row.get(key) for key in ("ci_low", "ci_high", "chance"))
        interval = "" if low is None or low != low else f"{low:.3f} to {high:.3f}"
        guess = "" if chance is None or chance != chance else f"{chance:.3f}"
        lines.append(
            f"| {row['metric']} | {row['subject']} | {row['value']:.3f} | {interval} | {guess} | {row['n_queries']} |"
        )
    return "\n".join(lines)


def _describe_axes(decoder: Any) -> dict[str, Any]:
    encoder = decoder._read_encoder()
    categories = decoder._settings.decodes_categories
    if isinstance(
        decoder._settings, AutoConfig
    ):  # who takes the model asks what it is, not how it was chosen
        chosen = decoder._fitted.record["chosen"]
        encoder = decoder._settings.list_members()[chosen].model_dump(mode="json")
    kind = encoder["kind"]
    return {
        "version": __version__,
        "encoder_kind": encoder["network"]["kind"] if kind == "network" and "network" in encoder else kind,
        "predicts": f"{len(decoder.classes_)} classes" if categories else f"embeddings of {decoder._bank.space}",
        # In the order of the outputs, which is that of their names as texts.
        **({"classes": list(decoder._fitted.classes)} if categories else {"space": decoder._bank.space}),
        "dims": list(decoder._dims[1:]), "shape": list(decoder._shape), "unit": decoder._unit,
        "coords": store.json_plain(decoder._coords), "subjects": list(decoder._subjects),
    }  # fmt: skip


def _tell_program(decoder: Any, to: str, name: str, checked: Mapping[str, Any]) -> str:
    takes = ", ".join(checked["inputs"])
    call = (
        f'session = onnxruntime.InferenceSession("{name}")\nsession.run(None, {{"responses": X}})'
        if to == "onnx"
        else f'program = torch.export.load("{name}").module()\nprogram(X)'
    )
    if "subject" in checked["inputs"]:
        call = call.replace('"responses": X', '"responses": X, "subject": s').replace(
            "program(X)", "program(X, s)"
        )
    subject = (
        f" `subject` is int64, the number of each trial's subject in {', '.join(decoder._subjects)}, from 0; "
        f"{len(decoder._subjects)} stands for an unknown one."
        if "subject" in checked["inputs"]
        else ""
    )
    counts = checked["averaged_repetitions"]
    means = (
        f" Its trials are means of {counts[0]:g} repetitions, and a linear Gaussian model takes every trial for one."
        if counts != [1] and len(counts) == 1
        else ""
    )
    return (
        f"```python\n{call}\n```\n\nInputs: {takes}. `responses` is float32, trials first.{subject} Alignment and "
        "scaling are part of the program. It was compared with the encoder itself on "
        f"{checked['n_checked']} trials: the largest difference was {checked['largest_difference']:.2g}, "
        "where predictions have a standard deviation of "
        f"{checked['spread_of_predictions']:.2g}.{means}"
    )


def _tell_safetensors(decoder: Any) -> str:
    return (
        "Weights and statistics of the training trials lie in `*.safetensors`, settings in `config.json`. In "
        "Python:\n\n```python\nimport json\nfrom pathlib import Path\nfrom braindecode_vis import roles\n"
        "from braindecode_vis.base.registry import validate_component\n\n"
        'settings = json.loads(Path("config.json").read_text())["encoder"]\n'
        'encoder = validate_component("encoder", settings).read(Path("."))\n```'
    )


# --- Hugging Face --------------------------------------------------------------------------------------------


def _import_hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConfigError(
            "this needs huggingface_hub, which is not installed; pip install huggingface_hub."
        ) from error
    return huggingface_hub


def is_repo(where: str | Path) -> bool:
    """Return whether this is the name of a repository, ``owner/name``, and no path.

    Examples
    --------
    >>> is_repo("me/mine"), is_repo("./me/mine"), is_repo(Path("me/mine"))
    (True, False, False)
    """
    return isinstance(where, str) and _REPO.fullmatch(where) is not None and not Path(where).is_dir()


def push_folder(folder: Path, repo: str, *, private: bool, token: str | None) -> str:
    """Upload a folder to a repository of the hub, which is made if it does not exist, and return its address.

    Raises
    ------
    DataError
        If the hub refuses or cannot be reached.
    """
    api = _import_hub().HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")
            done = api.upload_folder(
                repo_id=repo, folder_path=folder, commit_message=f"Decoder of braindecode_vis {__version__}"
            )
    except Exception as error:  # of the network, of the server, of the token
        raise DataError(_describe_hub_error("upload to", repo, error)) from error
    return str(done.commit_url)


def fetch_folder(repo: str, *, revision: str | None, token: str | None, cache: Path | None) -> Path:
    """Download the files of a decoder from a repository of the hub into the hub's cache, and return the folder.

    Raises
    ------
    DataError
        If it does not exist or cannot be reached.
    """
    hub = _import_hub()
    try:
        # No code is fetched, and no format that runs code on reading.
        wanted = ["*.json", "*.safetensors", "*.npy", "*.parquet", "README.md"]
        return Path(
            hub.snapshot_download(
                repo, revision=revision, token=token, cache_dir=cache, allow_patterns=wanted,
                endpoint=os.environ.get("HF_ENDPOINT") or None,
            )
        )  # fmt: skip
    except Exception as error:
        raise DataError(_describe_hub_error("download", repo, error)) from error


def _describe_hub_error(what: str, repo: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:160].rstrip(".")
    return f"the {what} {repo} failed ({type(error).__name__}: {reason}); check the name, the network and the token."
