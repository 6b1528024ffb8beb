"""`omni-rollout ...`: parses the command line and hands over. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from omni_rollout import __version__
from omni_rollout.errors import EngineHungError, RunFailedError, UserError
from omni_rollout.launch.help import REPLAY_STATUS, ROLLOUT_KEYS, TRAIN_KEYS
from omni_rollout.launch.outputs import folder_problem
from omni_rollout.models import families

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


def _train(parsed: argparse.Namespace) -> int:
    from omni_rollout.config import Backend
    from omni_rollout.launch.compose import compose
    from omni_rollout.launch.validate import validate
    from omni_rollout.rollout.start import say_family_defaults

    config = compose(parsed.overrides)
    validate(config)
    say_family_defaults(config)
    if config.launch.slurm:
        from omni_rollout.integrations.slurm import submit

        submit(config, parsed.overrides)
        return 0
    if config.backend is Backend.verl:
        from omni_rollout.integrations.verl.launch import train
    else:
        from omni_rollout.launch.progress import quieten_libraries

        quieten_libraries(config.model.path)
        from omni_rollout.train import train

    train(config)
    return 0


def _rollout(parsed: argparse.Namespace) -> int:
    from omni_rollout.launch.compose import compose
    from omni_rollout.launch.validate import validate_rollout

    out = [word.removeprefix("out=") for word in parsed.overrides if word.startswith("out=")]
    if len(out) != 1 or not out[0]:
        raise UserError("out has no value: give out=FOLDER, once" if not out else f"out is given as {out}: expected one folder")
    config = compose([word for word in parsed.overrides if not word.startswith("out=")], name="rollout")
    validate_rollout(config, out[0])
    from omni_rollout.rollout.start import rollout

    return rollout(config, Path(out[0]))


def _parity(parsed: argparse.Namespace) -> int:
    from omni_rollout.launch.compose import compose
    from omni_rollout.launch.validate import validate_scoring

    config = compose(parsed.overrides, name="parity", unused=["prompts", "model.path"])
    validate_scoring(config, {"--json": parsed.json, "--html": parsed.html}, path_needed=False)
    from omni_rollout.launch.progress import progress_of
    from omni_rollout.parity.matrix import Matrix

    matrix = Matrix.parse(parsed.matrix)  # a typo must not wait for the engine's libraries
    with progress_of(config.model.path, "loading torch and the engine") as progress:
        from omni_rollout.nano.random_weights import build_random
        from omni_rollout.parity.command import parity

        files = {"json_path": parsed.json, "html_path": parsed.html}
        return parity(config, **files, matrix=matrix, progress=progress, build_random=build_random)


def _replay(parsed: argparse.Namespace) -> int:
    from omni_rollout.launch.compose import compose
    from omni_rollout.launch.validate import validate_scoring

    overrides = [word for word in parsed.words if "=" in word and not os.path.isfile(word)]
    capsules = [Path(word) for word in parsed.words if word not in overrides]
    if not capsules:
        raise UserError("no capsule given: expected one or more *.safetensors files, and model=... for the checkpoint")
    config = compose(overrides, name="parity", unused=["prompts"])
    validate_scoring(config, {"--json": parsed.json})
    from omni_rollout.launch.progress import progress_of

    with progress_of(config.model.path, "loading torch") as progress:
        from omni_rollout.parity.command import replay

        return replay(capsules, config, json_path=parsed.json, progress=progress)


def _check_out(out: Path) -> None:
    problem = folder_problem(out)
    if problem is not None:
        raise UserError(f"--out {out}: {problem}")


def _plan(parsed: argparse.Namespace) -> int:
    from omni_rollout.plan.command import plan

    return plan(parsed.overrides, json_path=parsed.json)


def _nano_build(parsed: argparse.Namespace) -> int:
    _check_out(parsed.out)
    from omni_rollout.nano.build import build

    build(parsed.out, seed=parsed.seed, threads=parsed.threads)
    return 0


def _nano_random(parsed: argparse.Namespace) -> int:
    _check_out(parsed.out)
    from omni_rollout.nano.random_weights import build_random

    build_random(
        parsed.out,
        family=parsed.family,
        layers=parsed.layers,
        heads=parsed.heads,
        head_dim=parsed.head_dim,
        joint_dim=parsed.joint_dim,
        seed=parsed.seed,
    )
    return 0


def _doctor(parsed: argparse.Namespace) -> int:
    from omni_rollout.launch.doctor import doctor

    return doctor(fix=parsed.fix)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="omni-rollout",
        description="RL post-training of diffusion models with a rollout and a trainer that agree bit for bit.",
        epilog=f"A wrong key or value is told in one line; {_TRACEBACK}=1 shows where it was found.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add(commands, "train", _train, "train a policy against rewards", TRAIN_KEYS).add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides; start from an experiment: experiment=nano_ocr"
    )
    rollout = _add(
        commands,
        "rollout",
        _rollout,
        "sample images and keep their trajectories: a capsule (*.safetensors) and a PNG for each",
        f"{ROLLOUT_KEYS}\nexample:\n  omni-rollout rollout model=nano prompts=prompts.txt out=rollouts rollout.group_size=4\n",
    )
    rollout.add_argument("overrides", nargs="+", metavar="KEY=VALUE", help="prompts=FILE, out=FOLDER and Hydra overrides")
    _add_parity(commands)
    plan = _add(
        commands,
        "plan",
        _plan,
        "say what a run needs of GPUs and hosts, and whether it fits (exit status 1 if not); needs no GPU",
        "example:\n  omni-rollout plan model=qwen_image trainer.engine=fsdp2 trainer.lora_rank=64 gpus=2x8x80\n",
    )
    plan.add_argument("overrides", nargs="+", metavar="KEY=VALUE", help="gpus=[NODESx]GPUSxGIB, Hydra overrides")
    plan.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    _add_nano(commands)
    doctor = _add(commands, "doctor", _doctor, "say what is installed, what is broken and what to do", "")
    doctor.add_argument(
        "--fix", action="store_true", help="uninstall torchvision, torchaudio and torchcodec if they do not load"
    )
    return parser


def _add_parity(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parity = _add(
        commands,
        "parity",
        _parity,
        "prove that engine and trainer agree bit for bit, or name what makes them differ (exit status 1)",
        "example:\n  omni-rollout parity model=nano --json p.json --html p.html --matrix dtype=bfloat16 in_flight=1,8\n",
    )
    parity.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides: model=nano or model.path=FOLDER")
    parity.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots")
    parity.add_argument(
        "--matrix",
        nargs="+",
        default=[],
        metavar="WORD",
        help="what to measure; by default dtype=float32,bfloat16 guidance=1.0,4.0 width=natural,64,256 "
        "in_flight=1,3,8,staggered images=8 causes=true compile=false true_width=true",
    )
    replay = _add(
        commands,
        "replay",
        _replay,
        "score capsules from any run or machine: do they still hold?",
        REPLAY_STATUS,
    )
    replay.add_argument("words", nargs="+", metavar="CAPSULE|KEY=VALUE", help="files, and Hydra overrides for the checkpoint")
    for command in (parity, replay):
        command.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")


def _add_nano(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    nano = commands.add_parser("nano", help="make the nano model, Qwen-Image in miniature").add_subparsers(
        required=True, metavar="COMMAND"
    )
    build = _add(
        nano,
        "build",
        _nano_build,
        "train it from nothing (minutes)",
        "example:\n  omni-rollout nano build --out recipes/nano\n",
    )
    build.add_argument("--threads", type=int, default=1, help="of torch; the weights depend on it (default: %(default)s)")
    random = _add(
        nano,
        "random",
        _nano_random,
        "any family's architecture in any size, with random weights",
        "example:\n  omni-rollout nano random --family qwen_image --out /tmp/model --layers 2 --heads 4\n",
    )
    random.add_argument("--family", choices=families(), default="qwen_image", help="(default: %(default)s)")
    random.add_argument("--layers", type=int, default=2, help="transformer blocks (default: %(default)s)")
    random.add_argument("--heads", type=int, default=4, help="attention heads (default: %(default)s)")
    random.add_argument("--head-dim", "--dim", type=int, default=32, help="width of a head (default: %(default)s)")
    random.add_argument("--joint-dim", type=int, default=64, help="width of the prompt embeddings (default: %(default)s)")
    for command in (build, random):
        command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
        command.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    epilog: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name, help=summary, description=summary, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.set_defaults(run=run)
    return command


if __name__ == "__main__":
    sys.exit(main())
