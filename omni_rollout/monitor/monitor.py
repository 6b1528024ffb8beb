"""Where a run writes: its folder first, then the console, wandb and TensorBoard."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import yaml

from omni_rollout.config import TrainConfig
from omni_rollout.errors import RunFailedError
from omni_rollout.launch.compose import to_yaml
from omni_rollout.launch.progress import Progress
from omni_rollout.monitor.alerts import find_alerts
from omni_rollout.monitor.collapse import run_lost
from omni_rollout.monitor.console import ConsoleSink
from omni_rollout.monitor.curve import reward_curve
from omni_rollout.monitor.heatmap import heat_map
from omni_rollout.monitor.metrics import timestep_gaps
from omni_rollout.monitor.pairs import pairs_of
from omni_rollout.monitor.verdict import read_metrics, verdict
from omni_rollout.monitor.wandb_sink import WandbSink
from omni_rollout.run.checkpoints import how_to_go_on
from omni_rollout.trajectories.sheet import CaptionedImage, image_grid

if TYPE_CHECKING:
    from omni_rollout.monitor.tensorboard_sink import TensorboardSink

EVALUATION = "evaluation"  # what the names of its sheets begin with
ON_SHEET = 64  # images of an evaluation at most: more captions cannot be read
HEATMAP_EVERY = 10  # steps; a step with a difference, and the last one, are drawn as well


class Monitor:
    """Writes `config.yaml`, `metrics.jsonl`, `images/`, `curve.png` and `summary.txt` to the run folder, tells the console,
    wandb and TensorBoard.

    images/step_XXXX.png        what the step sampled, a group a row
    images/evaluation_XXXX.png  after the step, the same prompts and seeds every time

    A context manager: what is logged is on disk when `log` returns, and leaving it by an error closes all sinks. What the
    folder holds already is remembered: a resumed run goes on in its files.

    Args:
        wandb_id: of the wandb run to go on with.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TrainConfig,
        total_steps: int,
        wandb_id: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.run_dir = run_dir
        self._config, self._total_steps = config, total_steps
        self._image_dir = run_dir / "images"
        self._image_dir.mkdir(parents=True, exist_ok=True)
        text = to_yaml(config)
        (run_dir / "config.yaml").write_text(text, encoding="utf-8")
        self._metrics = run_dir / "metrics.jsonl"
        self._gaps: list[tuple[int, dict[int, float]]] = []
        self._alerts: Counter[str] = Counter()
        self._history: list[Mapping[str, Any]] = []  # lines of metrics.jsonl
        self.lines = 0  # of metrics.jsonl
        self._remember()
        self._wandb = WandbSink(run_dir, config.wandb, yaml.safe_load(text), pairs_of(config), wandb_id)
        self._tensorboard = self._to_tensorboard(text) if config.monitor.tensorboard else None
        self._console = ConsoleSink(total_steps, progress)

    def _to_tensorboard(self, config: str) -> TensorboardSink:
        from omni_rollout.monitor.tensorboard_sink import TensorboardSink  # a second, and a package that need not be there

        goes_on = self._history[-1]["step"] + 1 if self._history else 0
        return TensorboardSink(self.run_dir, self._config.wandb.images, config, pairs_of(self._config), goes_on)

    def _remember(self) -> None:
        self._metrics.touch()
        for line in read_metrics(self._metrics):
            self.lines += 1
            self._history.append(line)
            gaps = timestep_gaps({key: math.nan if value is None else value for key, value in line.items()})
            self._gaps += [(line["step"], gaps)] if gaps else []
            self._alerts.update(line["alerts/names"].split(", ") if "alerts/names" in line else ())

    @property
    def wandb_id(self) -> str | None:
        return self._wandb.run_id

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._wandb.close(failed=kind is not None)
        if self._tensorboard is not None:
            self._tensorboard.close()

    def log(
        self,
        step: int,
        metrics: Mapping[str, float],
        images: Sequence[CaptionedImage] = (),
        notes: Mapping[str, str] | None = None,
        evaluation: Sequence[CaptionedImage] = (),
    ) -> None:
        """Writes one step, once, with its alerts: `alerts`, their number, and the note `alerts/names`.

        A number that is not finite is `null` in `metrics.jsonl`, for JSON has no NaN; console and wandb show it as it is.
        An alert is spelled out the first time; from then on it is counted.

        Args:
            step: 0 is the state before training.
            images: (caption, media) of the step's rollout, group by group, see `Trajectory.media`.
            evaluation: the same of an evaluation after the step: always of the same prompts and seeds.
            notes: what is text, under names like those of metrics, e.g. `weights/digest`.

        Raises:
            RunFailedError: there is no room for it.
        """
        alerts = find_alerts(step, metrics, self._config, notes)
        alerts += run_lost(step, metrics, self._history, self._config)
        new = [alert for alert in alerts if alert.name not in self._alerts]
        self._alerts.update(alert.name for alert in alerts)
        metrics = {**metrics, "alerts": float(len(alerts))}
        texts = {**(notes or {}), **({"alerts/names": ", ".join(alert.name for alert in alerts)} if alerts else {})}
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        try:
            line = {"step": step, **finite, **texts}
            self._history.append(line)
            heatmap = self._write(step, json.dumps(line, allow_nan=False), metrics, images, evaluation)
        except OSError as error:
            how = how_to_go_on(self.run_dir)
            raise RunFailedError(
                f"step {step} could not be written to the run folder: {error}. Make room, then {how}"
            ) from error
        self._console.log(step, metrics, new, {alert.name: self._alerts[alert.name] for alert in alerts if alert not in new})
        shown = {"training": images, "evaluation": evaluation}
        for sink in filter(None, (self._wandb, self._tensorboard)):
            sink.log(step, {**metrics, **texts}, shown, new, heatmap)

    def _write(
        self,
        step: int,
        line: str,
        metrics: Mapping[str, float],
        images: Sequence[CaptionedImage],
        evaluation: Sequence[CaptionedImage],
    ) -> Path | None:
        """What goes to the run folder; the path of the heat map if it was drawn."""
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self.lines += 1
        if images:
            image_grid(images, self._config.rollout.group_size).save(self._image_dir / f"step_{step:04d}.png")
        if evaluation:
            image_grid(evaluation[:ON_SHEET]).save(self._image_dir / f"{EVALUATION}_{step:04d}.png")
        return self._heatmap(step, metrics)

    def _heatmap(self, step: int, metrics: Mapping[str, float]) -> Path | None:
        """Draws `images/parity_heatmap.png` when it is due; its path then."""
        gaps = timestep_gaps(metrics)
        if not gaps:
            return None
        self._gaps.append((step, gaps))
        if not (any(gaps.values()) or step % HEATMAP_EVERY == 0 or step == self._total_steps):
            return None
        path = self._image_dir / "parity_heatmap.png"
        heat_map(self._gaps, self._config.trainer.clip_range).save(path)
        return path

    def summary(self, checkpoint: Path | None = None) -> None:
        """Says what the run came to and where its results lie, on stdout and in `summary.txt`."""
        rows = dict(verdict(self._history))
        rows |= {"run folder": str(self.run_dir), "metrics": str(self.run_dir / "metrics.jsonl")}
        sheets = sorted(self._image_dir.glob(f"{EVALUATION}_*.png"))
        if len(sheets) > 1:  # the same prompts and seeds: what differs is the policy
            rows |= {"images before": str(sheets[0]), "images after": str(sheets[-1])}
        if checkpoint is not None:
            rows["checkpoint"] = str(checkpoint)
        if self._alerts:
            rows["alerts"] = ", ".join(f"{name} in {count} steps" for name, count in self._alerts.items())
        if self._wandb.offline_dir is not None:
            rows["wandb"] = f"offline; upload with: wandb sync {shlex.quote(str(self._wandb.offline_dir))}"
        if self._tensorboard is not None:
            rows["tensorboard"] = f"tensorboard --logdir {shlex.quote(str(self.run_dir))}"
        try:
            if (curve := reward_curve(self._history)) is not None:
                curve.save(self.run_dir / "curve.png")
                rows["curve"] = str(self.run_dir / "curve.png")
        except OSError as error:
            self._console.say(f"curve.png could not be written: {error}")
        text = "\n".join(f"{name:<14} {told}" for name, told in rows.items())
        self._console.say(text)
        try:
            (self.run_dir / "summary.txt").write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            self._console.say(f"summary.txt could not be written: {error}")
