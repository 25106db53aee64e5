"""Run one configuration at every combination of some settings, in parallel processes, into one tidy table.

The runs of a sweep share one store of artifacts, so a stage that several of them need is computed once. A sweep that
was interrupted goes on where it stopped; a run that fails is named in the table and does not stop the others.
"""

from __future__ import annotations

import itertools
import math
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from braindecode_vis.base import store
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.locks import hold_folder
from braindecode_vis.base.memory import describe_kill
from braindecode_vis.base.remote import RemotePath, refuse_address_to_write
from braindecode_vis.config import RunConfig, dump_config, read_config
from braindecode_vis.parts.studies.board import pool_runs, write_settings
from braindecode_vis.parts.studies.settings_table import describe_choice
from braindecode_vis.pipeline.runs import (
    ProgressListener,
    SilentListener,
    list_changes,
    read_earlier,
    read_scores,
)
from braindecode_vis.pipeline.together import (
    describe_thread_limits,
    limit_threads,
    make_command,
    read_last_line,
)
from braindecode_vis.report.words import describe_objectives

#: Runs of one sweep: each has a folder and takes seconds, so that more are a slip of the pen.
MAX_RUNS = 10_000
#: Letters of the name of a run's folder.
_LONGEST_NAME = 80
#: In the folder of a sweep: the swept keys, and the settings of each run.
LIST = "sweep.json"
#: Why a run of the list has no scores.
NOT_YET = "it has not been run yet"


@dataclass(frozen=True)
class Combination:
    """One run of a sweep: its settings and its folder."""

    settings: Mapping[str, str]
    folder: Path

    @property
    def overrides(self) -> list[str]:
        """The settings as ``key=value`` texts."""
        return [f"{key}={value}" for key, value in self.settings.items()]


def parse_axes(texts: Sequence[str]) -> dict[str, list[str]]:
    """Return the values of each swept key.

    Parameters
    ----------
    texts
        ``key=a,b,c``; a value that itself holds commas is in brackets, as in ``dataset.subjects=[1],[2]``.
        A range of whole numbers may be written ``0..4``.

    Raises
    ------
    ConfigError
        If a text has no values or too many, or a key or a value is given twice.

    Examples
    --------
    >>> parse_axes(["seed=0..2", "dataset.subjects=[1],[2, 3]"])
    {'seed': ['0', '1', '2'], 'dataset.subjects': ['[1]', '[2, 3]']}
    """
    axes: dict[str, list[str]] = {}
    for text in texts:
        key, separator, value = text.partition("=")
        values = [part.strip() for part in _split_outside_brackets(value)]
        if not separator or not key.strip() or not all(values):
            raise ConfigError(
                f"the axis {text!r} must have the form key=value,value, for example seed=0,1,2."
            )
        if key.strip() in axes:
            raise ConfigError(f"the key {key.strip()} is swept twice; put all its values into one --over.")
        if len(values) == 1 and (found := re.fullmatch(r"(\d+)\.\.(\d+)", values[0])):
            # the lengths first: Python refuses to read a number of thousands of digits
            if max(map(len, found.groups())) > 15 or int(found[2]) - int(found[1]) >= MAX_RUNS:
                raise ConfigError(f"the range {text[:60]!r} has more than {MAX_RUNS} values; sweep fewer.")
            values = [str(n) for n in range(int(found[1]), int(found[2]) + 1)]
            if not values:
                raise ConfigError(f"the range {text!r} is empty; the smaller number comes first.")
        twice = next((value for value, times in Counter(values).items() if times > 1), None)
        if twice is not None:
            raise ConfigError(
                f"the axis {text!r} has {twice} twice, so one run would count as two; write it once."
            )
        axes[key.strip()] = values
    return axes


def _split_outside_brackets(text: str) -> list[str]:
    parts, depth = [""], 0
    for letter in text:
        # Commas inside a list or mapping belong to the value: dataset.subjects=[1,2],[3].
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def list_combinations(axes: Mapping[str, Sequence[str]], out: Path) -> list[Combination]:
    """Return every combination of the values, each with a folder named after its settings."""
    combinations = []
    for values in itertools.product(*axes.values()):
        settings = dict(zip(axes, values, strict=True))
        name = "_".join(f"{key.split('.')[-1]}-{_write_name(value)}" for key, value in settings.items())
        told = "_".join(_name_setting(key, value) for key, value in settings.items())
        if told != name and not (out / name[:_LONGEST_NAME]).is_dir():  # begun by an earlier version
            name = told
        combinations.append(Combination(settings, out / (name[:_LONGEST_NAME] or "run")))
    names = [combination.folder for combination in combinations]
    if len(set(names)) < len(names):  # long or odd values may look alike once they are file names
        combinations = [
            Combination(c.settings, c.folder.with_name(f"{n:03d}_{c.folder.name}"))
            for n, c in enumerate(combinations)
        ]
    return combinations


def _write_name(value: str) -> str:
    """Return a value as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", value).strip("-") or "none"


def _name_setting(key: str, value: str) -> str:
    """Return the part of a folder's name that shows one setting; objectives by their kinds and weights."""
    path = key.split(".")
    if path[-1] == "objectives":
        try:
            objectives = {"objectives": yaml.safe_load(value)}
            value = describe_objectives(objectives).partition(" ")[2] or value.replace("kind", "")
        except yaml.YAMLError:
            pass  # the configuration says what is wrong with it
    elif "objectives" in path:  # a weight alone does not tell whose
        path = ["-".join(path[path.index("objectives") :])]
    return f"{path[-1]}-{_write_name(value)}"


def sweep(
    source: str,
    axes: Mapping[str, Sequence[str]],
    out: Path,
    *,
    overrides: Sequence[str] = (),
    root: Path | None = None,
    n_jobs: int = 1,
    listener: ProgressListener | None = None,
) -> pd.DataFrame:
    """Run every combination and return one row per score, with the swept keys beside it.

    Parameters
    ----------
    source, overrides, root
        As for `read_config`; the overrides hold for all runs.
    axes
        Values of each swept key, as text.
    out
        Folder of the sweep: one folder per run, a common store, ``sweep.parquet``, ``sweep.csv``, ``summary.csv``
        (subject by subject) and ``settings.csv`` (over subjects and seeds).
    n_jobs
        Runs at the same time; the threads of each are limited so that together they use the machine once, unless the
        environment limits them already (``OMP_NUM_THREADS``).
    listener
        Shows progress.

    Raises
    ------
    ConfigError
        If any combination is not a valid configuration, there are too many, or the folder holds other runs; nothing is
        started or written then.
    DataError
        If every run failed.
    """
    combinations, configs = plan_sweep(source, axes, out, overrides=overrides, root=root)

    def refuse_others() -> list[Combination]:
        return find_others(source, combinations, configs, out, list(axes), overrides=overrides, root=root)

    refuse_others()  # before anything is written
    show = listener or SilentListener()
    with hold_sweep(out, configs, show):  # its runs hold their own folders
        others = refuse_others()
        make_folders(combinations, configs, others, out, list(axes))
        failures = {c.folder: NOT_YET for c in others if not (c.folder / "scores.json").is_file()}
        bound = describe_thread_limits()
        what = f"running {len(combinations)} combinations" + (f" ({bound})" if bound else "")
        with (
            show.progress(what, len(combinations)) as advance,
            ThreadPoolExecutor(n_jobs) as pool,
        ):
            jobs = {
                pool.submit(_run_one, c.folder, n_jobs, list_consents(config)): c
                for c, config in zip(combinations, configs, strict=True)
            }
            for job in as_completed(jobs):
                if message := job.result():
                    failures[jobs[job].folder] = message
                advance(1)
        return write_tables([*others, *combinations], failures, out, list(axes))


def plan_sweep(
    source: str,
    axes: Mapping[str, Sequence[str]],
    out: Path,
    *,
    overrides: Sequence[str] = (),
    root: Path | None = None,
) -> tuple[list[Combination], list[RunConfig]]:
    """Return the runs of a sweep and their configurations; parameters and errors are those of `sweep`."""
    refuse_address_to_write(out)
    if (out / "config.yaml").is_file():
        raise ConfigError(f"{out} is a run folder; give the sweep a separate folder with --out.")
    if (n_runs := math.prod(map(len, axes.values()))) > MAX_RUNS:
        raise ConfigError(
            f"the sweep has {n_runs} combinations, but at most {MAX_RUNS} are allowed; sweep fewer."
        )
    combinations = list_combinations(axes, out)
    configs = []
    for combination in combinations:  # all of them before any run is started
        try:
            configs.append(read_config(source, [*overrides, *combination.overrides], root=root))
        except ConfigError as error:
            raise ConfigError(
                f"the combination {', '.join(combination.overrides)} cannot run: {error}"
            ) from error
    return combinations, configs


@contextmanager
def hold_sweep(out: Path, configs: Sequence[RunConfig], show: ProgressListener) -> Iterator[None]:
    """Make the folder of a sweep and hold it while the context lasts."""

    def tell(sentence: str) -> None:
        with show.watch("sweep:") as say:
            say(0, 0, sentence)

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the folder {out} cannot be written ({error.strerror}); choose another with --out."
        ) from error
    with hold_folder(out, store.hash_json([config.model_dump(mode="json") for config in configs]), tell):
        yield


def find_others(
    source: str,
    combinations: Sequence[Combination],
    configs: Sequence[RunConfig],
    out: Path,
    keys: Sequence[str],
    *,
    overrides: Sequence[str] = (),
    root: Path | None = None,
) -> list[Combination]:
    """Return the runs that the folder of a sweep lists beside those that are asked for now, such as of earlier seeds.

    Parameters
    ----------
    source, overrides, root
        As for `sweep`.
    combinations, configs
        As `plan_sweep` returns them.
    out
        Folder of the sweep.
    keys
        The swept keys.

    Raises
    ------
    ConfigError
        If the folder holds runs that are not of this sweep: jobs that wait in a queue read their settings there when
        they start, and would compute other ones.
    """
    asked = {c.folder.name: config for c, config in zip(combinations, configs, strict=True)}
    listed: list[Combination] = []
    if (out / LIST).is_file():
        swept, listed = read_list(out)
        if swept != list(keys):
            raise ConfigError(
                f"{out} holds a sweep over {', '.join(swept)}, but this one is over {', '.join(keys)}; "
                "give each a separate folder with --out."
            )
    others = [c for c in listed if c.folder.name not in asked]
    known = {*asked, *(c.folder.name for c in others)}
    strange = [
        path.parent.name for path in sorted(out.glob("*/config.yaml")) if path.parent.name not in known
    ]
    if strange:
        raise ConfigError(
            f"{out} holds the run {strange[0]}, which is not of this sweep; give the sweep a separate "
            "folder with --out."
        )
    there = next((c for c in others if (c.folder / "config.yaml").is_file()), None)
    if there is not None:  # one speaks for all that are listed, since each was compared when it was added
        asked[there.folder.name] = read_config(source, [*overrides, *there.overrides], root=root)
    for name, config in asked.items():
        path = out / name / "config.yaml"
        if not path.is_file() or path.read_bytes() == dump_config(config).encode():
            continue
        earlier = read_earlier(path.parent)
        changes = ["of another version"] if earlier is None else list_changes(earlier, config, hashed=False)
        if changes:
            more = f" and {len(changes) - 2} more" if len(changes) > 2 else ""
            raise ConfigError(
                f"{out} holds a sweep with other settings, such as {name}: "
                f"{', '.join(changes[:2])}{more}; give this sweep a separate folder with --out."
            )
    return others


def make_folders(
    combinations: Sequence[Combination],
    configs: Sequence[RunConfig],
    others: Sequence[Combination],
    out: Path,
    keys: Sequence[str],
) -> None:
    """Make the folder of every run, with its configuration and the store that all share, and the list of them.

    The list comes first and keeps what `find_others` found, so that it never names fewer runs than are there.
    """
    stages = out / "stages"
    runs = [{"run": c.folder.name, "settings": dict(c.settings)} for c in (*others, *combinations)]
    try:
        store.write_json(out / LIST, {"keys": list(keys), "runs": runs})
    except OSError as error:
        raise ConfigError(
            f"the folder {out} cannot be written ({error.strerror}); choose another with --out."
        ) from error
    for combination, config in zip(combinations, configs, strict=True):
        folder = combination.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stages.mkdir(parents=True, exist_ok=True)
            if not (folder / "stages").exists():  # one store for all: what two runs share is computed once
                (folder / "stages").symlink_to(Path("..") / stages.name, target_is_directory=True)
            text, path = dump_config(config), folder / "config.yaml"
            if path.is_file() and path.read_bytes() == text.encode():
                continue  # hundreds of renames take long on a network disk
            with store.replace_atomically(path) as temporary:
                temporary.write_text(text)
        except OSError as error:
            raise ConfigError(
                f"the folder {combination.folder} cannot be written ({error.strerror}); choose another with --out."
            ) from error


def read_list(out: Path) -> tuple[list[str], list[Combination]]:
    """Return the swept keys and the runs of a sweep that was begun in a folder."""
    if not (out / LIST).is_file():
        raise DataError(f"{out} is not the folder of a sweep: it holds no {LIST}.")
    content = store.read_json(out / LIST)
    try:
        runs = [
            Combination({str(k): str(v) for k, v in row["settings"].items()}, out / Path(row["run"]).name)
            for row in content["runs"]
        ]
        return [str(key) for key in content["keys"]], runs
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{out / LIST} is damaged; run the command of the sweep again.") from error


def write_tables(
    combinations: Sequence[Combination], failures: Mapping[Path, str], out: Path, keys: Sequence[str]
) -> pd.DataFrame:
    """Write the tables of what is there, and return the one of all rows; `DataError` if every run failed.

    Its attribute ``selection`` says which setting validation chooses, or why none.
    """
    table = _collect(combinations, failures)
    if len(failures) == len(combinations):
        raise DataError(
            f"every run of the sweep failed; the first message is: {next(iter(failures.values()))}"
        )
    for name, frame in (("sweep", table), ("summary", summarise(table, keys))):
        with store.replace_atomically(out / f"{name}.csv") as temporary:
            frame.to_csv(temporary, index=False)
    with store.replace_atomically(out / "sweep.parquet") as temporary:
        table.to_parquet(temporary, index=False)
    pooled = pool_runs([c.folder for c in combinations if c.folder not in failures])
    write_settings(out / "settings.csv", pooled)
    table.attrs["selection"] = describe_choice(pooled)
    return table


def list_consents(config: RunConfig) -> list[str]:
    """Return the options that allow to a run what this call allows, since the folder of the run cannot keep that.

    Nor does it keep where files of servers go, which changes no result.
    """
    options: dict[str, None] = {}
    for name, value in () if config.remote is None else config.remote:
        if value is not None:
            options[f"--set=remote.{name}={value}"] = None
    for key, settings in config.walk():
        if getattr(settings, "trust_pickle", False):
            options[f"--set={key}.trust_pickle=true"] = None
        if getattr(settings, "allow_download", False):
            options["--allow-download"] = None
        for name in type(settings).model_fields:
            value = getattr(settings, name)
            if isinstance(value, RemotePath):
                options[f"--set={key}.{name}={value}"] = None
            elif isinstance(value, list | tuple) and any(isinstance(path, RemotePath) for path in value):
                options[f"--set={key}.{name}=[{', '.join(map(str, value))}]"] = None
    for code in config.find_outside().values():
        options[f"--trust-code={code.reference}"] = None
    return list(options)


def _run_one(folder: Path, n_jobs: int, consents: Sequence[str] = ()) -> str:
    """Run one combination in a process of its own; return what went wrong, or an empty text."""
    with (folder / "log.txt").open("w") as log:
        done = subprocess.run(
            make_command(["run", str(folder), *consents]),
            stdout=log, stderr=subprocess.STDOUT, env=limit_threads(n_jobs), check=False,
        )  # fmt: skip
    if done.returncode == 0:
        return ""
    if done.returncode == -signal.SIGKILL:
        return f"{describe_kill()}. Run the same sweep again to continue, with fewer runs at once if memory ran out."
    return read_last_line(folder / "log.txt") or f"the run ended with exit code {done.returncode}"


def _collect(combinations: Sequence[Combination], failures: Mapping[Path, str]) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for combination in combinations:
        # Numbers as numbers, so that the table sorts; a list stays the text that it was given as.
        read = {key: yaml.safe_load(value) for key, value in combination.settings.items()}
        swept = {
            key: value if isinstance(value, int | float | str | bool) else combination.settings[key]
            for key, value in read.items()
        }
        if combination.folder in failures:
            rows.append({**swept, "run": combination.folder.name, "error": failures[combination.folder]})
            continue
        scores = read_scores(combination.folder)
        rows += [{**score, **swept, "run": combination.folder.name, "error": ""} for score in scores]
    return pd.DataFrame(rows)


def summarise(table: pd.DataFrame, keys: Sequence[str], *, level: float = 0.95) -> pd.DataFrame:
    """Return mean, spread and interval of the decoded system over seeds, one row per metric, subject and other setting.

    A seed changes the draw of weights and batches, not the brain data, so the spread over seeds says how stable the
    method is and nothing about other subjects or images; the interval of a single run says that.

    Parameters
    ----------
    table
        What `sweep` returns.
    keys
        The swept keys; `seed` is averaged over, the others are kept.
    level
        Coverage of the interval, if seeds are exchangeable and their numbers normal.

    Returns
    -------
    DataFrame
        Columns `value` (mean over seeds), `sd` (standard deviation over seeds, n - 1), `n_seeds`, `ci_low` and
        `ci_high` (Student's t interval of the mean over seeds), `chance` and `n_queries`. One seed has no spread: its
        `sd` is empty, and its interval is that of the run, which speaks of other stimuli. Two seeds have no interval:
        their values say more. With several subjects, the
        row of subject ``mean`` is the mean over subjects of each seed, and its spread that of these means.
    """
    from scipy.special import stdtrit  # of scipy.stats, which takes a second to load

    if "method" not in table:
        return table
    decoded = table[(table["method"] == "decoded") & (table["error"] == "")].copy()
    for name in ("value", "ci_low", "ci_high", "chance"):
        decoded[name] = pd.to_numeric(decoded[name], errors="coerce")
    seed = ["seed"] if "seed" in decoded else []
    # Conditions of one run differ in their split and are no seeds of each other.
    by = [key for key in keys if key != "seed"] + ["metric", *(["split"] if "split" in decoded else [])]
    single = decoded[decoded["subject"] != "all"].groupby([*by, *seed], dropna=False, sort=False)
    means = single.agg(
        value=("value", "mean"),
        chance=("chance", "mean"),
        n_queries=("n_queries", "sum"),
        n=("subject", "nunique"),
    ).reset_index()
    pooled = means[means["n"] > 1].assign(subject="mean", ci_low=np.nan, ci_high=np.nan)
    rows = []
    for names, group in pd.concat([decoded, pooled]).groupby([*by, "subject"], dropna=False, sort=False):
        values, n = group["value"].to_numpy(float), len(group)
        low, high = group["ci_low"].iloc[0], group["ci_high"].iloc[0]
        if n == 2:  # the two values say more than an interval would
            low, high = np.nan, np.nan
        elif n > 1:
            half = stdtrit(n - 1, 0.5 + level / 2) * values.std(ddof=1) / np.sqrt(n)
            low, high = values.mean() - half, values.mean() + half
        rows.append(
            {
                **dict(zip([*by, "subject"], names, strict=True)),
                "value": values.mean(), "sd": values.std(ddof=1) if n > 1 else np.nan, "n_seeds": n,
                "ci_low": low, "ci_high": high, "chance": group["chance"].mean(),
                "n_queries": int(group["n_queries"].iloc[0]),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)
