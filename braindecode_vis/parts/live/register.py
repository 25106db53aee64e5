"""What the part brings: its verbs."""

from braindecode_vis.parts.live import stream_verbs, verbs

VERBS = {"stream": stream_verbs.stream, "live": verbs.live}
