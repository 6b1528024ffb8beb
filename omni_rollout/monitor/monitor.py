"""Where a run writes: its folder first, then the console and wandb."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import yaml

from omni_rollout.config import TrainConfig
from omni_rollout.launch import to_yaml
from omni_rollout.monitor.console import ConsoleSink
from omni_rollout.monitor.images import CaptionedImage, image_grid
from omni_rollout.monitor.wandb_sink import WandbSink


class Monitor:
    """Writes `config.yaml`, `metrics.jsonl` and `images/step_XXXX.png` to the run folder, and tells the console and wandb.

    A context manager: what is logged is on disk when `log` returns, and leaving it by an error closes all sinks.
    """

    def __init__(self, run_dir: Path, config: TrainConfig, total_steps: int) -> None:
        self.run_dir = run_dir
        self._image_dir = run_dir / "images"
        self._image_dir.mkdir(parents=True, exist_ok=True)
        text = to_yaml(config)
        (run_dir / "config.yaml").write_text(text, encoding="utf-8")
        self._metrics = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")  # a resumed run goes on in its file
        self._written: list[Path] = []
        self._wandb = WandbSink(run_dir, config.wandb, yaml.safe_load(text))
        self._console = ConsoleSink(total_steps)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._console.close()
        self._metrics.close()
        self._wandb.close(failed=kind is not None)

    def log(self, step: int, metrics: Mapping[str, float], images: Sequence[CaptionedImage] = ()) -> None:
        """Writes one step, once.

        A number that is not finite is `null` in `metrics.jsonl`, for JSON has no NaN; console and wandb show it as it is.

        Args:
            step: 0 is the state before training.
            images: (caption, [H, W, 3] uint8).
        """
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self._metrics.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self._metrics.flush()
        if images:
            path = self._image_dir / f"step_{step:04d}.png"
            image_grid(images).save(path)
            self._written.append(path)
        self._console.log(step, metrics)
        self._wandb.log(step, metrics, images)

    def summary(self, checkpoint: Path | None = None) -> None:
        """Prints where the results lie."""
        self._console.close()
        rows = {"run folder": self.run_dir, "metrics": self.run_dir / "metrics.jsonl"}
        if self._written:
            rows |= {"images before": self._written[0], "images after": self._written[-1]}
        if checkpoint is not None:
            rows["checkpoint"] = checkpoint
        for name, path in rows.items():
            print(f"{name:<14} {path}")
        if self._wandb.offline_dir is not None:
            print(f"{'wandb':<14} offline; upload with: wandb sync {self._wandb.offline_dir}")
