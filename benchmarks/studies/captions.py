"""Captions of simulated EEG: by the brain encoder itself, from embeddings, and by a decoder that has learnt from texts.

    braindecode-vis phantom things-eeg2 --size demo --concepts 320 --test-concepts 100 --test-repetitions 20 \
        --snr 0.05 --out PHANTOM
    python benchmarks/studies/captions.py PHANTOM --out FOLDER --seeds 3
    python benchmarks/studies/captions.py PHANTOM --out FOLDER63 --only brain --set dataset.channels=all63

A fifth of the training concepts is asked for, as in the ladder; nothing of it is learnt from, and no test trial is
opened. Captions are the exact descriptions of ``phantom_truth``. Encoders see averages of random repetitions and are
those of the ladder's stage ``worth``; a tenth of their concepts is held out, and predictions of these are what a gap is
measured on. The target in words is predicted by ridge. Scores of a caption are the F1 of its words (ROUGE-1), the
cosine of its sentence vector to that of the description, and the share of the seven attributes that it names in their
place; chance is the same of the captions of other concepts. Intervals are 95 % bootstraps over concepts of the mean
over seeds. What is done already is kept in FOLDER.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ladder import Task, change, combine, name_units, open_tasks, slug, write_limits

from braindecode_vis.base import roles
from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.contracts import BrainEncoder, Context, ImageEncoder
from braindecode_vis.base.registry import validate_component
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.datasets.drawn.images import describe_attributes
from braindecode_vis.embeddings.caption_bank import read_caption_bank
from braindecode_vis.embeddings.sentence_encoder import (
    MINILM,
    MinilmConfig,
    SentenceEncoder,
    find_sentence_folder,
)
from braindecode_vis.generation.captions import fit_decoder
from braindecode_vis.generation.captions_config import CocaCaptionsConfig, NearestCaptionsConfig
from braindecode_vis.generation.generator_data import GeneratorData
from braindecode_vis.pipeline.preparing import pick_labelled_trials
from braindecode_vis.scoring.crossed import interval_of_rows, paired_difference
from braindecode_vis.scoring.metrics.caption_metrics import compute_caption_metrics
from braindecode_vis.scoring.uncertainty import correct_holm

CLIP = "CLIP"
#: What a decoder of texts alone is given to bridge the gap.
GAPS: dict[str, dict[str, Any]] = {
    "no correction": {"shift": False, "noise": "none"},
    "shift": {"noise": "none"},
    "noise as measured": {"shift": False},
    "shift, noise as measured": {},
    "shift, covariance as measured": {"noise": "covariance"},
    "shift, noise of 0.08": {"sigma": 0.08},
}


def list_encoders(captions: str) -> dict[str, dict[str, Any]]:
    """Return the settings of every brain encoder of images."""
    base = change(combine("eegproject, width 256"), epochs=20, optimiser={"lr": 3e-4})
    base = change(base, selection={"kind": "last", "hold_out": 0.1})
    clip, windows = {"kind": "clip"}, change(base, network={"kind": "tsconv"})

    def learn(rung: Any, **options: Any) -> dict[str, Any]:
        objectives = [clip, {"kind": "captioning", "weight": 1, **options}]
        return dict(change(rung, objectives=objectives, captions=captions).encoder)

    def learn_longer(rung: Any, epochs: int = 60, **options: Any) -> dict[str, Any]:
        # A decoder of words needs more and larger steps than a contrast, whose 180 leave it with few sentences.
        return learn(change(rung, epochs=epochs, optimiser={"lr": 1e-3}), width=64, n_queries=4, **options)

    return {
        CLIP: base.encoder,
        "written from the output": learn(base, reads="output"),
        "written from the output, no contrast with texts": learn(base, reads="output", contrast=0),
        "written from windows": learn(windows),
        "written from the output, larger steps": learn_longer(base, 20, reads="output"),
        "written from the output, longer": learn_longer(base, reads="output"),
        "written from the output, longer, dropout": learn_longer(base, reads="output", dropout=0.4),
        "written from the output, longest": learn_longer(base, 120, reads="output"),
        "written from windows, longer": learn_longer(windows),
    }


class Study:
    """One phantom: what is learnt from, what is asked for, and its descriptions."""

    def __init__(self, task: Task, captions: Path, out: Path) -> None:
        self.task, self.captions, self.out = task, captions, out
        self.bank = read_caption_bank(captions)
        self.asked = pick_labelled_trials(task.prepared, task.asked, "averaged")
        self.sentences = SentenceEncoder(find_sentence_folder(MINILM, "captions"))
        self.truth = pd.read_csv(task.truth / "attributes.csv", index_col="id")

    def fit(self, settings: dict[str, Any], bank: Embeddings, seed: int, repeats: str = "single") -> Any:
        """Return a fitted encoder and its training trials."""
        trials = pick_labelled_trials(self.task.prepared, self.task.train, repeats)
        encoder = roles.build(BrainEncoder, validate_component("encoder", settings), seed=seed)
        encoder.bind(Context(images=self.task.prepared.stimuli))
        return encoder.fit(trials, bank.select(list(trials.stimulus_ids))), trials

    def decode(
        self, settings: Any, data: GeneratorData, rows: Embeddings, seed: int
    ) -> tuple[list[str], dict[str, Any]]:
        decoder = fit_decoder(settings, data, seed=seed)
        return decoder.decode(rows), getattr(decoder, "described", {})

    def write_from_brain(self, seed: int) -> Iterator[tuple[str, Callable[[], list[str]]]]:
        """Yield the rows of encoders that write themselves."""
        for name, settings in list_encoders(str(self.captions)).items():
            if name != CLIP:
                yield name, lambda n=name, s=settings: self.describe(n, s, seed)

    def describe(self, name: str, settings: dict[str, Any], seed: int) -> list[str]:
        """Return what an encoder writes, and tell how it does on images that it has learnt from."""
        encoder, _ = self.fit(settings, self.task.bank, seed)
        learnt = pick_labelled_trials(self.task.prepared, self.task.train, "averaged")
        rows = make_generator(seed, "learnt").permutation(learnt.n_trials)[: self.asked.n_trials]
        some = learnt.select(np.sort(rows))
        named = self._compare(some.stimulus_ids.astype(str), encoder.describe(some))["named"]
        print(f"{name}, seed {seed}: {named.mean():.3f} named of training images", flush=True)
        return list(encoder.describe(self.asked))

    def write_from_images(self, seed: int) -> Iterator[tuple[str, Callable[[], list[str]]]]:
        """Yield the rows of decoders of predicted embeddings of images."""
        bank = self.task.bank
        made: dict[str, Any] = {}

        def prepare() -> tuple[GeneratorData, Embeddings]:
            if not made:
                encoder, trials = self.fit(list_encoders("")[CLIP], bank, seed)
                known = bank.select(list(pd.unique(trials.stimulus_ids)))
                known = encoder.map_for_generator(known)
                held = encoder.predict_out_of_fold(trials, bank.select(list(trials.stimulus_ids)))
                stimuli = self.task.prepared.stimuli
                made["data"] = GeneratorData(None, known, stimuli, held)
                made["predicted"] = encoder.predict_for_generator(self.asked)
            return made["data"], made["predicted"]

        def ask(settings: Any) -> list[str]:
            return self.decode(settings, *prepare(), seed)[0]

        yield "nearest training image", lambda: ask(NearestCaptionsConfig(bank=self.captions, device="cpu"))
        for name, options in {
            "decoder of embeddings, learnt from images": {},
            "the same with the gap bridged": {"gap": {}},
            "decoder of embeddings, learnt from predictions": {"learns_from": "predictions"},
        }.items():
            yield name, lambda o=options: ask(self.make(**o))
        truth = bank.select([str(i) for i in self.asked.stimulus_ids])
        yield (
            "decoder of embeddings, of true ones",
            lambda: self.decode(self.make(), prepare()[0], truth, seed)[0],
        )

    def make(self, **options: Any) -> CocaCaptionsConfig:
        return CocaCaptionsConfig(
            bank=self.captions,
            width=64,
            depth=2,
            n_queries=4,
            epochs=30,
            batch_size=64,
            learning_rate=2e-3,
            device="cpu",
            **options,
        )

    def write_from_sentences(self, seed: int) -> Iterator[tuple[str, Callable[[], list[str]]]]:
        """Yield the rows of a ridge that predicts sentence vectors of the descriptions."""
        stimuli, made = self.task.prepared.stimuli, {}

        def prepare() -> tuple[GeneratorData, Embeddings, Embeddings]:
            if not made:
                side = roles.build(ImageEncoder, MinilmConfig(captions=self.captions))
                bank = side.embed(stimuli, [], None)
                ridge = {"kind": "ridge", "alphas": [1e2, 1e3, 1e4, 1e5, 1e6]}
                encoder, trials = self.fit(ridge, bank, seed, "averaged")
                held = encoder.predict_out_of_fold(trials, bank.select(list(trials.stimulus_ids)))
                known = bank.select(list(pd.unique(trials.stimulus_ids)))
                # The rest of the run's images is what is asked for: none of their texts may be learnt from.
                made["all"] = (
                    GeneratorData(side, known, stimuli, held, Context(images=stimuli)), encoder.predict(self.asked),
                    bank.select([str(i) for i in self.asked.stimulus_ids]),
                )  # fmt: skip
            return made["all"]

        def ask(settings: Any, of: int = 1) -> list[str]:
            return self.decode(settings, prepare()[0], prepare()[of], seed)[0]

        yield (
            "words: nearest training image",
            lambda: ask(NearestCaptionsConfig(bank=self.captions, device="cpu")),
        )
        yield "words: decoder learnt from the images' vectors", lambda: ask(self.make())
        predictions = {"learns_from": "predictions"}
        yield "words: decoder learnt from predictions", lambda: ask(self.make(**predictions))
        for name, gap in GAPS.items():
            yield f"texts alone: {name}", lambda g=gap: ask(self.make(learns_from="texts", gap=g))
        further = {"learns_from": "texts", "texts": self.list_further()}
        yield "texts alone: shift, noise as measured, 2000 further texts", lambda: ask(self.make(**further))
        true = {"learns_from": "texts", "gap": {"shift": False, "sigma": 0.04}}
        yield "texts alone: of true vectors", lambda: ask(self.make(**true), 2)

    def list_further(self) -> Path:
        """Return a file of descriptions of things that no image of the phantom shows together."""
        path = self.out / "further.csv"
        if not path.exists():
            rng, words, rows = make_generator(0, "further texts"), self.truth.astype(str), []
            known = set(zip(words["shape"], words["colour"], words["texture"], strict=True))
            while len(rows) < 2000:
                drawn = {name: str(rng.choice(words[name].unique())) for name in words.columns}
                if (drawn["shape"], drawn["colour"], drawn["texture"]) not in known:
                    rows.append({"id": f"further{len(rows)}", **drawn})
            describe_attributes(pd.DataFrame(rows)).to_csv(path, index=False)
        return path

    def score(self, captions: list[str]) -> pd.DataFrame:
        """Return the scores of each caption, and those that it would have as one of another concept."""
        ids = self.asked.stimulus_ids.astype(str)
        concepts = self.asked.trials["concept"].astype(str).to_numpy()
        columns: dict[str, Any] = {"id": ids, "concept": concepts, "subject": "01", "caption": captions}
        columns |= self._compare(ids, captions)
        rng, order = make_generator(0, "other concepts"), np.arange(len(ids))
        while (concepts[order] == concepts).any():
            wrong = np.flatnonzero(concepts[order] == concepts)
            other = rng.integers(len(ids), size=len(wrong))
            order[wrong], order[other] = order[other], order[wrong].copy()
        chance = self._compare(ids, [captions[row] for row in order])
        return pd.DataFrame(columns | {f"chance {name}": values for name, values in chance.items()})

    def _compare(self, ids: np.ndarray, captions: list[str]) -> dict[str, np.ndarray]:
        references = [self.bank[name] for name in ids]
        found = compute_caption_metrics(
            references, [text or "nothing" for text in captions], encoder=self.sentences
        )
        named = [name_parts(text, self.truth.loc[name]) for name, text in zip(ids, captions, strict=True)]
        parts = pd.DataFrame(named)
        return {
            "rouge1": found["rouge1"], "cosine": found["sentence_similarity"], "named": parts.mean(axis=1).to_numpy(),
            **{name: parts[name].to_numpy() for name in ("shape", "colour", "texture", "background")},
        }  # fmt: skip


def name_parts(caption: str, truth: pd.Series) -> dict[str, bool]:
    """Return which attributes a caption names, a colour and an accent each in its place."""
    before, _, after = caption.replace(",", " ,").partition(" with ")
    places = {"colour": before, "accent": after.partition(",")[0]}
    words = {name: str(truth[name]).replace("_", " ") for name in truth.index}
    return {
        name: f" {word} " in f" {places.get(name, caption.replace(',', ' '))} "
        for name, word in words.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], help="changes of the configuration")
    parser.add_argument("--only", choices=("brain", "images", "words"), help="some of the rows")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    (task,) = open_tasks(options.root, options.out / "run", "worth", "phantom_eeg", options.set)
    study = Study(task, task.truth / "descriptions.csv", options.out)
    found: dict[str, list[pd.DataFrame]] = {}
    for seed in range(options.seeds):
        kinds = {
            "brain": study.write_from_brain,
            "images": study.write_from_images,
            "words": study.write_from_sentences,
        }
        rows = [row for kind, write in kinds.items() if options.only in (None, kind) for row in write(seed)]
        for name, write in rows:
            path, started = options.out / f"{slug(name)}-{seed}.csv", time.process_time()
            if not path.exists():
                study.score(write()).to_csv(path, index=False)
                print(f"{name}, seed {seed}: {time.process_time() - started:.0f} s", flush=True)
            found.setdefault(name, []).append(pd.read_csv(path, keep_default_na=False))
    print(tabulate(found).to_string(index=False))


def tabulate(found: dict[str, list[pd.DataFrame]]) -> pd.DataFrame:
    """Return the mean scores with intervals, chance, and differences to the nearest image of the same target."""
    keys, rows, values = ["subject", "concept", "id"], [], {}
    for name, tables in found.items():
        together = pd.concat(tables)
        values[name] = together.groupby(keys)[["named", "rouge1", "cosine", "shape", "chance named"]].mean()
    for name, table in values.items():
        row: dict[str, Any] = {"captions": name}
        for column in ("named", "rouge1", "cosine", "shape"):
            interval = interval_of_rows(table[column].to_numpy(), **name_units(table[column]))
            row[column] = f"{table[column].mean():.3f} ({write_limits(interval)})"
        row["chance"] = f"{table['chance named'].mean():.3f}"
        reference = (
            "words: nearest training image"
            if name.startswith(("words", "texts"))
            else "nearest training image"
        )
        if name != reference and reference in values:
            other = values[reference].loc[table.index, "named"].to_numpy()
            gain = paired_difference(table["named"].to_numpy(), other, **name_units(table["named"]))
            row["difference"] = f"{gain.mean:+.3f} ({write_limits(gain.interval, '+')})"
            row["p"] = gain.p_value
        rows.append(row)
    made = pd.DataFrame(rows)
    if "p" in made:
        made.loc[made["p"].notna(), "p"] = correct_holm(made["p"].dropna().to_numpy())
    return made


if __name__ == "__main__":
    main()
