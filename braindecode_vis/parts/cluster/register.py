"""What the part brings: its verbs."""

from typing import Any

from braindecode_vis.parts.cluster import plan_verbs, verbs

VERBS = {"plan": plan_verbs.plan, "status": verbs.status, "collect": verbs.collect, "cancel": verbs.cancel}

#: How a verb is told that it may be sent as a job.
WRAP = verbs.on_cluster


def send_sweep(*given: Any) -> Any:
    """Send a sweep as jobs."""
    from braindecode_vis.parts.cluster.sweep_verb import _sweep_on_cluster

    return _sweep_on_cluster(*given)


SEND_SWEEP = send_sweep
