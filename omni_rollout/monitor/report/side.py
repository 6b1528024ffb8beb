"""Several runs beside each other: figures, curves, and what was set otherwise."""

from __future__ import annotations

from collections.abc import Sequence

from omni_rollout.monitor.report.charts import Series, line_chart, sentence, table
from omni_rollout.monitor.report.read import Run
from omni_rollout.monitor.report.summary import facts
from omni_rollout.monitor.suggested import override_value
from omni_rollout.monitor.verdict import HELD_OUT, TRAINED

CURVES = {
    HELD_OUT: "Held-out reward",
    TRAINED: "Trained reward",
    "actor/drift": "Drift of the weights",
    "timing_s/step": "Seconds a step",
}
_NO_SETTING = ("run_dir", "wandb.", "launch.", "serve.")


def section(runs: Sequence[Run]) -> str:
    told = [facts(run) for run in runs]
    rows = [[name, *(each.get(name, "") for each in told)] for name in dict.fromkeys(name for each in told for name in each)]
    names = labels(runs)
    charts = [
        line_chart(
            title,
            [
                Series(name=name, points=run.points(key), colour=n)
                for n, (name, run) in enumerate(zip(names, runs, strict=True))
            ],
        )
        for key, title in CURVES.items()
    ]
    keys = sorted({key for run in runs for key in run.config if not key.startswith(_NO_SETTING)})
    values = {key: [override_value(run.config.get(key)) for run in runs] for key in keys}
    changed = [[key, *each] for key, each in values.items() if len(set(each)) > 1]
    columns = len(runs) + 1
    return "".join(
        [
            table(["", *names], rows, text=columns),
            f'<div class="charts">{"".join(charts)}</div>',
            "<h3>Set otherwise</h3>",
            table(["key", *names], changed, text=columns) if changed else sentence("nothing: the same settings"),
        ]
    )


def labels(runs: Sequence[Run]) -> list[str]:
    """The folders' names, numbered where two are equal."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names, 1)]
