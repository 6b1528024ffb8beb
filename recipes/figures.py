"""`python recipes/figures.py`: puts what `omni-rollout` prints today below each `$ omni-rollout ...` line of the pages here.

Of what is printed, the sentences that say whether it fits, and what would if not; tables are left out.
"""

from __future__ import annotations

import io
import re
import shlex
from contextlib import redirect_stdout
from pathlib import Path

from omni_rollout.cli import main

PAGES = sorted(Path(__file__).parent.glob("*/README.md"))
_COMMAND = re.compile(r"^    \$ omni-rollout (.*)\n((?:    (?!\$).*\n)*)", re.MULTILINE)
_VERDICT = re.compile(r": (?:fits|does not fit)$|^assumed|^closest|^no change|^  \S+=")


def refreshed(text: str) -> str:
    """The page with the figures of today."""
    return _COMMAND.sub(lambda found: f"    $ omni-rollout {found[1]}\n{_printed(found[1])}", text)


def _printed(command: str) -> str:
    with redirect_stdout(io.StringIO()) as out:
        main(shlex.split(command))
    told = [line.rstrip() for line in out.getvalue().splitlines() if _VERDICT.search(line.rstrip())]
    return "".join(f"    {line}\n" for line in told)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(refreshed(page.read_text(encoding="utf-8")), encoding="utf-8")
