"""`omni-rollout report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from omni_rollout.commands import Commands, add_command
from omni_rollout.errors import UserError


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    report = add_command(
        commands,
        "report",
        run,
        "one HTML page of a run, or of up to four side by side: needs no network and no script",
        "examples:\n"
        "  omni-rollout report runs/mine                            runs/mine/report.html\n"
        "  omni-rollout report runs/a runs/b --out both.html        side by side\n",
    )
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs (run_dir=...); running ones too")
    report.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the first RUN")


def run(parsed: argparse.Namespace) -> int:
    from omni_rollout.launch.outputs import file_problem

    out = parsed.out or parsed.runs[0] / "report.html"
    if parsed.out is not None and (problem := file_problem(out)):
        raise UserError(f"--out {out}: {problem}")
    from omni_rollout.monitor.report.page import write_report

    write_report(parsed.runs, out)
    print(out)
    return 0
