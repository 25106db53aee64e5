"""Further sessions of the phantom NSD's subjects: NSD-Imagery, where some pictures are seen and then imagined.

The stimulus list of NSD-Imagery has the keys that readers ask for (`exps`, `cues`, `image_map`); attention trials show
the same pictures as vision trials.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis.phantom.bold_signal import iterate_betas
from braindecode_vis.phantom.brain import Person
from braindecode_vis.phantom.format_plan import TRUTH, PhantomJob, Progress
from braindecode_vis.phantom.formats.file_writers import write_tsv
from braindecode_vis.phantom.formats.nsd_files import beta_folder, make_subject_scanner, write_beta_file
from braindecode_vis.phantom.formats.pickles import split_pickle
from braindecode_vis.phantom.scanner import iterate_volumes
from braindecode_vis.phantom.sizes import PhantomSize
from braindecode_vis.seeds import make_generator
from braindecode_vis.store import replace_atomically

VERSION = "betas_fithrf_GLMdenoise_RR"
IMAGERY_SETS = ("A", "B", "C")
_EXPS = ("vis{}", "att{}", "img{}_1", "img{}_2")
_IMAGERY_SEED = 1 << 40  # trial names of NSD-Imagery lie beyond those of the main experiment


def count_imagery(size: PhantomSize) -> int:
    """Return the trials of NSD-Imagery of one person: seen, attended and imagined."""
    # Seen and attended images get half of the repetitions each.
    return (size.n_imagery or 0) * (size.imagery_repetitions or 0) * 2


@lru_cache(maxsize=4)
def make_imagery_design(job: PhantomJob) -> pd.DataFrame:
    """Return the trials of NSD-Imagery, the same for every subject.

    As in the published order of runs: each set is seen in one run, attended in one, and imagined in two.

    Returns
    -------
    DataFrame
        `run` (from 1), `exp`, `cue`, `stimulus_id`, `row` of the image, `imagined`.
    """
    size = job.size
    rows = job.test_rows[: size.n_imagery or 0]
    sets = np.array_split(rows, len(IMAGERY_SETS))
    half = (size.imagery_repetitions or 0) // 2
    generator = make_generator(job.config.seed, "nsd-imagery")
    # Runs 1-3 are seen, 4-6 attended, 7-12 imagined.
    runs = [
        (form.format(name), group) for form in _EXPS for name, group in zip(IMAGERY_SETS, sets, strict=True)
    ]
    table = pd.concat(
        [
            pd.DataFrame({"run": run, "exp": exp, "row": generator.permutation(np.repeat(group, half))})
            for run, (exp, group) in enumerate(runs, start=1)
        ],
        ignore_index=True,
    )
    # A letter a picture, as on the screen; doubled after Z.
    cues = {row: chr(ord("A") + number % 26) * (number // 26 + 1) for number, row in enumerate(rows.tolist())}
    return table.assign(
        cue=table["row"].map(cues),
        stimulus_id=job.table["stimulus_id"].to_numpy()[table["row"]],
        imagined=table["exp"].str.startswith("img"),
    )


def write_imagery_design(job: PhantomJob) -> list[Path]:
    """Write ``nsdimagery_stimuli.pkl3``, the pictures under the names it gives, and the same table in the truth."""
    design = make_imagery_design(job)
    folder = job.root / "nsddata_stimuli" / "stimuli"
    names = dict(zip(design["cue"], design["stimulus_id"], strict=True))
    content = {
        "exps": design["exp"].tolist(),
        "cues": design["cue"].tolist(),
        "image_map": {cue: names[cue] for cue in sorted(names)},
    }
    paths = [folder / "nsdimagery_stimuli.pkl3"]
    with replace_atomically(paths[0]) as temporary:
        temporary.write_bytes(b"".join(split_pickle(content, container="pickle", protocol=3)))
    (folder / "nsdimagery").mkdir(exist_ok=True)
    for row in design["row"].unique():
        source = job.root / job.table["path"].iloc[row]
        paths.append(folder / "nsdimagery" / source.name)
        with replace_atomically(paths[-1]) as temporary:
            temporary.write_bytes(source.read_bytes())
    return [*paths, write_tsv(job.root / TRUTH / "nsdimagery_trials.tsv", design)]


def write_imagery(job: PhantomJob, person: Person, progress: Progress) -> list[Path]:
    """Write ``nsdimagerybetas_fithrf_GLMdenoise_RR/betas_nsdimagery.nii.gz`` of one subject."""
    design = make_imagery_design(job)
    seeds = _IMAGERY_SEED + np.arange(len(design))

    def iterate() -> Iterator[np.ndarray]:
        for imagined in (False, True):  # imagined runs come last
            part = design[design["imagined"] == imagined]
            yield from iterate_betas(
                person, job.scanner, part["row"].to_numpy(), seeds[part.index], imagery=imagined
            )

    scanner = make_subject_scanner(job.size.voxel_mm or 0, person.index + 1)
    folder = beta_folder(job.root, person.index + 1, f"nsdimagery{VERSION}")
    path = write_beta_file(
        folder / "betas_nsdimagery",
        iterate_volumes(scanner, progress.watch(iterate(), len)),
        shape=scanner.mask.shape,
        n_trials=len(design),
        affine=scanner.affine,
    )
    return [path]
