"""Weights & Biases as a sink: online with a key at hand, offline without one, and never the reason a run stops."""

from __future__ import annotations

import netrc
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from omni_rollout.config import WandbConfig
from omni_rollout.monitor.images import CaptionedImage


class WandbSink:
    """Sends metrics and images to wandb, which keeps its files under the run folder.

    Where wandb does not start, that is said once on stderr and the sink does nothing from then on: the same metrics and images
    are in the run folder.
    """

    def __init__(self, run_dir: Path, settings: WandbConfig, config: Mapping[str, Any]) -> None:
        self._run: Any = None
        self._images = settings.images
        mode = settings.mode or os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
        if mode == "disabled":
            return
        import wandb

        self._wandb = wandb
        try:
            self._run = wandb.init(
                project=settings.project,
                name=run_dir.name,
                dir=run_dir,
                mode=mode,  # pyright: ignore[reportArgumentType]  # WANDB_MODE is wandb's own to check
                config=dict(config),
                settings=wandb.Settings(silent=True),
            )
        except (wandb.Error, OSError, ValueError) as error:
            print(
                f"wandb did not start ({error}); going on without it, metrics and images are in {run_dir}. "
                "wandb.mode=offline or wandb.mode=disabled avoids this",
                file=sys.stderr,
            )

    @property
    def offline_dir(self) -> Path | None:
        """The folder that `wandb sync` takes; None when there is nothing to sync."""
        return Path(self._run.dir).parent if self._run is not None and self._run.offline else None

    def log(self, step: int, metrics: Mapping[str, float], images: Sequence[CaptionedImage]) -> None:
        if self._run is None:
            return
        shown = [self._wandb.Image(array, caption=caption) for caption, array in images[: self._images]]
        self._run.log({**metrics, **({"images": shown} if shown else {})}, step=step)

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
