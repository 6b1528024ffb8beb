"""What in a step's metrics needs a person: each finding with its figures, its probable cause and the command that finds it.

Pure: the sinks decide how loudly to say it.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from omni_rollout.config import DType, Parity, TrainConfig
from omni_rollout.monitor.metrics import timestep_gaps
from omni_rollout.monitor.suggested import parity_command, train_command

SIGMAS = 3.0
MATERIAL = 0.1  # share of clip_range below which a shifted mean changes hardly any clipping decision


@dataclass(frozen=True, kw_only=True)
class Alert:
    name: str
    sentence: str  # with the figures
    cause: str  # the probable one
    command: str  # finds it, or confirms that it is gone

    @property
    def text(self) -> str:
        return f"{self.sentence}\nProbable cause: {self.cause}\nFind it with: {self.command}"


def find_alerts(
    step: int, metrics: Mapping[str, float], config: TrainConfig, notes: Mapping[str, str] | None = None
) -> list[Alert]:
    """The alerts of one step, most telling first.

    - `weights_differ`: `parity/weights_equal` is not 1.
    - `not_finite`: a metric is NaN or infinite, or an update was skipped because its gradients were.
    - `reward_failed`: a reward raised, or gave a score that is not finite; the run ends.
    - `kl_nonzero`: with parity=exact or reference, any log-prob of other bits; with parity=fast, which promises no equality,
      only |KL| above clip_range, where rounding alone decides what is clipped.
    - `seed_reused`: a request repeated the seed of another.
    - `checkpoint_failed`, `trajectory_not_kept`: what could not be written; the run goes on.
    - `ratio_leans`: see `leaning`.
    - `rewards_missing`: images that a reward could not score left their groups; the run goes on.
    - `reward_hacked`: the trained reward rose at an evaluation, and a guard fell beyond its noise, see `monitor.hacking`.

    Args:
        notes: the step's texts, see `Monitor.log`; `weights/difference`, `rewards/failure`, `seeds/reused`, `checkpoint/failed`
            and `rollout/not_kept` are quoted.
    """
    texts = notes or {}
    return [
        *_weights_differ(step, metrics, config, texts),
        *_not_finite(step, metrics, config),
        *_reward_failed(step, config, texts),
        *_kl_nonzero(step, metrics, config),
        *_seed_reused(step, metrics, config, texts),
        *_not_written(step, config, texts),
        *_ratio_leans(step, metrics, config),
        *_reward_hacked(step, config, texts),
    ]


def leaning(metrics: Mapping[str, float], trajectories: float, clip_range: float) -> str | None:
    """Says how the ratio leans to one side; None when it does not.

    The old policy's samples have a mean ratio of 1, so a ratio that leans was not taken between a policy and its own update.
    A mean below 1 also keeps the samples with an advantage above 0 from ever being clipped (GRPO-Guard, arXiv 2510.22319).
    Steps of one trajectory are not independent: the number of trajectories, not of log-probs, makes the standard error.

    - |ratio_mean - 1| above 3 standard errors, and above a tenth of clip_range; or
    - of the clipped, one side more than 3 standard deviations of a fair coin: |higher - lower| > 3 * sqrt(higher + lower),
      counted in trajectories.
    """
    names = ("actor/ratio_mean", "actor/ratio_std", "actor/pg_clipfrac_higher", "actor/pg_clipfrac_lower")
    if not all(name in metrics and math.isfinite(metrics[name]) for name in names) or trajectories <= 0:
        return None
    mean, std, higher, lower = (metrics[name] for name in names)
    error = std / math.sqrt(trajectories)
    if abs(mean - 1) > max(SIGMAS * error, MATERIAL * clip_range):
        return (
            f"the mean ratio is 1 {mean - 1:+.1e}, where its standard error is {error:.1e} and clip_range is {clip_range:.1e}"
        )
    if abs(higher - lower) * trajectories > SIGMAS * math.sqrt((higher + lower) * trajectories):
        return f"{higher:.1%} of the ratios are clipped above and {lower:.1%} below"
    return None


def _weights_differ(step: int, metrics: Mapping[str, float], config: TrainConfig, notes: Mapping[str, str]) -> Iterator[Alert]:
    if metrics.get("parity/weights_equal", 1.0) != 1.0:
        detail = notes.get("weights/difference", "the engine's weights are not the trainer's")
        yield Alert(
            name="weights_differ",
            sentence=f"step {step}: {detail}",
            cause="the engine renamed, rounded or left out a tensor while loading it, or something wrote to one side's weights",
            command=parity_command(config),
        )


def _not_finite(step: int, metrics: Mapping[str, float], config: TrainConfig) -> Iterator[Alert]:
    names = [name for name, value in metrics.items() if not math.isfinite(value)]
    skipped = metrics.get("actor/skipped_updates", 0.0)
    refused = metrics.get("rollout/not_finite", 0.0)
    facts = []
    if names:
        facts.append(f"not finite: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}")
    if refused > 0:
        facts.append(f"{refused:.0f} trajectories hold NaN or infinity; the step was stopped before its update")
    if skipped > 0:
        facts.append(f"{skipped:.0f} updates skipped, whose gradients were not finite: they changed no weight")
    if facts:
        wider = [] if config.model.dtype is DType.float32 else ["model.dtype=float32"]
        yield Alert(
            name="not_finite",
            sentence=f"step {step}: {'; '.join(facts)}",
            cause="weights driven out of range (learning rate or clip_range too high), or an overflow in the model's dtype",
            command=train_command(config, f"trainer.learning_rate={config.trainer.learning_rate / 10:g}", *wider),
        )


def _reward_failed(step: int, config: TrainConfig, notes: Mapping[str, str]) -> Iterator[Alert]:
    if "rewards/failure" in notes:
        yield Alert(
            name="reward_failed",
            sentence=f"step {step}: {notes['rewards/failure']}",
            cause="an image or a prompt's metadata that the reward cannot handle; nothing was learned from this step",
            command=train_command(config, f"trainer.steps={step}"),
        )
    elif "rewards/not_scored" in notes:
        yield Alert(
            name="rewards_missing",
            sentence=f"step {step}: images without a reward left their groups: {notes['rewards/not_scored']}",
            cause="a reward that raises, is late, or gives no number; past reward.max_failed it ends the run",
            command=train_command(config, "reward.max_failed=0"),
        )


def _reward_hacked(step: int, config: TrainConfig, notes: Mapping[str, str]) -> Iterator[Alert]:
    if "guard/lost" in notes:
        yield Alert(
            name="reward_hacked",
            sentence=f"step {step}: the trained reward rose, and guards got worse: {notes['guard/lost']}",
            cause="the reward does not see what gets worse: look at images/, then add a reward that sees it, or hold the "
            "policy near its start",
            command=train_command(config, f"algorithm.kl_coef={config.algorithm.kl_coef * 10 or 0.01:g}"),
        )


def _kl_nonzero(step: int, metrics: Mapping[str, float], config: TrainConfig) -> Iterator[Alert]:
    kl, equal = metrics.get("parity/ppo_kl_mb0"), metrics.get("parity/bitwise_equal_fraction")
    if kl is None or equal is None:
        return
    clip_range, promised = config.trainer.clip_range, config.parity is not Parity.fast
    if equal == 1.0 if promised else not abs(kl) > clip_range:
        return
    gaps = timestep_gaps(metrics)
    worst = f", most at step index {max(gaps, key=gaps.__getitem__)}" if gaps else ""
    nats = f" ({metrics['parity/kl_nats']:.1e} nats per denoising step)" if "parity/kl_nats" in metrics else ""
    over = f"; the largest gap is {metrics['parity/over_clip']:.2g} clip ranges" if "parity/over_clip" in metrics else ""
    cause = (
        "the weights were proven equal at the last sync, so the arithmetic differs: a changed library or environment "
        "variable, a patch on one side, or inputs (mask, width, timestep) that are not those of the rollout"
        if promised
        else "the engine's own kernels round in other places, here by more than the clip range; parity=exact removes it"
    )
    yield Alert(
        name="kl_nonzero",
        sentence=f"step {step}: rollout engine against trainer, {1 - equal:.1%} of the log-probs compared before the first "
        f"update differ; KL {kl:.1e} per element{nats}{over}{worst}",
        cause=cause,
        command=parity_command(config),
    )


def _seed_reused(step: int, metrics: Mapping[str, float], config: TrainConfig, notes: Mapping[str, str]) -> Iterator[Alert]:
    repeated = notes.get("seeds/reused")
    if repeated or metrics.get("parity/seed_collisions", 0.0) > 0:
        yield Alert(
            name="seed_reused",
            sentence=f"step {step}: {repeated or 'a seed of an earlier step was used twice'}; one sample is counted as two",
            cause="requests of equal group and member, or a seed given by hand: each must come from the run's seed, the step, "
            "the group and the member",
            command=shlex.join(["grep", "seeds/reused", f"{config.run_dir}/metrics.jsonl"]),
        )


def _not_written(step: int, config: TrainConfig, notes: Mapping[str, str]) -> Iterator[Alert]:
    kinds = {
        "checkpoint_failed": ("checkpoint/failed", "tried again at the next step that is due; earlier ones are still there"),
        "trajectory_not_kept": ("rollout/not_kept", "what was kept of this step is deleted; a run that dies samples it again"),
    }
    for name, (note, consequence) in kinds.items():
        if note in notes:
            yield Alert(
                name=name,
                sentence=f"step {step}: {notes[note]}; {consequence}",
                cause="a full disk, a quota, or a file system that is gone",
                command=shlex.join(["df", "-h", str(config.run_dir)]),
            )


def _ratio_leans(step: int, metrics: Mapping[str, float], config: TrainConfig) -> Iterator[Alert]:
    sampled = config.rollout.group_size * config.rollout.prompts_per_step
    scored = sampled * (1 - metrics.get("critic/rewards/zero_std_ratio", 0.0))  # groups of equal rewards have no loss
    sentence = leaning(metrics, scored, config.trainer.clip_range)
    if sentence is None:
        return
    different = metrics.get("parity/bitwise_equal_fraction", 1.0) != 1.0
    yield Alert(
        name="ratio_leans",
        sentence=f"step {step}: {sentence}",
        cause="the rollout's log-probs are not the trainer's (see kl_nonzero), and the difference has one sign"
        if different
        else "mini-batches after the first are scored by a policy that has moved too far from the one that sampled them",
        command=parity_command(config) if different else train_command(config, "trainer.updates_per_step=1"),
    )
