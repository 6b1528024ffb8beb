"""`omni-rollout reward serve`."""

from __future__ import annotations

import argparse

from omni_rollout import plugins
from omni_rollout.commands import Commands, add_command


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    reward = commands.add_parser("reward", help="serve a reward over HTTP, from a process and an environment of its own")
    serve = add_command(
        reward.add_subparsers(required=True, metavar="COMMAND"),
        "serve",
        run,
        "serve one reward over HTTP until it is interrupted",
        "example:\n  omni-rollout reward serve mine.py:bright --port 8300\n"
        "  omni-rollout train ... 'reward.weights={bright: 1.0}' reward.source.bright=http://127.0.0.1:8300\n",
    )
    serve.add_argument("name", metavar="NAME", help=f"of a reward that is registered, or {plugins.FORMS}")
    serve.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; nobody is asked who they are (default: %(default)s)"
    )
    serve.add_argument("--port", type=int, default=8300, help="0: any that is free (default: %(default)s)")
    serve.add_argument("--threads", type=int, default=1, help="CPU threads of the reward (default: %(default)s)")
    serve.add_argument("--model", help="folder or hub id of the model that a reward is read off")
    serve.add_argument("--timeout", type=float, default=300.0, help="seconds for one batch (default: %(default)s)")


def run(parsed: argparse.Namespace) -> int:
    import socket

    import uvicorn

    from omni_rollout.errors import UserError
    from omni_rollout.rewards import get_reward
    from omni_rollout.rewards.base.server import application

    is_function = plugins.is_function(parsed.name)
    name = parsed.name.rpartition(":")[2] if is_function else parsed.name
    reward = get_reward(name, parsed.threads, parsed.name if is_function else None, model=parsed.model)
    try:
        listening = socket.create_server((parsed.host, parsed.port))
    except (OSError, OverflowError) as error:  # the latter: of a port that is none
        raise UserError(
            f"--host {parsed.host} --port {parsed.port}: cannot listen there ({error}); give another port"
        ) from error
    print(f"reward {name}: http://{parsed.host}:{listening.getsockname()[1]}", flush=True)
    uvicorn.Server(uvicorn.Config(application(name, reward, parsed.timeout), log_level="warning")).run(sockets=[listening])
    return 0
