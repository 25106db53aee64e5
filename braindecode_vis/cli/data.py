"""Verbs about data: fetching and checking it, simulating it, starting from one's own, and the banks of embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from braindecode_vis.cli.show import (
    ConsoleListener,
    Debug,
    Json,
    Root,
    Set,
    complete,
    complete_datasets,
    finish,
    make_console,
    print_json,
    print_scores,
)

PHANTOM_FORMATS = (
    "things-eeg2", "things-eeg2-official", "things-eeg2-250hz", "things-eeg2-ubp", "things-eeg2-neurobridge",
    "things-eeg1", "things-meg", "alljoined1", "alljoined16m", "eeg-imagenet", "bids-eeg", "nsd", "nsd-timeseries",
    "nsd-mindeye1", "nsd-mindeye2", "nsd-brain-diffuser", "things-fmri", "cneuromod-things", "vim-1", "bold5000",
    "bold5000-betas", "nod", "god", "deeprecon", "bids-fmri", "corpus", "corpus-eeg",
)  # fmt: skip
"""What `phantom` can write, for its help; the simulation takes a second to import."""


def new(
    folder: Annotated[
        Path, typer.Argument(help="Folder with data.npy, an epochs file or NIfTI, and images/.")
    ],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Look at a folder of your own data; write the table, meta.yaml and configuration that it lacks, nothing else."""
    from braindecode_vis.datasets.new_folder import CONFIG, start_folder

    started = start_folder(folder)
    if as_json:
        written = [str(path) for path in started.written]
        print_json(
            {
                "run_folder": None, "scores": [], "written": written, "notes": started.notes,
                "complete": started.complete,
            }
        )  # fmt: skip
        return
    console = make_console(stderr=False)
    for text in [*started.notes, *[f"written: {path}" for path in started.written]]:
        console.print(text, markup=False)
    root = folder.expanduser()
    first = "next" if started.complete else "next, when trials.csv is filled in"
    console.print(f"{first}: braindecode-vis run {root / CONFIG} --root {root}", markup=False)


def check(
    dataset: Annotated[str, typer.Argument(help="Name of the data set.", autocompletion=complete_datasets)],
    root: Root = None,
    overrides: Set = None,
    full: Annotated[
        bool,
        typer.Option("--full", help="Read every byte and every trial, which takes as long as reading does."),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Verify the files of a data set, name all damaged ones, and recompute every fact that its manifest declares."""
    from braindecode_vis.base.checks import DataError
    from braindecode_vis.cli import catalogue
    from braindecode_vis.config import read_config
    from braindecode_vis.datasets.manifests import read_manifest

    # A wrong name is said to be no data set, before it is looked for among configurations.
    read_manifest(dataset)
    config = read_config(dataset, overrides or [], root=root)
    findings = catalogue.check(config, full=full, listener=ConsoleListener())
    wrong = [finding for finding in findings if not finding.ok]
    if as_json:
        listed = [vars(finding) for finding in findings]
        print_json(
            {"run_folder": None, "scores": [], "dataset": dataset, "ok": not wrong, "findings": listed}
        )
    else:
        from rich.markup import escape

        console = make_console(stderr=False)
        for finding in findings:
            mark = "[green]ok   [/green]" if finding.ok else "[red]wrong[/red]"
            console.print(f"{mark} {escape(finding.item)}: {escape(finding.message)}")
    if wrong:
        raise DataError(
            f"{len(wrong)} of {len(findings)} checks of {dataset} failed; first: {wrong[0].message.rstrip('.')}."
        )


def fetch(
    dataset: Annotated[str, typer.Argument(help="Name of the data set.", autocompletion=complete_datasets)],
    root: Annotated[
        Path | None,
        typer.Option(
            "--root", help="Folder to fetch into; one of your own below the user's cache by default."
        ),
    ] = None,
    subjects: Annotated[
        str | None, typer.Option("--subjects", help="Of these alone, separated by commas: 1,2.")
    ] = None,
    parts: Annotated[
        str | None,
        typer.Option("--parts", help="These parts, separated by commas, or all; datasets NAME lists them."),
    ] = None,
    accept_terms: Annotated[
        bool,
        typer.Option(
            "--accept-terms", "--accept-licence", help="You have read and accepted the terms that are shown."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List addresses, sizes and checksums, and stop.")
    ] = False,
    check_addresses: Annotated[
        bool, typer.Option("--check-addresses", help="Ask each address whether it answers, and stop.")
    ] = False,
    jobs: Annotated[int, typer.Option("--jobs", min=1, max=32, help="Files that are fetched at once.")] = 4,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Download a data set by parts and subjects, verified, its size told first; a stopped call goes on where it was."""
    from braindecode_vis.cli import catalogue
    from braindecode_vis.datasets import fetching
    from braindecode_vis.datasets.manifests import read_manifest

    manifest = read_manifest(dataset)
    folder = root or fetching.find_data_folder(dataset)
    listener, out = ConsoleListener(), make_console(stderr=False)
    plan = fetching.make_plan(
        manifest, folder, subjects=_split(subjects), parts=_split(parts), accept_terms=accept_terms,
        only_look=dry_run or check_addresses,
    )  # fmt: skip
    shown: dict[str, Any] = {"run_folder": None, "scores": [], "dataset": dataset, "root": str(plan.root)}
    if dry_run:
        if as_json:
            listed = [
                {"path": f.path, "part": f.part, "urls": f.urls, "bytes": f.bytes, "checksum": f.checksum}
                for f in plan.files
            ]
            told = {"locked": [part.name for part in plan.locked], "unlisted": plan.unlisted}
            print_json({**shown, "files": listed, "missing": plan.missing, **told, "plan": plan.describe()})
            return
        for file in plan.files:
            size = "size unknown" if file.bytes is None else f"{file.bytes} bytes"
            address = " or ".join(file.urls) or "written from the manifest"
            out.print(f"{file.path}: {address}, {size}, {file.checksum or 'no checksum'}", markup=False)
        for line in plan.describe():
            out.print(line, markup=False)
        return
    for line in [f"licence: {manifest.licence.strip()}", *plan.describe()]:
        listener.console.print(line, markup=False)
    if check_addresses:
        findings = fetching.check_addresses(plan, jobs=jobs)
    else:
        findings = catalogue.fetch_dataset(plan, jobs=jobs, listener=listener)
    if as_json:
        print_json({**shown, "findings": [vars(finding) for finding in findings]})
    # Of thousands of files, those that are wrong are told; the others lie there.
    elif check_addresses or len(findings) <= 40:
        for finding in findings:
            out.print(f"{finding.item}: {finding.message}", markup=False)
    if check_addresses:
        fetching.refuse_failures(findings, f"addresses of {dataset} do not answer as published")
    elif not as_json:
        out.print(f"next: braindecode-vis check {dataset} --root {plan.root}", markup=False)


def _split(text: str | None) -> list[str] | None:
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def banks(as_json: Json = False, debug: Debug = False) -> None:
    """List the cached image embeddings: one bank per space."""
    from braindecode_vis.base.digests import find_cache_folder
    from braindecode_vis.embeddings.bank import list_banks

    listed = list_banks(find_cache_folder())
    if as_json:
        print_json(
            {
                "run_folder": None,
                "scores": [],
                "banks": json.loads(json.dumps([vars(bank) for bank in listed], default=str)),
            }
        )
        return
    console = make_console(stderr=False)
    console.print(f"banks in {find_cache_folder()}: {len(listed)}", markup=False)
    for bank in listed:
        console.print(
            f"{bank.space}\n  {bank.n_images} images, {bank.n_bytes / 1e6:.1f} MB, {bank.folder}",
            markup=False,
        )


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
    size: Annotated[str, typer.Option("--size", help="tiny, small, demo or full.")] = "small",
    subjects: Annotated[int | None, typer.Option("--subjects", min=1, help="Simulated subjects.")] = None,
    concepts: Annotated[int | None, typer.Option("--concepts", min=1, help="Training concepts.")] = None,
    exemplars: Annotated[
        int | None, typer.Option("--exemplars", min=1, help="Images of each of them.")
    ] = None,
    test_concepts: Annotated[
        int | None, typer.Option("--test-concepts", min=2, help="Test concepts.")
    ] = None,
    sessions: Annotated[
        int | None, typer.Option("--sessions", min=1, help="Sessions of each subject.")
    ] = None,
    train_repetitions: Annotated[
        int | None, typer.Option(min=1, help="Times a training image is seen.")
    ] = None,
    test_repetitions: Annotated[int | None, typer.Option(min=1, help="Times a test image is seen.")] = None,
    imagery: Annotated[
        int | None,
        typer.Option(
            "--imagery", min=0, help="Test images that are imagined too, where the format has imagery."
        ),
    ] = None,
    imagery_repetitions: Annotated[
        int | None, typer.Option(min=0, help="Times each of them is imagined.")
    ] = None,
    voxel_mm: Annotated[
        float | None,
        typer.Option("--voxel-mm", help="Side of a voxel (fMRI); 1.8 gives the volumes of NSD's own files."),
    ] = None,
    betas: Annotated[
        str | None, typer.Option("--betas", help="Versions of NSD's betas, separated by commas, or all.")
    ] = None,
    beta_form: Annotated[
        str | None, typer.Option("--beta-form", help="Files of NSD's betas: nii.gz or hdf5.")
    ] = None,
    parcels: Annotated[
        int | None, typer.Option("--parcels", min=14, help="Parcels of the atlas beside fMRI; up to 28 else.")
    ] = None,
    sites: Annotated[int | None, typer.Option("--sites", min=1, help="Sites of a corpus.")] = None,
    minutes: Annotated[
        float | None, typer.Option("--minutes", min=1, help="Minutes of a corpus recorded of each subject.")
    ] = None,
    pairs: Annotated[
        int | None,
        typer.Option("--pairs", min=1, help="Pairs of test images that show the same parts bound otherwise."),
    ] = None,
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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would cost, and stop.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Simulate subjects looking at images, in the files of a public data set, with the truth beside them."""
    from braindecode_vis.base.checks import check_option
    from braindecode_vis.parts import phantom as simulated
    from braindecode_vis.parts.studies import demo as simulation

    check_option("FORMAT", form, simulated.FORMATS)
    check_option("--size", size, simulated.SIZES[form])
    changes = {
        "n_subjects": subjects, "n_train_concepts": concepts, "n_train_exemplars": exemplars,
        "n_test_concepts": test_concepts, "n_sessions": sessions, "train_repetitions": train_repetitions,
        "test_repetitions": test_repetitions, "n_imagery": imagery, "imagery_repetitions": imagery_repetitions,
        "beta_form": beta_form,
        "n_parcels": parcels, "n_sites": sites, "n_pairs": pairs,
        "minutes": int(minutes) if minutes is not None and minutes.is_integer() else minutes,
        # 8.0 becomes 8: the ledger compares requests as they are written.
        "voxel_mm": int(voxel_mm) if voxel_mm is not None and voxel_mm.is_integer() else voxel_mm,
        "beta_versions": simulated.BETA_VERSIONS if betas == "all" else tuple(betas.split(",")) if betas else None,
    }  # fmt: skip
    given = {key: value for key, value in changes.items() if value is not None}
    chosen = simulated.change_size(form, simulated.SIZES[form][size], **given)
    estimate = simulation.estimate_phantom(form, chosen)
    cost = (
        f"{form}: {estimate.n_images} images, {estimate.n_trials} trials, {estimate.recording_s / 60:.1f} min "
        f"recorded; about {estimate.n_bytes / 1e6:.0f} MB on disk and {estimate.seconds / 60:.1f} min on one core"
    )
    make_console().print(cost, markup=False)
    if dry_run:
        if as_json:
            print_json({"run_folder": None, "scores": [], "estimate": vars(estimate)})
        return
    truth = simulation.make_phantom(
        form, out, size=chosen, snr=snr, seed=seed, ongoing=ongoing, listener=ConsoleListener()
    )
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


def demo(
    out: Annotated[Path, typer.Option("--out", help="Run folder.")] = Path("demo_run"),
    size: Annotated[
        str, typer.Option("--size", help="Size of the simulated data set: tiny, small or demo.")
    ] = "demo",
    snr: Annotated[
        float | None, typer.Option("--snr", min=0.0, max=1000.0, help="Signal power over noise power.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Root seed.")] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Simulate EEG of a subject looking at images and decode it: no data, no GPU and no network needed."""
    from braindecode_vis.base.checks import check_option
    from braindecode_vis.parts.studies import demo as simulation
    from braindecode_vis.pipeline.runs import read_scores

    check_option("--size", size, ("tiny", "small", "demo"))
    level = simulation.DEMO_SNR if snr is None else snr
    run, truth = simulation.run_demo(out, size=size, snr=level, seed=seed, listener=ConsoleListener())
    if not as_json:
        print_scores(read_scores(run.folder.path))
        ceiling = max(top for subject in truth.subjects for top in subject["ideal_top1"].values())
        make_console(stderr=False).print(
            f"{truth.n_test} unseen concepts, chance of top-1 {truth.chance:.3f}; the noise would let an observer who "
            f"knows the simulated brain reach {ceiling:.3f}",
            markup=False,
        )
    finish(run, as_json, f"report: {run.folder.path / 'report.html'}")
