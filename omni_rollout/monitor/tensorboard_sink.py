"""TensorBoard as a sink: event files in the run folder, with the names that wandb gets; never the reason a run stops."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard.writer import SummaryWriter

from omni_rollout.monitor.alerts import Alert
from omni_rollout.trajectories.sheet import CaptionedImage, image_grid

FOLDER = "tensorboard"  # within the run's


class TensorboardSink:
    """Writes what a step measured to `RUN/tensorboard`, on disk when `log` returns.

    Numbers are scalars, texts are texts; images are a sheet with their captions, of any media.

    Args:
        images: at most so many on a sheet.
        config: the run's, as YAML; shown as a text.
        pairs: metric -> the two programs it compares; shown as a text, `parity/what_is_compared`.
        from_step: of the run's first step here: what an earlier start of the same run wrote from there on is hidden.
    """

    def __init__(self, run_dir: Path, images: int, config: str, pairs: Mapping[str, str], from_step: int) -> None:
        self._folder, self._images = run_dir / FOLDER, images
        self._writer: SummaryWriter | None = None
        try:
            self._writer = SummaryWriter(str(self._folder), purge_step=from_step)
            self._writer.add_text("config", f"```yaml\n{config}\n```", from_step)
            self._writer.add_text("parity/what_is_compared", "\n".join(f"* {name}: {two}" for name, two in pairs.items()))
            self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def log(
        self,
        step: int,
        values: Mapping[str, float | str],
        images: Mapping[str, Sequence[CaptionedImage]],
        alerts: Sequence[Alert] = (),
        heatmap: Path | None = None,
    ) -> None:
        """Writes one step. The arguments are those of `WandbSink.log`."""
        if self._writer is None:
            return
        try:
            for name, value in values.items():
                add = self._writer.add_text if isinstance(value, str) else self._writer.add_scalar
                add(name, value, step)
            for name, some in images.items():
                if some and self._images:
                    self._show(f"images/{name}", image_grid(some[: self._images]), step)
            if heatmap is not None:
                with Image.open(heatmap) as drawn:
                    self._show("parity/heatmap", drawn.convert("RGB"), step)
            for alert in alerts:
                self._writer.add_text(f"alerts/{alert.name}", alert.text, step)
            self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def _show(self, name: str, image: Image.Image, step: int) -> None:
        assert self._writer is not None
        self._writer.add_image(name, np.asarray(image), step, dataformats="HWC")

    def _give_up(self, error: OSError) -> None:
        print(f"{self._folder} could not be written ({error}); going on without TensorBoard", file=sys.stderr)
        self._writer = None

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
