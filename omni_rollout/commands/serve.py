"""`omni-rollout serve`."""

from __future__ import annotations

import argparse

from omni_rollout.commands import Commands, add_command
from omni_rollout.launch.help import ROLLOUT_KEYS

READS = ("model", "collate", "sampling", "parity", "threads", "rollout.max_num_seqs", "serve")
_MORE = """  serve.host, .port                       127.0.0.1 and 8091; another address needs a secret in OMNI_ROLLOUT_TOKEN
  serve.max_steps, .max_pixels, ...       limits, each answered with 4xx and its name

example:
  omni-rollout serve model=nano
  omni-rollout train experiment=nano_ocr rollout.url=http://127.0.0.1:8091
"""


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    serve = add_command(
        commands,
        "serve",
        run,
        "answer rollout requests over HTTP, with the bits of an engine in process",
        f"{ROLLOUT_KEYS.rstrip()}\n{_MORE}",
    )
    serve.add_argument("overrides", nargs="+", metavar="KEY=VALUE", help="Hydra overrides, such as model=nano")


def run(parsed: argparse.Namespace) -> int:
    from omni_rollout.launch.compose import compose
    from omni_rollout.launch.imports import imported_for_good
    from omni_rollout.launch.progress import quieten_libraries
    from omni_rollout.launch.validate import validate_serving
    from omni_rollout.rollout.start import say_family_defaults

    config = compose(parsed.overrides, name="rollout", unused=("prompts",), reads=READS)
    validate_serving(config)
    say_family_defaults(config)
    quieten_libraries(config.model.path)
    with imported_for_good():
        from omni_rollout.rollout.serve.start import serve

    serve(config)
    return 0
