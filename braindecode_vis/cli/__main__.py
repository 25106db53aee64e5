"""Run the command with ``python -m braindecode_vis.cli``."""

from braindecode_vis.cli import main

main()
