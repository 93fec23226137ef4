"""The tests on each Python and each Hydra, and the package.

nox                                     all of it, with the interpreters that are there
nox -s "tests-3.12(hydra='1.3')"        one of them
nox -s tests -- tests/config            on all of them, a part of the tests
"""

import sys
from pathlib import Path

import nox

nox.options.error_on_missing_interpreters = False
nox.options.reuse_existing_virtualenvs = True

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
HYDRAS = {"1.3": ["hydra-core<1.4"], "1.4": ["hydra-core>=1.4.0rc0,<1.5"]}
DEFAULT = ["-n", "2", "--dist", "worksteal"]


@nox.session(python=PYTHONS)
@nox.parametrize("hydra", list(HYDRAS))
def tests(session: nox.Session, hydra: str) -> None:
    """The default tests, or those that are named behind `--`."""
    # The constraints are those of one Python and one Hydra; torch stays, for it is large.
    session.install("torch==2.13.0")
    session.install("-e", ".[dev]", *HYDRAS[hydra])
    session.run("python", "-m", "pytest", *(session.posargs or DEFAULT))


@nox.session(python=False)
def package(session: nox.Session) -> None:
    """The wheel and the source distribution, as an index would check them."""
    folder = session.create_tmp()
    session.run(sys.executable, "-m", "build", "--outdir", folder)
    built = [str(each) for each in Path(folder).glob("lightning_adam-*")]
    session.run(sys.executable, "-m", "twine", "check", "--strict", *built)
