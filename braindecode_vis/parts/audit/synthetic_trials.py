"""Checks synthetic trials: they use no shown image and no test trial, and are not in validation.

`check_synthetic` compares what lies in the run: ids, digests of pixels, numbers of trials, and what was held out.
`check_synthetic_again` looks for copies of test pictures, fits the encoding models again, on the training trials that
the split gives, and draws the trials anew: only if these alone come to the same numbers can nothing else have taken
part.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis.base.checks import BraindecodeVisError
from braindecode_vis.base.store import read_json
from braindecode_vis.embeddings.image_bank import is_image_bank
from braindecode_vis.parts.audit.differences import compare_files
from braindecode_vis.parts.audit.recompute import RecomputedRun
from braindecode_vis.pipeline.leaks.findings import AuditFinding
from braindecode_vis.pipeline.leaks.likeness import MOST_OTHERS, find_copies
from braindecode_vis.pipeline.leaks.run_files import AuditedRun, list_first, name_fold
from braindecode_vis.pipeline.leaks.split_overlap import count_units, hash_images
from braindecode_vis.pipeline.synthetic import PREFIX, count_synthetic, open_source, synthesise

#: Seconds that the models took by their record, up to which they are fitted again without ``--refit``.
SHORTEST_FIT = 30.0
TOLERANCE = 1e-3  # of the largest value, between machines


def check_synthetic(run: AuditedRun) -> list[AuditFinding]:
    """Compare images and numbers of synthetic trials with what was shown, trained on and held out."""
    if not run.synthetic:
        return []
    findings: list[AuditFinding] = []
    shown = set(run.responses.stimulus_ids.astype(str).tolist())
    digests = dict(zip(hash_images(run.stimuli)[0].tolist(), run.stimuli.ids.tolist(), strict=True))
    for number, (fold, record) in enumerate(zip(run.folds, run.trained, strict=False)):
        made, where = run.synthetic.get(record.upstream.get("synthesise", "")), name_fold(number)
        if made is None:
            continue
        responses = run.read_synthetic(record)[0]  # type: ignore[index]  # it is there
        names = {name.removeprefix(PREFIX) for name in responses.stimulus_ids.astype(str).tolist()}
        listed = {str(name): str(digest) for name, digest in read_json(made.path / "images.json")["images"]}
        tested = shown & names if made.fields["synthetic"]["images_digest"] == "unseen" else set[str]()
        same = {digests[digest] for digest in listed.values() if digests.get(digest) in shown}
        for some, words in ((tested, "by their id"), (same, "by their pixels")):
            if some:
                text = (
                    f"{len(some)} image(s) of synthetic trials were shown {words}, first {list_first(some)}."
                )
                findings.append(AuditFinding("synthetic", "leak", text, where))
        if unknown := names - listed.keys():
            text = f"tampered: {len(unknown)} synthetic trial(s) are of images that are not listed, first "
            findings.append(AuditFinding("synthetic", "leak", f"{text}{list_first(unknown)}.", where))
        real = count_units(run.trials, fold.train, str(record.fields.get("repeats", "single")))
        path = record.path / "network.json"
        held = {str(name) for name in read_json(path)["held_out"]} if path.is_file() else set[str]()
        if invalid := {name for name in held if name.startswith(PREFIX)}:
            text = f"{len(invalid)} synthetic image(s) are in validation, first {list_first(invalid)}."
            findings.append(AuditFinding("synthetic", "leak", text, where))
        learnt = real[~real["stimulus_id"].astype(str).isin(held)]
        share = float(made.fields["synthetic"]["share"])
        for who, rows in learnt.groupby(learnt["subject"].astype(str)):
            n = int((responses.trials["subject"].astype(str) == who).sum())
            if n != count_synthetic(len(rows), share):
                text = f"subject {who} has {n} synthetic trials, and the share {share:g} is "
                text += f"{count_synthetic(len(rows), share)} of {len(rows)} real ones."
                findings.append(AuditFinding("synthetic", "warning", text, where))
        if not np.asarray(responses.trials["synthetic"], dtype=bool).all():
            text = "tampered: synthetic trials are not marked as such."
            findings.append(AuditFinding("synthetic", "leak", text, where))
    text = "synthetic trials use no image that was shown, and none of them is in validation or test."
    return findings or [AuditFinding("synthetic", "ok", text)]


def check_synthetic_again(run: AuditedRun, again: RecomputedRun) -> list[AuditFinding]:
    """Fit the encoding models again on the training trials of each fold, and draw the synthetic trials anew."""
    if not run.synthetic:
        return []
    assert again.config.synthetic is not None
    try:
        again.config.synthetic.check_files()
    except BraindecodeVisError as error:
        run.state("fit", "by record", "synthetic trials", str(error).rstrip("."))
        return []
    findings = _check_copies(run, again)
    took = sum(float(record.content.get("seconds", np.inf)) for record in run.synthetic.values())
    if took > SHORTEST_FIT and not run.thorough:
        run.state("fit", "by record", "synthetic trials", f"they took {took:.0f} s; add --refit")
        return findings
    for record in run.synthetic.values():
        again.require_current(record)
    made = again.compute("synthesise", synthesise)
    for record in run.synthetic.values():
        text = compare_files(record.path, made[record.path.as_posix()], TOLERANCE)
        if text:
            words = f"tampered: {text}, of what an encoding model of the training trials alone expects."
            where = record.path.relative_to(run.folder).as_posix()
            findings.append(AuditFinding("synthetic", "leak", words, where))
    run.state("fit", "recomputed", "synthetic trials")
    return findings


def _check_copies(run: AuditedRun, again: RecomputedRun) -> list[AuditFinding]:
    """Look for test pictures, cropped, mirrored or compressed, among the pictures of synthetic trials."""
    what, settings = "pictures of synthetic trials", again.config.synthetic
    assert settings is not None
    if not run.stimuli.has_pixels or is_image_bank(Path(settings.images)):
        run.state("fit", "by record", what, "a bank or a data set without pictures has nothing to compare")
        return []
    findings: list[AuditFinding] = []
    for number, record in enumerate(run.trained):
        made = run.synthetic.get(record.upstream.get("synthesise", ""))
        if made is None:
            continue
        used = {str(name) for name, _ in read_json(made.path / "images.json")["images"]}
        _, read = open_source(again, settings)
        shown = pd.unique(run.responses.stimulus_ids[run.folds[number].test])
        try:
            found = find_copies(run.stimuli, shown, ((name, pixels) for name, pixels, _ in read(used)))
        except BraindecodeVisError as error:
            run.state("fit", "by record", what, str(error).rstrip("."))
            return findings
        if found:
            first, test, how = found[0]
            text = f"{len(found)} picture(s) of synthetic trials are copies of test pictures, first {first} of {test}"
            findings.append(AuditFinding("synthetic", "leak", f"{text}{how}.", name_fold(number)))
        if len(used) > MOST_OTHERS:
            run.state("fit", "by record", what, f"the first {MOST_OTHERS} of {len(used)} were compared")
    return findings
