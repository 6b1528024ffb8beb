"""Weights & Biases as a sink: online with a key at hand, offline without one, and never the reason a run stops."""

from __future__ import annotations

import io
import netrc
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from omni_rollout.config import WandbConfig
from omni_rollout.monitor.alerts import Alert
from omni_rollout.trajectories.media import animated
from omni_rollout.trajectories.sheet import CaptionedImage, flat, kind_of

_WORST = {  # metric -> what a run's summary keeps of it: one bad step must not be covered by the good ones after it
    "parity/over_clip": "max",
    "parity/bitwise_equal_fraction": "min",
    "parity/weights_equal": "min",
    "parity/seed_collisions": "max",
    "rollout_corr/logprob_abs_diff_max": "max",
    "actor/skipped_updates": "max",
    "alerts": "max",
}


class WandbSink:
    """Sends metrics and images to wandb, which keeps its files under the run folder.

    Where wandb does not start, that is said once on stderr and the sink does nothing from then on: the same metrics and images
    are in the run folder.

    Args:
        pairs: metric -> the two programs it compares; in the run's config and in the panel `parity/what_is_compared`.
        run_id: of the run to go on with; None: a new one.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: WandbConfig,
        config: Mapping[str, Any],
        pairs: Mapping[str, str],
        run_id: str | None = None,
    ) -> None:
        self.run_id = run_id
        self._run: Any = None
        self._pairs: Any = None  # a table, until it is logged
        self._images = settings.images
        mode = settings.mode or os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
        if mode == "disabled":
            return
        import wandb

        self._wandb = wandb
        try:
            self._run = wandb.init(
                project=settings.project,
                id=run_id,
                resume="allow" if run_id is not None else None,
                name=run_dir.name,
                dir=run_dir,
                mode=mode,  # pyright: ignore[reportArgumentType]  # WANDB_MODE is wandb's own to check
                config={**config, "what_is_compared": dict(pairs)},
                settings=wandb.Settings(silent=True),
            )
        except (wandb.Error, OSError, ValueError) as error:
            print(
                f"wandb did not start ({error}); going on without it, metrics and images are in {run_dir}. "
                "wandb.mode=offline or wandb.mode=disabled avoids this",
                file=sys.stderr,
            )
            return
        self.run_id = self._run.id
        for name, worst in _WORST.items():
            self._run.define_metric(name, summary=worst)
        self._pairs = wandb.Table(columns=["metric", "compares"], data=[list(pair) for pair in pairs.items()])

    @property
    def offline_dir(self) -> Path | None:
        """The folder that `wandb sync` takes; None when there is nothing to sync."""
        return Path(self._run.dir).parent if self._run is not None and self._run.offline else None

    def log(
        self,
        step: int,
        values: Mapping[str, float | str],
        images: Mapping[str, Sequence[CaptionedImage]],
        alerts: Sequence[Alert] = (),
        heatmap: Path | None = None,
    ) -> None:
        """Sends one step.

        Args:
            images: what they are of -> some of them, under `images/<name>`.
            alerts: those that are new, so each kind is sent once a run.
        """
        if self._run is None:
            return
        media: dict[str, Any] = {}
        for name, some in images.items():
            media |= {f"{kind}/{name}": shown for kind, shown in self._shown(some[: self._images]).items()}
        if heatmap is not None:
            media["parity/heatmap"] = self._wandb.Image(str(heatmap))
        if self._pairs is not None:
            media["parity/what_is_compared"], self._pairs = self._pairs, None
        self._run.log({**values, **media}, step=step)
        for alert in alerts:
            self._run.alert(title=alert.name, text=alert.text, level="ERROR")

    def _shown(self, images: Sequence[CaptionedImage]) -> dict[str, list[Any]]:
        """Videos as GIFs, which need no codec; layers side by side."""
        shown: dict[str, list[Any]] = {}
        for caption, media in images:
            if kind_of(caption, media) == "video":
                video = self._wandb.Video(io.BytesIO(animated(media, "GIF")), caption=caption, format="gif")
                shown.setdefault("videos", []).append(video)
            else:
                shown.setdefault("images", []).append(self._wandb.Image(flat(caption, media), caption=caption))
        return shown

    def close(self, *, failed: bool) -> None:
        if self._run is not None:
            self._run.finish(exit_code=1 if failed else 0)


def has_key() -> bool:
    """Whether wandb would find a key without asking: WANDB_API_KEY, or a netrc entry for the server."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False
