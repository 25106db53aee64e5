"""Make ``python -m braindecode_vis`` the command line."""

import os
import sys

if __name__ == "__main__":
    # Python puts the current folder first, where a file with the name of any module would be run in its place. The
    # installed command has no such entry either.
    if not sys.flags.safe_path and sys.path[0] in ("", os.getcwd()):  # noqa: PTH109  pathlib takes longer
        del sys.path[0]
    from braindecode_vis.cli import main

    main()
