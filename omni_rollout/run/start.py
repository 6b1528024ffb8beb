"""Whether a run begins or goes on, from where, and whether it may: what lies in its folder decides. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from omni_rollout.algorithms import algorithm_class
from omni_rollout.config import TrainConfig
from omni_rollout.data.prompts import prompts_digest
from omni_rollout.errors import UserError
from omni_rollout.policy.state import RunState, read_state
from omni_rollout.run.folder import candidates, checkpoint_folders, newest_whole

NOT_KEPT = (
    "serve.",
    "run_dir",
    "experiment",
    "trainer.resume",
    "wandb.",
    "monitor.tensorboard",
    "launch.",
)  # where and how, not what
MUST_BE_EQUAL = ("model.family", "model.dtype", "trainer.lora_rank", "trainer.lora_alpha")


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run starts: from nothing, or after a checkpoint."""

    checkpoint: Path | None = None
    run: RunState | None = None

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self.run.step if self.run is not None else 0


def check_has_a_folder(config: TrainConfig, words: Sequence[str]) -> None:
    """Raises UserError where `auto` is to go on in a folder that was named after this very second.

    Args:
        words: as typed. One of them, or a file of `configs/`, may have given the folder.
    """
    given = any(word.lstrip("+").startswith("run_dir=") for word in words)
    if config.trainer.resume != "auto" or config.launch.slurm or given or not _named_by_the_clock(config.run_dir):
        return
    place = Path(config.run_dir).parent
    started = [path for path in place.glob("*/config.yaml") if path.is_file()]
    newest = max(started, key=lambda path: path.stat().st_mtime, default=None)
    how = f"FOLDER (there is no run in {place})" if newest is None else f"{newest.parent}, the newest there is"
    raise UserError(
        "trainer.resume=auto without run_dir: every start has a new folder, in which there is nothing to go on from; "
        f"give run_dir={how}"
    )


def _named_by_the_clock(run_dir: str) -> bool:
    try:
        datetime.strptime(run_dir, TrainConfig.run_dir.replace("${now:", "").removesuffix("}"))
    except ValueError:
        return False
    return True


def find_start(config: TrainConfig) -> Start:
    """What trainer.resume asks for. Changes nothing on disk; with `auto`, a damaged checkpoint is said and passed over.

    Raises:
        UserError: a run lies in run_dir that this one would write over, a checkpoint that is not there, or one that this
            configuration cannot go on from.
    """
    wanted, run_dir = config.trainer.resume, Path(config.run_dir)
    if wanted == "auto":
        start = _newest(run_dir)
    elif wanted == "none":
        start = Start()
    else:
        start = Start(checkpoint=Path(wanted).absolute(), run=read_state(Path(wanted)))  # verified where it is loaded
    elsewhere = start.checkpoint is None or run_dir_of(start.checkpoint) != run_dir.absolute()
    elsewhere = elsewhere and start.checkpoint not in candidates(run_dir)[:1]  # what `auto` would take may be named, too
    if wanted != "auto" and elsewhere and _holds_a_run(run_dir):
        raise UserError(f"run_dir={run_dir} holds a run already: give trainer.resume=auto to go on with it, or another run_dir")
    if start.run is not None:
        check_fits(config, start.run)
    return start


def check_fits(config: TrainConfig, run: RunState) -> None:
    """Raises UserError, naming all keys with which going on from `run` would be another run."""
    changed = changed_keys(config, run.config)
    problems = [
        f"{key}={changed[key][1]}: the checkpoint of step {run.step} has {key}={changed[key][0]}; give that, or start a new run"
        for key in MUST_BE_EQUAL
        if key in changed
    ]
    problems += _other_sampler(config, run)
    if prompts_digest(config.prompts) != run.prompts:
        problems.append(
            f"prompts={config.prompts}: not the file that the checkpoint of step {run.step} was trained on (sha256 "
            f"{run.prompts[:16]}...), so a step would have other prompts; give that file, or start a new run"
        )
    if problems:
        raise UserError("\n".join(problems))


def _other_sampler(config: TrainConfig, run: RunState) -> Iterator[str]:
    """DiffusionNFT and its like sample with an old policy, which another algorithm does not have."""
    name, source = run.config.get("algorithm.name", config.algorithm.name), run.config.get("algorithm.source")
    if (name, source) == (config.algorithm.name, config.algorithm.source):
        return
    try:
        before, now = algorithm_class(name, source), algorithm_class(config.algorithm.name, config.algorithm.source)
    except UserError:  # of a file that has moved: the weights' digest will tell
        return
    if before.samples_with_old and not now.samples_with_old:
        yield (
            f"algorithm.name={config.algorithm.name}: the checkpoint of step {run.step} is of {name}, which samples with an "
            f"old policy that {config.algorithm.name} does not have; give that, or start a new run from what this one trained: "
            "omni-rollout export RUN --to pipeline --out FOLDER, then model.path=FOLDER"
        )


def changed_keys(config: TrainConfig, before: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key -> (value then, value now), of those that a checkpoint keeps; a key that one side lacks is None there."""
    now = {key: value for key, value in flat(config).items() if not key.startswith(NOT_KEPT)}
    keys = before.keys() | now.keys()
    return {key: (before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)}


def _newest(run_dir: Path) -> Start:
    found = newest_whole(candidates(run_dir.absolute()))
    return Start() if found is None else Start(checkpoint=found[0], run=found[1])


def _holds_a_run(run_dir: Path) -> bool:
    metrics = run_dir / "metrics.jsonl"
    return bool(checkpoint_folders(run_dir)) or (metrics.is_file() and metrics.stat().st_size > 0)


def run_dir_of(checkpoint: Path) -> Path:
    return checkpoint.parent.parent


def flat(config: TrainConfig) -> dict[str, Any]:
    values: Any = OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)
    if values["trainer"]["lora_rank"] and values["trainer"]["lora_alpha"] is None:
        values["trainer"]["lora_alpha"] = 2 * values["trainer"]["lora_rank"]

    def leaves(section: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in section.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    return dict(leaves(values, ""))
