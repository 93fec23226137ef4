"""The default tests on each Python and each Hydra.

nox                                     all of them, on the interpreters that are installed
nox -s "tests-3.12(hydra='1.3')"        one of them
nox -s tests -- tests/config            a part of the tests, on all of them
"""

import nox

nox.options.error_on_missing_interpreters = False
nox.options.reuse_existing_virtualenvs = True

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
HYDRAS = {"1.3": ["hydra-core<1.4"], "1.4": ["hydra-core>=1.4.0rc0,<1.5"]}
DEFAULT = ["-n", "2", "--dist", "worksteal"]


@nox.session(python=PYTHONS)
@nox.parametrize("hydra", list(HYDRAS))
def tests(session: nox.Session, hydra: str) -> None:
    """Runs the default tests, or those named after `--`."""
    # constraints.txt fixes one Hydra. Only torch is taken from it, because it is large.
    session.install("torch==2.13.0")
    session.install("-e", ".[dev]", *HYDRAS[hydra])
    session.run("python", "-m", "pytest", *(session.posargs or DEFAULT))
