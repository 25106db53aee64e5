"""What the part brings: its verbs."""

from braindecode_vis.parts.foundation import verbs

VERBS = {"corpus": verbs.corpus}
