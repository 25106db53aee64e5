"""Make ``python -m braindecode_vis`` the command line."""

from braindecode_vis.cli import main

if __name__ == "__main__":
    main()
