"""What the part brings: its verbs."""

from braindecode_vis.parts.pretraining import verbs

VERBS = {"corpus": verbs.corpus}
