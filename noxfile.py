"""The tests on every Python that is supported and found on this machine: `nox` (pip install nox)."""

import nox

nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False


@nox.session(python=["3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    """Run the default tests, or those that are named after ``--``."""
    session.install("--editable", ".[dev]")
    session.run("python", "-m", "pytest", "-n", "2", "--dist", "loadfile", *session.posargs)


@nox.session(python=["3.11", "3.12", "3.13"])
def light(session: nox.Session) -> None:
    """Run a small recording through the core alone, without any extra."""
    session.install(".")
    session.run("braindecode-vis", "run", "synthetic_digits", "--out", f"{session.create_tmp()}/digits")
