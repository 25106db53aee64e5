"""The order of the checks: what one has found is beside what the next one finds."""

import numpy as np
import pytest

from braindecode_vis.parts.audit import run as auditing
from braindecode_vis.pipeline.leaks.findings import AuditFinding
from tests.parts.audit.small_runs import write_bank, write_prepared, write_trained

DATA = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)


def find(name):
    def check(run, **_):
        return [AuditFinding(name, "ok", "fine.")]

    check.__name__ = f"check_{name}"
    return check


@pytest.mark.parametrize("is_trained", [True, False])
@pytest.mark.parametrize("refit", [True, False])
def test_every_group_of_checks_adds_to_what_was_found(tmp_path, monkeypatch, is_trained, refit):
    prepared = write_prepared(tmp_path, DATA, [(range(4, 12), range(4))])
    if is_trained:
        write_trained(
            tmp_path, prepared, write_bank(tmp_path, prepared, [f"i{row:03d}" for row in range(12)], DATA)
        )
    for name in ("FIRST", "SPLIT", "STATISTICS", "FITS", "CHOICES", "SETTINGS"):
        monkeypatch.setattr(auditing, name, [find(name.lower())])
    monkeypatch.setattr(auditing, "check_refit", find("refit"))
    monkeypatch.setattr(auditing, "STEPS", [("score", find("steps"))])
    monkeypatch.setattr(auditing, "open_recomputed", lambda *_: None)
    names = [item.check for item in auditing.audit_run(tmp_path, refit=refit).findings]
    fits = ["fits", "choices"] if is_trained else ["training"]
    wanted = ["first", "split", "statistics", *fits, "settings"] + ["refit"] * refit + ["steps"] * is_trained
    assert names == wanted
