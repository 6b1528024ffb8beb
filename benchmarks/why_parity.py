"""What a difference between engine and trainer costs: the first update's gradient, and learning curves.

    python -m benchmarks.why_parity [--seeds N ...] [--clip RANGE ...]  the gradient, at the start of the nano recipe
    python -m benchmarks.why_parity --train [--steps N] [--json FILE]   the recipe itself, as many times as there are cases

The second takes hours: it goes on from FILE, which has a row of each run that has ended. Its exact run is one a seed, since
with every ratio 1 no clip range ever clips.

Each case breaks one rule on the trainer's side alone, in bf16: `timestep_cast` and `rope` as `omni-rollout parity` names them,
and `published`, rollout log-probs off by as much as the nearest peer reports (3.3e-5 a latent element on average, verl-omni
docs/contributing/common_pitfalls.md).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.simulation import plots
from omni_rollout.algorithms import get_algorithm
from omni_rollout.config import TrainConfig
from omni_rollout.data.collate import Collator, derive_seed
from omni_rollout.data.stream import prompt_data
from omni_rollout.launch.compose import compose
from omni_rollout.models.base.causes import Setting, nothing, swapped
from omni_rollout.parity.causes import causes
from omni_rollout.policy.learner import Learner
from omni_rollout.policy.trainer_engines.torch_engine import TorchEngine
from omni_rollout.policy.update import PolicyUpdate
from omni_rollout.rewards import make_rewards
from omni_rollout.rollout.choice import make_engine
from omni_rollout.types import Trajectory

PUBLISHED = 3.3e-5  # mean absolute difference of a log-prob, a mean over the latent's elements
CLIP_RANGES = (1e-3, 1e-4, 1e-5)
BIN = 8  # steps that a point of a curve is the mean of; each step has prompts of its own
Broken = Callable[[Learner, Sequence[Trajectory]], AbstractContextManager[Sequence[Trajectory]]]


@dataclass(frozen=True)
class Case:
    name: str
    broken: Broken  # inside, the trainer's rules are broken; gives what it is told of the rollout


def cases() -> list[Case]:
    known = {cause.name: cause.broken for cause in causes("qwen_image")}
    rules = [Case(name, _by(known[name])) for name in ("timestep_cast", "rope")]
    return [Case("exact", _by(nothing)), *rules, Case("published", _published)]


def _by(rule: Callable[[Setting], AbstractContextManager[None]]) -> Broken:
    @contextmanager
    def broken(learner: Learner, trajectories: Sequence[Trajectory]) -> Iterator[Sequence[Trajectory]]:
        with rule(Setting(learner.policy, learner.config.model.family, learner.dtype)):
            yield trajectories

    return broken


@contextmanager
def _published(_: Learner, trajectories: Sequence[Trajectory]) -> Iterator[Sequence[Trajectory]]:
    """A normal error of each log-prob by itself, the same for the same trajectory."""
    spread = PUBLISHED * math.sqrt(math.pi / 2)

    def off(one: Trajectory) -> Trajectory:
        generator = torch.Generator().manual_seed(derive_seed("published", one.request_id))
        return replace(one, log_probs=one.log_probs + spread * torch.randn(len(one.log_probs), generator=generator))

    yield [off(one) for one in trajectories]


class Gradients(TorchEngine):
    """Keeps what the optimizer would be given, and moves nothing."""

    def step(self, learning_rate: float, idle: Collection[str] = ()) -> float:
        parameters = list(self._named.values())
        self.last = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
        self._optimizer.zero_grad(set_to_none=True)
        return float(self.last.norm())


def recipe(*overrides: str) -> TrainConfig:
    return compose(["experiment=nano_ocr", "model.dtype=bfloat16", "wandb.mode=disabled", *overrides])


def first_step(seed: int) -> tuple[TrainConfig, list[Trajectory], torch.Tensor]:
    """The recipe's first rollout and its advantages."""
    config = recipe(f"sampling.seed={seed}")
    stream, _ = prompt_data(config)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path, subfolder="tokenizer")
    algorithm = get_algorithm(config.algorithm)
    collator = Collator(config.model.family, tokenizer, config.sampling, config.collate, algorithm.window_start)
    with make_engine(config) as engine:
        made = engine.generate(collator.groups(stream.batch(1), 1, config.rollout.group_size))
        trajectories = sorted(made, key=lambda one: one.request_id)
    scored = make_rewards(config)([one.media for one in trajectories], [one.prompt for one in trajectories])
    rewards = torch.tensor([0.0 if score is None else score for score in scored.total])
    return config, trajectories, algorithm.advantages(rewards, [one.group_id for one in trajectories])


def gradients(seed: int, clip_ranges: Sequence[float]) -> Iterator[dict[str, Any]]:
    """For each case and clip range: how the first gradient differs from the exact one, and what was clipped before it."""
    config, trajectories, advantages = first_step(seed)
    learner = Learner(config)
    engine = Gradients(config.trainer, learner.policy, learner.parameters)
    for clip_range in clip_ranges:
        trainer = replace(config.trainer, clip_range=clip_range)
        update = PolicyUpdate(engine, learner.algorithm, trainer, family=config.model.family, dtype=learner.dtype)
        exact: torch.Tensor | None = None
        for case in cases():
            with case.broken(learner, trajectories) as told:
                done = update(told, advantages, [one.log_probs for one in told], learning_rate=0.0, seed=seed)
            gap = torch.cat(done.first.rollout_log_probs).double() - torch.cat(done.first.log_probs).double()
            exact = engine.last if exact is None else exact
            yield {
                "seed": seed,
                "clip_range": clip_range,
                "case": case.name,
                "gap": gap.abs().mean().item(),
                "kl": gap.mean().item(),
                "clipped": ((torch.exp(-gap) - 1).abs() > clip_range).double().mean().item(),
                "cosine": torch.nn.functional.cosine_similarity(engine.last.double(), exact.double(), dim=0).item(),
                "norm": (engine.last.norm() / exact.norm()).item(),
            }


def training(case: Case, seed: int, clip_range: float, steps: int, folder: Path) -> dict[str, Any]:
    """The recipe with one rule broken in each of its updates."""
    from omni_rollout import train

    step = Learner.step

    def broken(self: Learner, trajectories: Sequence[Trajectory], advantages: torch.Tensor, old: Any, number: int) -> Any:
        with case.broken(self, trajectories) as told:
            return step(self, told, advantages, [one.log_probs for one in told], number)

    run_dir = folder / f"{case.name}-{clip_range:g}-{seed}"
    settings = [f"sampling.seed={seed}", f"trainer.clip_range={clip_range}", f"trainer.steps={steps}", f"run_dir={run_dir}"]
    with swapped(Learner, "step", broken):
        train.train(recipe(*settings))
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    held_out = [row["evaluation/reward"] for row in rows if "evaluation/reward" in row]
    clipped = [row["actor/pg_clipfrac"] for row in rows if "actor/pg_clipfrac" in row]
    return {
        "seed": seed,
        "clip_range": clip_range,
        "case": case.name,
        "before": held_out[0],
        "after": held_out[-1],
        "rewards": [row["critic/rewards/mean"] for row in rows if "critic/rewards/mean" in row],
        "clipped": statistics.mean(clipped),
    }


def plot(rows: Sequence[dict[str, Any]], clip_range: float) -> str:
    """SVG: the training reward of each case at a clip range, over the seeds; the exact runs are those of any range."""
    found: dict[str, list[list[float]]] = {}
    for row in rows:
        if row["case"] == "exact" or row["clip_range"] == clip_range:
            means = [statistics.mean(row["rewards"][at : at + BIN]) for at in range(0, len(row["rewards"]), BIN)]
            found.setdefault(row["case"], []).append(means)
    curves = {
        case: [(min(values), statistics.median(values), max(values)) for values in zip(*runs, strict=True)]
        for case, runs in found.items()
    }
    ticks = [str((at + 1) * BIN) for at in range(len(next(iter(curves.values()))))]
    title = f"training reward, clip range {clip_range:g}: middle of the seeds, least to largest"
    return plots.lines(title, f"step (means of {BIN})", ticks, curves, top=1.0, unit="")


def table(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> Iterator[str]:
    """Markdown: a line for each case and clip range, the least, middle and largest over the seeds."""
    yield f"| clip range | trainer | {' | '.join(keys)} |"
    yield "|---" * (len(keys) + 2) + "|"
    for clip_range, name in dict.fromkeys((row["clip_range"], row["case"]) for row in rows):
        own = [row for row in rows if (row["clip_range"], row["case"]) == (clip_range, name)]
        cells = [" to ".join(f"{value:.4g}" for value in _spread([row[key] for row in own])) for key in keys]
        yield f"| {clip_range:g} | {name} | {' | '.join(cells)} |"


def _spread(values: Sequence[float]) -> list[float]:
    return sorted({min(values), max(values)})


def all_training(parsed: argparse.Namespace, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The runs that `rows` does not have yet."""
    done = {(row["seed"], row["case"] == "exact" or row["clip_range"], row["case"]) for row in rows}
    folder = Path(tempfile.mkdtemp(prefix="why_parity-"))
    for seed, clip_range, case in product(parsed.seeds, parsed.clip, cases()):
        key = (seed, case.name == "exact" or clip_range, case.name)
        if key not in done:
            done.add(key)
            yield training(case, seed, clip_range, parsed.steps, folder)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.why_parity", description=str(__doc__).splitlines()[0])
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--clip", type=float, nargs="+", default=CLIP_RANGES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="with --train: a picture of each clip range")
    parsed = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if parsed.train:
        rows = json.loads(parsed.json.read_text()) if parsed.json and parsed.json.exists() else []
        for row in all_training(parsed, list(rows)):
            rows.append(row)
            print(json.dumps({key: value for key, value in row.items() if key != "rewards"}), file=sys.stderr, flush=True)
            if parsed.json:
                parsed.json.write_text(json.dumps(rows, indent=1))
        keys = ("before", "after", "clipped")
        for clip_range in parsed.clip if parsed.plots else ():
            (parsed.plots / f"why_parity-{clip_range:.0e}.svg").write_text(plot(rows, clip_range))
    else:
        for seed in parsed.seeds:
            rows += gradients(seed, parsed.clip)
        keys = ("gap", "kl", "clipped", "cosine", "norm")
    print("\n".join(table(rows, keys)))
    if parsed.json:
        parsed.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
