"""What the exact profile costs: its rollout time over that of `parity=fast`, pair by pair in one run.

    python benchmarks/parity_cost.py --model recipes/nano/checkpoint --pairs 7

Two processes, an engine each, take turns; only one works at a time. Machines are noisy: read the median of the ratios.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path


def serve(pipe: Connection, model: str, parity: str, arguments: argparse.Namespace) -> None:
    """Rolls out once per message received; answers with the seconds it took."""
    import torch

    from omni_rollout.data.collate import derive_seed
    from omni_rollout.models.qwen_image.spec import resolve
    from omni_rollout.rollout.engine import RolloutEngine
    from omni_rollout.types import Prompt, RolloutRequest

    torch.set_num_threads(arguments.threads)
    size, width = arguments.size, arguments.width
    parameters = {"height": size, "width": size, "num_inference_steps": 10, "prompt_width": width}
    spec = resolve({**parameters, "true_cfg_scale": arguments.true_cfg_scale})
    with RolloutEngine(model, dtype=arguments.dtype, max_num_seqs=arguments.max_num_seqs, parity=parity) as engine:
        torch.set_num_threads(arguments.threads)
        pipe.send("ready")
        while (number := pipe.recv()) is not None:
            requests = [
                RolloutRequest(
                    request_id=f"{number}-{index}",
                    prompt=Prompt(text=f'a red sign that says "{index:02d}"'),
                    spec=spec,
                    seed=derive_seed(number, index),
                    group_id=str(index),
                    member=0,
                )
                for index in range(arguments.images)
            ]
            start = time.perf_counter()
            finished = sum(1 for _ in engine.generate(requests))
            pipe.send(time.perf_counter() - start)
            assert finished == arguments.images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--width", type=int, default=16, help="text tokens")
    parser.add_argument("--true-cfg-scale", type=float, default=1.0)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for parity in ("exact", "fast"):
        ours, theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, arguments.model, parity, arguments)).start()
        assert ours.recv() == "ready"
        pipes[parity] = ours

    def timed(parity: str, number: int) -> float:
        pipes[parity].send(number)
        return pipes[parity].recv()

    for parity in pipes:  # not counted
        timed(parity, 0)
    ratios = []
    for number in range(1, arguments.pairs + 1):
        order = ["exact", "fast"] if number % 2 else ["fast", "exact"]
        seconds = {parity: timed(parity, number) for parity in order}
        ratios.append(seconds["exact"] / seconds["fast"])
        print(f"pair {number}: exact {seconds['exact']:.2f}s fast {seconds['fast']:.2f}s ratio {ratios[-1]:.3f}", flush=True)
    for pipe in pipes.values():
        pipe.send(None)
    median = statistics.median(ratios)
    spread = f"({min(ratios):.3f} to {max(ratios):.3f})"
    print(f"exact over fast, {arguments.dtype}, {arguments.images} images: median {median:.3f} {spread}")
    if arguments.json:
        settings = {key: value for key, value in vars(arguments).items() if key != "json"}
        arguments.json.write_text(json.dumps({"settings": settings, "ratios": ratios, "median": median}))


if __name__ == "__main__":
    main()
