"""Config -> engine -> uvicorn, and their end."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import uvicorn
from transformers import AutoTokenizer

from omni_rollout.config import TrainConfig
from omni_rollout.data.collate import Collator
from omni_rollout.errors import EngineHungError, RunFailedError, UserError
from omni_rollout.rollout.choice import make_engine
from omni_rollout.rollout.serve.app import LOCAL, TOKEN, make_app
from omni_rollout.rollout.serve.asked import Reader
from omni_rollout.rollout.serve.host import Host
from omni_rollout.rollout.serve.images import ImageFolder
from omni_rollout.rollout.serve.state import Server

GRACE_SECONDS = 30  # that clients have to take what is being sent, when the server is told to end


def serve(config: TrainConfig) -> None:
    """Until a signal ends it. Prints its address when it answers.

    Raises:
        UserError: an address that is not loopback, without a token.
        RunFailedError: the engine is lost.
    """
    check_address(config.serve.host)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path, subfolder="tokenizer")
    collator = Collator(config.model.family, tokenizer, config.sampling, config.collate)
    images = ImageFolder(config.serve.max_pixels)
    runner: list[uvicorn.Server] = []

    def stop() -> None:
        for one in runner:
            one.should_exit = one.force_exit = True

    host = Host(lambda: make_engine(config), config.serve.timeout, stop)
    settings = uvicorn.Config(
        make_app(Server(config, host, Reader(collator, config.serve, images))),
        host=config.serve.host,
        port=config.serve.port,
        log_level="warning",
        timeout_graceful_shutdown=GRACE_SECONDS,
        server_header=False,
    )
    runner.append(_Announced(settings))
    try:
        runner[0].run()
    finally:
        images.close()
        if host.failure is None:
            host.close()
    if host.failure is not None:
        raise EngineHungError(str(host.failure))  # its thread cannot be ended


def check_address(host: str) -> None:
    token = os.environ.get(TOKEN)
    if host not in LOCAL and not token:
        raise UserError(f"serve.host={host}: others can reach this address; set {TOKEN} to a secret, or serve.host=127.0.0.1")
    if token is not None and (len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token):
        raise UserError(f"{TOKEN}: expected 16 or more characters that can be printed, without spaces")


class _Announced(uvicorn.Server):
    """Says its address when it answers: with port 0 it is known only then."""

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if not self.started:
            raise RunFailedError(f"{self.config.host}:{self.config.port} cannot be listened at, see above")
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        print(f"serving {self.config.app.title} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)  # type: ignore[union-attr]
        sys.stdout.flush()
