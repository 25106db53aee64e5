"""The folder of a fitted `Decoder`: what `save` writes and `load` reads, without pickle.

Reads and writes the files, and limits what a downloaded folder may request. The decoder itself is in
`braindecode_vis.api.decoder`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from braindecode_vis import __version__
from braindecode_vis.api.model_export import CardFacts
from braindecode_vis.api.own import as_component
from braindecode_vis.base import roles, store
from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.consent import check_code, may_download
from braindecode_vis.base.contracts import (
    BrainEncoder,
    CategoryDecoder,
    Context,
    EncoderSettings,
    ImageEncoderSettings,
)
from braindecode_vis.base.registry import validate_component
from braindecode_vis.encoders.plain_module import is_module
from braindecode_vis.generation.captions import read_decoders, write_decoders

_FILE = "decoder.json"
#: What `Decoder.save` writes, and the card and settings that stand beside it in a shared folder.
_SAVED = (
    _FILE, "encoder", "target", "bank", "stimuli", "out_of_fold", "captions", "centre.npy", "README.md", "config.json",
    ".gitattributes",
)  # fmt: skip


def write_decoder(decoder: Any, path: Path, *, include_pictures: bool = True) -> Path:
    """Write a fitted decoder into a folder and return it; see `Decoder.save`."""
    folder = path.expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file; give a folder.")
    others = [entry.name for entry in folder.iterdir() if entry.name not in _SAVED] if folder.is_dir() else []
    if others:
        raise DataError(f"{folder} holds files that are no decoder ({others[0]}); choose another folder.")
    # Beside its place first, so that an earlier decoder is lost to nothing that goes wrong.
    final, folder = folder, folder.with_name(f".{folder.name}-being-written")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "encoder").mkdir(parents=True)
    decoder._fitted.write(folder / "encoder")
    if not decoder._settings.decodes_categories:
        (folder / "target").mkdir()
        decoder._target.write(folder / "target")
        if include_pictures and decoder._stimuli is not None:
            store.write_embeddings(folder / "bank", decoder._bank)
            store.write_stimuli(folder / "stimuli", decoder._stimuli)
            if decoder._out_of_fold is not None:
                store.write_embeddings(folder / "out_of_fold", decoder._out_of_fold)
            write_decoders(folder, decoder._captions)
        else:
            # Embeddings of pixels are the pictures again; their mean is what comparisons need.
            bank = Embeddings(
                np.asarray(decoder._bank.vectors[:0]), decoder._bank.ids[:0], decoder._bank.space
            )
            store.write_embeddings(folder / "bank", bank)
            np.save(folder / "centre.npy", decoder._find_centre(), allow_pickle=False)
    record = {
        "version": __version__,
        "parameters": _list_parameters(decoder),
        "dims": list(decoder._dims), "shape": list(decoder._shape), "unit": decoder._unit, "coords": decoder._coords,
        "classes": decoder.classes_.tolist() if decoder._settings.decodes_categories else None,
        "subjects": list(decoder._subjects), "typical": list(decoder._typical), "facts": decoder._facts.as_json(),
    }  # fmt: skip
    store.write_json(folder / _FILE, record)
    shutil.rmtree(final, ignore_errors=True)
    folder.rename(final)
    return final


def _list_parameters(decoder: Any) -> dict[str, Any]:
    """Return the parameters that say what was learnt, which is not how progress is shown; a module by its settings."""
    named = {key: value for key, value in decoder.get_params(deep=False).items() if key != "verbose"}
    plain = isinstance(decoder.encoder, str | Mapping) and not is_module(
        as_component(decoder.encoder).get("network")
    )
    return named if plain else {**named, "encoder": decoder._read_encoder()}


def pack_decoder(decoder: Any) -> dict[str, bytes]:
    """Return the files of a fitted decoder by name, for copies and for other processes."""
    with tempfile.TemporaryDirectory() as name:
        folder = write_decoder(decoder, Path(name) / "decoder")
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def unpack_decoder(files: Mapping[str, bytes]) -> Path:
    """Write what `pack_decoder` returned into a temporary folder, and return that."""
    folder = Path(tempfile.mkdtemp(prefix="braindecode-vis-"))
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def list_components(parameters: Mapping[str, Any]) -> list[Any]:
    """Return the settings among the parameters of a decoder that name a component, as mappings."""
    return [as_component(value) for value in parameters.values() if isinstance(value, str | Mapping)]


def read_decoder(cls: Any, folder: Path) -> Any:
    """Return the decoder, of the class `cls`, that a folder holds; see `Decoder.load`.

    Parameters
    ----------
    cls
        `Decoder`.
    folder
        From `write_decoder`.
    """
    if not (folder / _FILE).is_file():
        raise DataError(f"{folder} holds no decoder: {_FILE} is missing.")
    record = store.read_json(folder / _FILE)
    try:
        # Consent to code and to further downloads is not given by a file, which may come from elsewhere.
        parameters = record["parameters"] if may_download() else _forbid_downloads(record["parameters"])
        check_code(list_components(parameters), where=f"{folder / _FILE}")
        decoder = cls(**parameters)
        decoder._dims, decoder._shape = tuple(record["dims"]), tuple(record["shape"])
        decoder._unit = record["unit"]
        decoder._coords = {k: np.asarray(v) if k == "times" else v for k, v in record["coords"].items()}
        decoder._subjects = tuple(record.get("subjects", ()))
        mean, spread = record.get("typical", (0.0, 1.0))
        decoder._typical = (float(mean), float(spread))
        decoder._facts = CardFacts(**record.get("facts", {}))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{folder / _FILE} is damaged ({error}); save the decoder again.") from error
    decoder.n_features_in_ = int(np.prod(decoder._shape))
    decoder._knows_images = record["classes"] is None
    settings = roles.complete(EncoderSettings, validate_component("encoder", decoder._read_encoder()))
    decoder._settings = settings
    if settings.decodes_categories:
        decoder._fitted = roles.read(CategoryDecoder, settings, folder / "encoder")
        decoder.classes_ = np.asarray(record["classes"])
        return decoder
    decoder._stimuli = store.read_stimuli(folder / "stimuli") if (folder / "stimuli").is_dir() else None
    centre = folder / "centre.npy"
    decoder._centre = np.load(centre, allow_pickle=False) if centre.is_file() else None
    decoder._bank = store.read_embeddings(folder / "bank")
    target = roles.complete(ImageEncoderSettings, validate_component("target", as_component(decoder.target)))
    decoder._target = roles.read(roles.find_image_encoder_role(target), target, folder / "target")
    decoder._fitted = roles.read(BrainEncoder, settings, folder / "encoder")
    decoder._fitted.bind(Context(images=decoder._stimuli))
    decoder._out_of_fold = (
        store.read_embeddings(folder / "out_of_fold") if (folder / "out_of_fold").is_dir() else None
    )
    kept = [each for each in decoder._read_captions() if (folder / "captions" / each.kind).is_dir()]
    decoder._captions = read_decoders(folder, kept, decoder._collect_material("caption")) if kept else {}
    return decoder


def _forbid_downloads(value: Any) -> Any:
    """Return plain settings in which every ``allow_download`` is off."""
    if isinstance(value, Mapping):
        return {k: False if k == "allow_download" else _forbid_downloads(entry) for k, entry in value.items()}
    return [_forbid_downloads(entry) for entry in value] if isinstance(value, list) else value
