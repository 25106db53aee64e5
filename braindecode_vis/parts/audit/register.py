"""What the part brings: its verbs."""

from braindecode_vis.parts.audit import verbs

VERBS = {"audit": verbs.audit}
