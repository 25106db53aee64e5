"""Write ``docs/FETCHING.md``: what can be fetched of each data set, from where, how large, and under which terms.

    python docs/write_fetching.py

The tables are those of ``data_manifests``; ``tests/datasets/test_hosts.py`` fails where the page is not current.
"""

from __future__ import annotations

from pathlib import Path

from braindecode_vis.base.memory import describe_bytes
from braindecode_vis.datasets.hosts import describe_place
from braindecode_vis.datasets.manifests import Manifest, ManifestPart, read_manifests

PAGE = Path(__file__).resolve().parent / "FETCHING.md"
HEADER = """# Fetching data sets

    # into the user's cache; --root DIR for elsewhere
    braindecode-vis fetch digits69
    # addresses, sizes, checksums and terms; nothing is fetched, and no terms need be accepted
    braindecode-vis fetch nsd --subject 1 --dry-run
    braindecode-vis fetch things_meg --subject 1,2 --root /data/things-meg
    braindecode-vis fetch nsd --subject 1 --parts design,betas --root /data/nsd --accept-terms
    # asks each address whether it answers
    braindecode-vis fetch things_eeg2 --check-addresses

In Python, `bdv.load("digits69", download=True)` fetches and opens a data set in one line. Without a folder it goes
below `$BRAINDECODE_VIS_DATA`, or `datasets` in the user's cache folder.

The size and the free space are told before anything moves. Files come side by side (`--jobs`), grow as `.part`, are
compared with the published size and checksum and renamed; a call that was stopped or broke off goes on where it was,
and a second one asks for nothing and reads nothing (`.fetched.json` holds what was verified). Archives are unpacked
and removed. A wrong file is thrown away with a sentence and exit code 2. One call at a time fills a folder. A file of
your own under the name of a published one is replaced. `--parts all` fetches what the default leaves out.

What comes under terms needs `--accept-terms`, after you have read them; what is behind a form, a password or a login
is never fetched: the table says what to do. No password is shipped.

**How sure an address is.** *Verified*: read in its owner's own repository, mirror or code, in stored copies.
*Second-hand*: in other people's scripts. *Unconfirmed*: neither. None was reached while this was written:
`--check-addresses` tells on a machine with a network, and a file that is not what is published is refused. Where a
host publishes a list of its files (OpenNeuro and NSD by bucket, NEMAR, figshare, OSF, the Hugging Face hub), the list
is read when you fetch, and sizes and checksums with it; OpenNeuro's and NSD's lists tell sizes alone. The files of
the default parts of digits69, haxby_slices, muse_n170, things_eeg1, things_meg and cneuromod_things stand in
`data_manifests` with their checksums, most of those on OpenNeuro with the version in its bucket as well, so that a
later snapshot changes nothing.

"""


def write_row(manifest: Manifest, part: ManifestPart) -> str:
    """Return the line of one part."""
    size = part.count_bytes()
    shared = len(part.list_subjects())
    command = (
        f"`fetch {manifest.name} --parts {part.name}`" if not part.default else f"`fetch {manifest.name}`"
    )
    cells = [
        part.name,
        part.what,
        "" if part.access == "by_hand" else "shown when fetched" if size is None else describe_bytes(size),
        str(shared or ""),
        {"open": "open", "terms": f"`--accept-terms`: {part.gate}", "by_hand": f"by hand: {part.gate}"}[
            part.access
        ],
        "" if part.access == "by_hand" else f"{describe_place(part)}, {part.mark}",
        "" if part.access == "by_hand" else command,
    ]
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


def write_page() -> str:
    """Return the whole page."""
    sections = []
    for manifest in read_manifests().values():
        if manifest.parts:
            rows = "\n".join(write_row(manifest, part) for part in manifest.parts)
            sections.append(
                f"## {manifest.name}\n\n{manifest.title}. Licence: {' '.join(manifest.licence.split())}.\n\n"
                "| part | what | size | subjects | access | from | command |\n|---|---|---|---|---|---|---|\n"
                f"{rows}\n"
            )
    return HEADER + "\n".join(sections)


if __name__ == "__main__":
    PAGE.write_text(write_page())
