"""The verb ``phantom``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from braindecode_vis.cli.show import ConsoleListener, Json, complete, make_console, print_json, takes

PHANTOM_FORMATS = (
    "things-eeg2", "things-eeg2-official", "things-eeg2-250hz", "things-eeg2-ubp", "things-eeg2-neurobridge",
    "things-eeg1", "things-meg", "alljoined1", "alljoined16m", "eeg-imagenet", "bids-eeg", "nsd", "nsd-timeseries",
    "nsd-mindeye1", "nsd-mindeye2", "nsd-brain-diffuser", "things-fmri", "cneuromod-things", "vim-1", "v4-photographs",
    "mosaic", "mosaic-merged", "bold5000", "bold5000-betas", "nod", "nod-eeg", "nod-meg", "god", "deeprecon",
    "bids-fmri", "laion-fmri", "corpus", "corpus-eeg",
)  # fmt: skip
"""Formats of `phantom`, for its help; listed here because the import of the simulation takes a second."""
PHANTOM_DRIVES = ("embedded", "colours", "gabor", "random_network", "mixture")


@dataclass(frozen=True)
class SizeOptions:
    """Values that replace those of a named size; the names are the fields of `PhantomSize`."""

    n_subjects: Annotated[int | None, typer.Option("--subjects", min=1, help="Simulated subjects.")] = None
    n_train_concepts: Annotated[int | None, typer.Option("--concepts", min=1, help="Training concepts.")] = (
        None
    )
    n_train_exemplars: Annotated[
        int | None, typer.Option("--exemplars", min=1, help="Images of each of them.")
    ] = None
    n_test_concepts: Annotated[int | None, typer.Option("--test-concepts", min=2, help="Test concepts.")] = (
        None
    )
    n_sessions: Annotated[int | None, typer.Option("--sessions", min=1, help="Sessions of each subject.")] = (
        None
    )
    n_raw_sessions: Annotated[
        int | None,
        typer.Option("--raw-sessions", min=0, help="Sessions whose raw runs are written too (THINGS-MEG)."),
    ] = None
    train_repetitions: Annotated[int | None, typer.Option(min=1, help="Times a training image is seen.")] = (
        None
    )
    test_repetitions: Annotated[int | None, typer.Option(min=1, help="Times a test image is seen.")] = None
    n_imagery: Annotated[
        int | None,
        typer.Option(
            "--imagery", min=0, help="Test images that are imagined too, if the format has imagery."
        ),
    ] = None
    imagery_repetitions: Annotated[
        int | None, typer.Option(min=0, help="Times each of them is imagined.")
    ] = None
    voxel_mm: Annotated[
        float | None,
        typer.Option("--voxel-mm", help="Side of a voxel (fMRI); 1.8 gives the volumes of NSD's own files."),
    ] = None
    beta_versions: Annotated[
        str | None, typer.Option("--betas", help="Versions of NSD's betas, separated by commas, or all.")
    ] = None
    beta_form: Annotated[
        str | None, typer.Option("--beta-form", help="Files of NSD's betas: nii.gz or hdf5.")
    ] = None
    n_parcels: Annotated[
        int | None,
        typer.Option("--parcels", min=14, help="Parcels of the atlas beside fMRI; by default up to 28."),
    ] = None
    n_sites: Annotated[int | None, typer.Option("--sites", min=1, help="Sites of a corpus.")] = None
    minutes: Annotated[
        float | None, typer.Option("--minutes", min=1, help="Minutes of a corpus recorded of each subject.")
    ] = None
    n_pairs: Annotated[
        int | None,
        typer.Option(
            "--pairs", min=1, help="Pairs of test images with the same parts in another combination."
        ),
    ] = None

    def list_changes(self) -> dict[str, Any]:
        """Return the fields of `braindecode_vis.parts.phantom.PhantomSize` that change."""
        from braindecode_vis.parts import phantom as simulated

        changes = {name: _shorten(value) for name, value in vars(self).items() if value is not None}
        if versions := changes.pop("beta_versions", ""):
            changes["beta_versions"] = (
                simulated.BETA_VERSIONS if versions == "all" else tuple(versions.split(","))
            )
        return changes


def _shorten(value: Any) -> Any:
    """Return 8.0 as 8: the ledger compares the text of requests."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


@takes("debug")
def phantom(
    form: Annotated[
        str,
        typer.Argument(
            metavar="FORMAT",
            help=f"Data set to imitate: {', '.join(PHANTOM_FORMATS)}.",
            autocompletion=lambda incomplete: complete(PHANTOM_FORMATS, incomplete),
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the simulated data set.")],
    sizes: SizeOptions,
    size: Annotated[str, typer.Option("--size", help="tiny, small, demo or full.")] = "small",
    ongoing: Annotated[
        float | None,
        typer.Option(
            "--ongoing",
            min=0.0,
            help="Ongoing activity in time series of fMRI, % signal change; 0.7 in a corpus, else none.",
        ),
    ] = None,
    snr: Annotated[
        float,
        typer.Option("--snr", min=0.0, max=1000.0, help="Signal power over noise power, single trials."),
    ] = 0.1,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Root seed.")] = 0,
    drive: Annotated[
        str,
        typer.Option("--drive", help="What higher regions respond to: " + ", ".join(PHANTOM_DRIVES) + "."),
    ] = "embedded",
    changing: Annotated[
        float,
        typer.Option(
            "--changing",
            min=0.0,
            max=1.0,
            help="How much noise changes its size over time (log units); 0 is never.",
        ),
    ] = 0.0,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", min=1, help="Processes; by default one for each core if one takes a minute."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the estimated cost, and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Simulate recordings in the files of a public data set.

    Simulated subjects look at computer-drawn images; the true signal is written beside the files.
    """
    from braindecode_vis.base.checks import check_option
    from braindecode_vis.base.memory import count_cores
    from braindecode_vis.parts import phantom as simulated
    from braindecode_vis.parts.phantom import simulate

    check_option("FORMAT", form, simulated.FORMATS)
    check_option("--drive", drive, simulated.DRIVES)
    check_option("--size", size, simulated.SIZES[form])
    chosen = simulated.change_size(form, simulated.SIZES[form][size], **sizes.list_changes())
    estimate = simulate.estimate_phantom(form, chosen, drive=drive)
    # Processes take seconds to start.
    n_jobs = jobs or (count_cores() if estimate.seconds > 60 else 1)
    minutes = f"{estimate.seconds / 60:.1f} min of one core"
    if n_jobs > 1:
        minutes += f", {estimate.seconds / 60 / min(n_jobs, count_cores()):.1f} min by {n_jobs} processes"
    cost = (
        f"{form}: {estimate.n_images} images, {estimate.n_trials} trials, {estimate.recording_s / 60:.1f} min "
        f"recorded; about {estimate.n_bytes / 1e6:.0f} MB on disk and {minutes}"
    )
    make_console().print(cost, markup=False)
    if dry_run:
        if as_json:
            print_json({"run_folder": None, "scores": [], "estimate": vars(estimate)})
        return
    truth = simulate.make_phantom(
        form, out, size=chosen, snr=snr, seed=seed, ongoing=ongoing, drive=drive, changing=changing,
        listener=ConsoleListener(), jobs=n_jobs,
    )  # fmt: skip
    if as_json:
        listed = [dict(subject) for subject in truth.subjects]
        print_json({"run_folder": None, "scores": [], "root": str(truth.root), "subjects": listed})
        return
    console = make_console(stderr=False)
    console.print(f"data set: {truth.root}", markup=False)
    console.print(f"truth: {truth.folder}", markup=False)
    if form in simulated.UNLABELLED:
        table = truth.read_people()
        for (site, layout), people in table.groupby(["site", "layout"]):
            console.print(f"{truth.root / str(site)}: {layout}, {len(people)} subjects", markup=False)
        return
    for subject in truth.subjects:
        bounds = ", ".join(f"{float(top):.3f} from {n} trials" for n, top in subject["ideal_top1"].items())
        console.print(f"subject {subject['subject']}: top-1 of an ideal observer {bounds}", markup=False)
