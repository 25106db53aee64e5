"""Write the list of the switcher of versions into a site, and into the sites of releases in folders beside its pages.

    python docs/write_versions.py build/docs/html 0.3.0

Every site gets the same list, so that an old version knows the newer ones. It needs Python alone.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

SITE = "https://braindecode-vis.github.io/braindecode_vis/"


def write_versions(site: Path, version: str) -> None:
    """Write ``_static/versions.json``: the version at the top of the site, then those in folders, newest first."""
    numbers = [path.name for path in site.iterdir() if re.fullmatch(r"\d+\.\d+\.\d+", path.name)]
    released = sorted(numbers, key=lambda number: tuple(map(int, number.split("."))), reverse=True)
    versions = [{"version": version, "url": SITE}]
    versions += [{"version": n, "url": f"{SITE}{n}/"} for n in released if n != version]
    for folder in (site, *(site / number for number in released)):
        (folder / "_static").mkdir(exist_ok=True)
        (folder / "_static" / "versions.json").write_text(
            json.dumps(versions, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    write_versions(Path(sys.argv[1]), sys.argv[2])
