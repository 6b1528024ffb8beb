"""`omni-rollout ...`: parses the command line and hands over. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import atexit
import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NoReturn

from omni_rollout import __version__
from omni_rollout.commands import modules
from omni_rollout.errors import EngineHungError, RunFailedError

_TRACEBACK = "OMNI_ROLLOUT_TRACEBACK"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 1 (it failed), 2 (what was given cannot work), 130 (interrupted)."""
    try:
        parsed = _parser().parse_args(arguments)
        run: Callable[[argparse.Namespace], int] = parsed.run
        return run(parsed)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except RunFailedError as error:
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, EngineHungError):
            sys.stdout.flush()
            os._exit(1)  # the engine's thread cannot be ended, and Python would wait for it
        return 1
    except ValueError as error:
        if not _is_for_people(error) or os.environ.get(_TRACEBACK) == "1":
            raise
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2


def _is_for_people(error: ValueError) -> bool:
    """An error class of this package (UserError, RequestError, CapsuleError), not a library's: told without importing them."""
    return type(error).__module__.partition(".")[0] == "omni_rollout"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="omni-rollout",
        description="RL post-training of diffusion models with a rollout and a trainer that agree bit for bit.",
        epilog=f"A wrong key or value is told in one line; {_TRACEBACK}=1 shows where it was found.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in modules():
        module.add(commands)
    return parser


def program() -> NoReturn:
    """`main`, and the end of the process: threads are waited for, and what asked to be called at exit is.

    Then Python would take all modules apart, object by object: seconds in which nothing is seen to happen, and in which a
    thread of torch's gloo that frees a tensor aborts the process (torch 2.13). That is left out.
    """
    status = main()
    threading._shutdown()  # type: ignore[attr-defined]  # as multiprocessing ends its processes
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (BrokenPipeError, ValueError):  # nobody reads it any more, or it is closed
            pass
        except OSError as error:  # a full disk: what was said is lost, and that is no success
            status = status or 120  # Python's own
            with suppress(OSError):
                os.write(2, f"error: {stream.name} could not be written: {error}\n".encode())
    os._exit(status)


if __name__ == "__main__":
    program()
