"""Subjects who are tested, and whose other recordings the encoder was pretrained on: refused, or named in the protocol.

Owns who counts as the same person: a subject of the data set at hand with the same label, and whoever the corpus calls
so (``corpus --people``). Two data sets that give one person two labels, without such a table, cannot be seen through.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from braindecode_vis.base import store
from braindecode_vis.base.checks import BraindecodeVisError, ConfigError, DataError
from braindecode_vis.config import RunConfig
from braindecode_vis.datasets.corpus.recordings import read_source_card
from braindecode_vis.datasets.manifests import find_manifest
from braindecode_vis.encoders.parcels_config import ParcelsConfig, read_description
from braindecode_vis.training.pretraining_data import read_learnt


def describe_pretraining(config: RunConfig, tested: Collection[str], made: Path | None = None) -> str:
    """Return what the encoder of a run was pretrained on, in words for its protocol; empty where that is not known.

    Parameters
    ----------
    config
        Of the run.
    tested
        Labels of the subjects who are tested.
    made
        What the run has pretrained, which knows its corpora where those are gone.

    Raises
    ------
    ConfigError
        If a tested subject is among the persons of a corpus, and ``pretrain.shared_subjects`` does not name them.
    """
    earlier = list_earlier(config, made)
    corpora = list_corpora(config, made) or earlier
    if not corpora:
        return config.pretrain.on_trials if config.uses_pretraining and config.pretrain is not None else ""
    shared = find_shared_subjects([*corpora, *earlier], name_sources(config), tested)
    if shared and (config.pretrain is None or config.pretrain.shared_subjects == "refuse"):
        names = ", ".join(dict.fromkeys(str(corpus["name"]) for corpus in [*corpora, *earlier]))
        raise ConfigError(
            f"subject(s) {', '.join(shared)} are tested here, and the encoder is pretrained on recordings of them "
            f"(corpus {names}); hold them out there (corpus --hold-out {name_sources(config)[0]}/{shared[0]}), or set "
            "pretrain.shared_subjects=named, which the protocol will say."
        )
    n, hours = (sum(corpus[key] for corpus in corpora) for key in ("n_persons", "hours"))
    words = f"encoder pretrained without labels on corpora of {n} persons, {hours:.4g} h"
    if config.uses_pretraining and config.pretrain is not None and not config.pretrain.corpus:
        words = f"{config.pretrain.on_trials}, begun from corpora of {n} persons, {hours:.4g} h"
    return f"{words}, recordings of tested subject(s) {', '.join(shared)} among them" if shared else words


def find_shared_subjects(
    corpora: Sequence[Mapping[str, Any]], sources: Sequence[str], tested: Collection[str]
) -> list[str]:
    """Return the tested subjects among the persons that corpora learn from; whom they hold out is not among these.

    Parameters
    ----------
    corpora
        Each with `subjects`: rows of `source`, `subject` and `person`.
    sources
        Names of the data set at hand.
    tested
        Labels of its tested subjects.

    Examples
    --------
    >>> rows = [{"source": "BOLD5000", "subject": "CSI1", "person": "BOLD5000/CSI1"}]
    >>> find_shared_subjects([{"subjects": rows}], ["bold5000"], ["CSI1", "CSI2"])
    ['CSI1']
    """
    learnt = [row for corpus in corpora for row in corpus["subjects"]]
    who = {
        _fold_name(name)
        for row in learnt
        for name in (f"{row['source']}/{row['subject']}", str(row["person"]))
    }
    return sorted(
        s for s in {str(s) for s in tested} if {_fold_name(f"{source}/{s}") for source in sources} & who
    )


def list_corpora(config: RunConfig, made: Path | None = None) -> list[dict[str, Any]]:
    """Return of each corpus that the encoder comes from its name, hours, persons and subjects, as far as known."""
    named: Any = config.pretrain.corpus if config.uses_pretraining and config.pretrain is not None else ()
    if named and all(Path(folder).expanduser().is_dir() for folder in named):
        return [_describe_corpus(Path(folder).expanduser()) for folder in named]
    folder = getattr(getattr(config.encoder, "network", None), "pretrained", None)
    folder = (made if named else None) if config.uses_pretraining else folder
    return [] if folder is None else _keep_known(read_description(Path(folder)).get("corpora", []))


def list_earlier(config: RunConfig, made: Path | None = None) -> list[dict[str, Any]]:
    """Return the corpora that the encoder, or one of a branch, had learnt from before those of `list_corpora`.

    They are known from ``start_from``, and from the folders or files that encoders start from.
    """
    starts = [made]
    if config.uses_pretraining and config.pretrain is not None:
        starts.append(config.pretrain.start_from)
    for key, settings in config.walk():
        if isinstance(settings, ParcelsConfig) and key.startswith(("encoder.", "reconstruction.")):
            starts.append(settings.pretrained if isinstance(settings.pretrained, Path) else None)
    known = [s for s in starts if s is not None and s.expanduser().exists()]
    found: dict[str, dict[str, Any]] = {}
    for corpus in _keep_known([corpus for start in known for corpus in read_learnt(start)]):
        found.setdefault(store.hash_json(corpus), corpus)
    return list(found.values())


def name_sources(config: RunConfig) -> list[str]:
    """Return what a corpus may call the data set of a run: by its description, by its manifest, by its kind."""
    dataset: Any = config.dataset
    names, root = [], getattr(dataset, "root", None)
    if root is not None:
        with suppress(BraindecodeVisError, OSError):  # the data may lie elsewhere by now
            names.append(read_source_card(Path(root).expanduser()).name)
    with suppress(BraindecodeVisError, KeyError):  # of own data there is no manifest
        names.append(find_manifest(dataset.kind).title)
    return [*names, str(dataset.kind)]


def _describe_corpus(folder: Path) -> dict[str, Any]:
    from braindecode_vis.datasets.corpus.reader import open_corpus

    corpus = open_corpus(folder)
    runs = corpus.runs
    runs = runs[~runs["held_out"].to_numpy(bool)]
    if not len(runs):
        raise DataError(f"the corpus {folder} holds every person out, so that there is nobody to learn from.")
    return {
        "name": folder.name, "n_persons": int(runs["person"].nunique()), "hours": float(runs["hours"].sum()),
        "subjects": corpus.list_subjects(),
    }  # fmt: skip


def _keep_known(found: Sequence[Any]) -> list[dict[str, Any]]:
    known = {"name", "n_persons", "hours", "subjects"}
    return [corpus for corpus in found if isinstance(corpus, dict) and known <= set(corpus)]


def _fold_name(name: str) -> str:
    """Return a name without case, prefixes and leading zeros, which sources spell differently.

    Examples
    --------
    >>> _fold_name("BOLD5000/sub-CSI1") == _fold_name("bold5000/csi1"), _fold_name("NSD/subj01")
    (True, 'nsd/1')
    """
    source, _, subject = name.casefold().rpartition("/")
    return f"{source}/{re.sub(r'^(sub-|subj|sub)', '', subject).lstrip('0')}"
