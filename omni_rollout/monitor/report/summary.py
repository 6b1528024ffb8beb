"""What a run came to: reward before and after, parity, alerts, and how much that proves."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path

from omni_rollout.monitor.report.charts import Series, line_chart, sentence, table
from omni_rollout.monitor.report.read import Run
from omni_rollout.monitor.verdict import HELD_OUT, TRAINED, paired, verdict

NOT_SAID = {
    "reward": "fewer than two training steps have a reward: nothing can be compared",
    "held-out": "no evaluation before and after, so nothing is known of other prompts (evaluation.images=N)",
    "parity": "no log-probs were compared",
}

SHOWN = 4  # steps with an alert that are named


def section(run: Run) -> str:
    rows = [[name, told] for name, told in facts(run).items()]
    return "".join(
        [
            _headline(run),
            table([], rows, text=2),
            *(f'<p class="note">{part}</p>' for part in map(sentence, run.unread)),
            '<div class="charts">',
            line_chart("Trained reward (mean of a step)", [Series(name="trained", points=run.points(TRAINED), strong=True)]),
            line_chart("Held-out reward (bars: standard error)", list(_held_out(run))),
            "</div>",
        ]
    )


def facts(run: Run) -> dict[str, str]:
    """Name -> sentence."""
    if not run.lines:
        return {"steps": "metrics.jsonl holds no step: the run has not come to its first, or was stopped before"}
    found = dict(verdict(run.lines))
    rows = {name: found.get(name, missing) for name, missing in NOT_SAID.items()}
    if pairs := reward_pairs(run):
        rows["same images"] = f"held-out reward of the same prompts and seeds, before and after: {paired(pairs)}"
    return {
        "trained": trained(run),
        "steps": _steps(run),
        **rows,
        "alerts": _alerts(run),
        "evidence": _evidence(run, len(pairs)),
    }


def trained(run: Run) -> str:
    """What was trained, by what, in a line."""
    own = run.config
    weights = own.get("reward.weights")
    rewards = [f"{name} ({weight})" for name, weight in weights.items()] if isinstance(weights, dict) else []
    rank = own.get("trainer.lora_rank")
    return "; ".join(
        [
            f"{own.get('model.family')} from {'/'.join(Path(str(own.get('model.path'))).parts[-2:])}, {own.get('model.dtype')}",
            f"LoRA of rank {rank}" if rank else "all weights",
            f"by {own.get('algorithm.name')}, learning rate {own.get('trainer.learning_rate')}",
            f"reward {', '.join(rewards)}",
            f"{own.get('rollout.prompts_per_step')} prompts x {own.get('rollout.group_size')} images a step",
        ]
    )


def _headline(run: Run) -> str:
    """One line: held-out reward, parity, alerts. Green where engine and trainer agreed and nothing was alerted."""
    found, pairs = dict(verdict(run.lines)), reward_pairs(run)
    change = f"held-out reward {paired(pairs)}" if pairs else found.get("held-out", found.get("reward", ""))
    alerts = _alerts(run)
    parts = [change.partition(";")[0], found.get("parity", ""), f"alerts: {alerts}"]
    shares = run.numbers("parity/bitwise_equal_fraction")
    kind = "good" if run.lines and alerts == "none" and all(share == 1 for share in shares) else "bad"
    return f'<p class="{kind} verdict">{escape("; ".join(part for part in parts if part))}</p>' if run.lines else ""


def reward_pairs(run: Run) -> list[tuple[float, float]]:
    """(before, after) of every image that was scored in the first and in the last evaluation."""
    if len(run.scores) < 2:
        return []
    first, *_, last = run.scores.values()
    both = [(first[index].reward, last[index].reward) for index in first if index in last]
    return [(before, after) for before, after in both if before is not None and after is not None]


def _held_out(run: Run) -> Iterator[Series]:
    for number, suffix in enumerate(("", "_ema")):
        errors = dict(run.points(f"evaluation/reward_se{suffix}"))
        known = {step: error for step, error in errors.items() if error is not None}
        name = "average of the weights (trainer.ema_decay)" if suffix else "policy"
        yield Series(name=name, points=run.points(f"{HELD_OUT}{suffix}"), errors=known, colour=number, strong=not suffix)


def _steps(run: Run) -> str:
    last, planned = run.lines[-1]["step"], run.config.get("trainer.steps")
    stopped = next((line["stopped"] for line in reversed(run.lines) if "stopped" in line), None)
    told = f"{last} of {planned} steps" + ("" if last == planned else ": the run has not come to its end")
    return f"{told}; stopped: {stopped}" if stopped else told


def _alerts(run: Run) -> str:
    names = [(name, line["step"]) for line in run.lines for name in str(line.get("alerts/names", "")).split(", ") if name]
    if not names:
        return "none"
    steps: dict[str, list[str]] = {}
    for name, step in names:
        steps.setdefault(name, []).append(str(step))
    return ", ".join(
        f"{name} in step{'s' * (len(at) > 1)} {', '.join(at[:SHOWN])}" + (f" and {len(at) - SHOWN} more" if at[SHOWN:] else "")
        for name, at in steps.items()
    )


def _evidence(run: Run, images: int) -> str:
    seed = run.config.get("sampling.seed")
    count = images or run.config.get("evaluation.images") or 0
    evaluations = max(len(run.scores), len(run.numbers(HELD_OUT)))
    what = f"{count} held-out images, {evaluations} evaluations" if count and evaluations else "no held-out reward"
    return (
        f"{what}; one run, one training seed ({seed}). What another seed would give is not known: repeat with "
        f"sampling.seed={seed + 1 if isinstance(seed, int) else 1} before believing a small difference"
    )
