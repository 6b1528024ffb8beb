"""`--verl-repo`: where verl's own tests lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HOW = "pytest tests/verl_upstream --verl-repo CHECKOUT (or VERL_REPO=CHECKOUT), of verl 0.9.1; see its README"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--verl-repo", help="a checkout of verl 0.9.1, or the folder that its wheel is installed in")


@pytest.fixture(scope="session")
def checkout(pytestconfig: pytest.Config) -> Path:
    # Without a default, the option is unknown where this file was not there when the command line was read.
    given = pytestconfig.getoption("verl_repo", None) or os.environ.get("VERL_REPO")
    if not given:
        pytest.skip(f"verl's own tests are not part of this repository: {HOW}")
    from omni_rollout.integrations.verl import VERL

    version = Path(given) / "verl" / "version" / "version"
    found = version.read_text().strip() if version.is_file() else "none"
    if found != VERL:
        pytest.exit(f"verl's own tests: {given} holds version {found} of verl, expected {VERL}", returncode=4)
    return Path(given).absolute()
