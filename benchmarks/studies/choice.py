"""The encoder `auto` beside ridge (of classes: lda) on recordings, by folds, paired.

    python benchmarks/studies/choice.py v4_201025.npz --target efficientnet-lite0 --folds 3
    python benchmarks/studies/choice.py digits69 --root ROOT --target pixels --folds 5
    python benchmarks/studies/choice.py haxby_slices --root ROOT --set acq=1slice

A file holds the arrays ``X`` (one row per picture) and ``images``; a name is that of a data set. Images are parted into
folds and searched among those of their fold, by two-way identification; of classes each run is left out. All candidates
are tried, whatever they take, so that the choice does not depend on the machine; seconds are those of the processor.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

import braindecode_vis as bdv
from braindecode_vis.base import roles
from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.registry import validate_component
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.preprocessing.splits import make_inner_folds
from braindecode_vis.scoring.crossed import interval_of_rows, paired_difference
from braindecode_vis.scoring.retrieval import (
    compute_k_way_hits,
    compute_ranks,
    compute_top_k_hits,
    fit_centre,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="an .npz file, or the name of a data set")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--target", help="kind of the image encoder; none decodes classes")
    parser.add_argument("--folds", type=int, default=5)
    options = parser.parse_args()
    if options.data.endswith(".npz"):
        arrays = np.load(options.data)
        data = bdv.from_arrays(arrays["X"], images=arrays["images"])
    else:
        data = bdv.load(options.data, options.root, **dict(entry.split("=", 1) for entry in options.set))
    responses, by_class = data.responses, options.target is None
    ids = responses.stimulus_ids.astype(str)
    if by_class:
        targets, units = (
            data.stimuli.concepts_of(ids).astype(str),
            responses.trials["run"].astype(str).to_numpy(),
        )
        folds = [(np.flatnonzero(units != run), np.flatnonzero(units == run)) for run in np.unique(units)]
    else:
        image_encoder = validate_component("target", {"kind": options.target}).build()
        vectors = image_encoder.encode(data.stimuli.iterate_images(list(ids)))
        targets, units = Embeddings(np.asarray(vectors, np.float32), ids, options.target), ids
        parts = make_inner_folds(ids, n_folds=options.folds, generator=make_generator(0, "choice", "folds"))
        folds = [(part.train, part.test) for part in parts]
    names = ("lda" if by_class else "ridge", "auto")
    settings = (
        {"kind": names[0]},
        {"kind": "auto", "budget": None, "candidates": "classes" if by_class else "images"},
    )
    scores, top5, order, took = ([], []), ([], []), [], np.zeros(2)
    for number, (train, test) in enumerate(folds):
        order += list(units[test])
        for place, asked in enumerate(settings):
            config = validate_component("encoder", asked)
            encoder = roles.build(roles.find_encoder_role(config), config, seed=0)
            started, seen = time.process_time(), responses.select(test)
            if by_class:
                encoder.fit(responses.select(train), targets[train])
                named = np.asarray(encoder.classes)[encoder.decision(seen).argmax(axis=1)]
                scores[place].extend((named == targets[test]).astype(float))
            else:
                taught = targets.select(list(ids[train]))
                encoder.fit(responses.select(train), taught)
                centre = fit_centre(targets.select(list(dict.fromkeys(ids[train]))), "mean")
                gallery = targets.select(list(dict.fromkeys(ids[test])))
                found = compute_ranks(
                    centre.apply(encoder.predict(seen)), centre.apply(gallery), device="cpu"
                )
                scores[place].extend(compute_k_way_hits(found, 2))
                top5[place].extend(compute_top_k_hits(found, 5))
            took[place] += time.process_time() - started
        record = encoder.record
        inner = ", ".join(f"{one['kind']} {one.get('mean', np.nan):.4f}" for one in record["candidates"])
        print(f"fold {number}: {record['candidates'][record['chosen']]['kind']} of {inner}", flush=True)
    unit = "run" if by_class else "image"
    for place, name in enumerate(names):
        found = interval_of_rows(np.array(scores[place]), clusters=order, unit=unit, over_folds=True)
        more = "" if by_class else f", top-5 {np.mean(top5[place]):.3f}"
        print(
            f"{name}: {found.value:.4f} ({found.low:.4f} to {found.high:.4f}){more}, {took[place] / len(folds):.2g} s"
        )
    gain = paired_difference(
        np.array(scores[1]), np.array(scores[0]), clusters=order, unit=unit, over_folds=True
    )
    low, high, resampled = gain.interval.low, gain.interval.high, gain.interval.resampled
    limits = "" if low is None else f"{low:+.4f} to {high:+.4f}; "
    print(f"difference: {gain.mean:+.4f} ({limits}{resampled}), p = {gain.p_value:.4f}")


if __name__ == "__main__":
    main()
