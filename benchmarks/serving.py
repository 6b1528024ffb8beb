"""What the road over HTTP costs: seconds and bytes a trajectory, and a server's overhead on the nano rollout.

    python -m benchmarks.serving [--rounds N] [--in-flight N]

The first table is of arrays alone, without an engine: a trajectory is encoded, carried and decoded, in two
processes. The second runs the nano model here and behind `omni-rollout serve`, turn by turn on one machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import pickle
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import safetensors.torch
import torch

from omni_rollout.models import family_module
from omni_rollout.rollout.serve.shared import SharedFolder
from omni_rollout.rollout.serve.wire import frame, frames
from omni_rollout.trajectories.capsule import decode_capsule, encode_capsule, load_capsule, packed
from omni_rollout.types import Prompt, RolloutRequest, SamplingSpec, Trajectory

IMAGES = 32  # of a rollout
PIECE = 1 << 16  # bytes that are read at a time, as an HTTP client does


def made(family: str, parameters: dict[str, Any], width: int) -> Trajectory:
    """A trajectory of the true sizes, from a generator."""
    spec: SamplingSpec = family_module(family, "spec").resolve(parameters)
    layout = family_module(family, "spec").layout(spec)
    shape = [64 if size is None else size for size in layout.latent]
    generator = torch.Generator().manual_seed(0)
    steps, stochastic = spec.num_inference_steps, len(spec.step_indices)
    sigmas = torch.linspace(1, 0, steps + 1)
    rng = np.random.default_rng(0)
    embeds = torch.randn(spec.prompt_width, width, generator=generator).bfloat16()
    return Trajectory(
        latents=torch.randn(stochastic + 1, *shape, generator=generator),
        log_probs=torch.randn(stochastic, generator=generator),
        step_indices=torch.tensor(spec.step_indices),
        sigmas=sigmas,
        timesteps=1000 * sigmas[:-1],
        prompt_embeds=embeds,
        prompt_embeds_mask=torch.ones(spec.prompt_width, dtype=torch.bool),
        negative_prompt_embeds=None,
        negative_prompt_embeds_mask=None,
        media=rng.integers(0, 256, layout.media, dtype=np.uint8),
        prompt=Prompt(text="x"),
        spec=spec,
        seed=0,
        group_id="g",
        member=0,
        policy_version=0,
        fingerprint={},
    )


def roads(trajectory: Trajectory, rounds: int) -> Iterator[tuple[str, float, float, int]]:
    """(road, least seconds, mean seconds of CPU on both sides, bytes that pass the socket)."""
    content = encode_capsule(trajectory)
    yield "in process", *measured(rounds, lambda: replace(trajectory, prompt=Prompt(text="x"))), 0
    yield "shared memory", *carried(rounds, trajectory, shared=True), 200
    yield "socket", *carried(rounds, trajectory, shared=False), len(content)
    pickled = pickle.dumps(trajectory, protocol=pickle.HIGHEST_PROTOCOL)
    yield "(pickle alone)", *measured(rounds, lambda: pickle.loads(pickle.dumps(trajectory))), len(pickled)


def measured(rounds: int, action: Callable[[], object]) -> tuple[float, float]:
    taken, cpu = [], time.process_time()
    for _ in range(rounds):
        start = time.perf_counter()
        action()
        taken.append(time.perf_counter() - start)
    return min(taken), (time.process_time() - cpu) / rounds


def carried(rounds: int, trajectory: Trajectory, *, shared: bool) -> tuple[float, float]:
    """From a trajectory in one process to the same in another, which says when it has it."""
    here, there = socket.socketpair()
    context = multiprocessing.get_context("fork")
    folder = SharedFolder() if shared else None
    process = context.Process(target=receive, args=(there, folder.folder if folder is not None else None, rounds))
    process.start()
    there.close()
    taken, cpu, before = [], time.process_time(), children()
    for _ in range(rounds):
        start = time.perf_counter()
        if folder is not None:
            path = folder.new()
            tensors, header = packed(trajectory, "x")
            safetensors.torch.save_file(tensors, path, metadata=header)
            parts = frame({"type": "trajectory", "index": 0, "shared": path.name})
        else:
            parts = frame({"type": "trajectory", "index": 0}, encode_capsule(trajectory))
        for part in parts:
            here.sendall(part)
        assert here.recv(1) == b"+"
        taken.append(time.perf_counter() - start)
    here.sendall(frame({"type": "end"})[0])
    process.join()
    here.close()
    if folder is not None:
        folder.close()
    return min(taken), (time.process_time() - cpu + children() - before) / rounds


def children() -> float:
    """Seconds of CPU of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def receive(connection: socket.socket, folder: Path | None, rounds: int) -> None:
    torch.set_num_threads(1)
    for head, content in frames(iter(lambda: connection.recv(PIECE) or None, None)):
        if folder is not None:
            trajectory = load_capsule(folder / head["shared"])
            (folder / head["shared"]).unlink()
        else:
            trajectory = decode_capsule(content)
        trajectory.media.sum()  # all of it is there, and read
        connection.sendall(b"+")


def overhead(rounds: int, in_flight: int) -> None:
    """Rollouts of the nano model of IMAGES requests: here, over shared memory, over the socket, turn by turn."""
    from omni_rollout.launch.compose import compose
    from omni_rollout.rollout.choice import make_engine
    from omni_rollout.rollout.remote import RemoteEngine

    settings = ["model=nano", f"rollout.max_num_seqs={in_flight}", "threads=1"]
    config = compose(settings, name="rollout", unused=("prompts",))
    torch.set_num_threads(1)
    spec = family_module("qwen_image", "spec").resolve(
        {"height": 64, "width": 64, "num_inference_steps": 10, "true_cfg_scale": 1.0, "prompt_width": 16}
    )
    requests = [
        RolloutRequest(
            request_id=f"r{seed}", prompt=Prompt(text="a red 4"), spec=spec, seed=seed, group_id=f"g{seed}", member=0
        )
        for seed in range(IMAGES)
    ]
    command = [sys.executable, "-m", "omni_rollout.cli", "serve", *settings, "serve.port=0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[-1]
        with make_engine(config) as engine, RemoteEngine(url, shared=0) as shared, RemoteEngine(url) as plain:
            roads = {"in process": engine, "shared memory": shared, "socket": plain}
            taken: dict[str, list[float]] = {name: [] for name in roads}
            cpu = dict.fromkeys(roads, 0.0)
            both = [psutil.Process(), psutil.Process(server.pid)]
            for number in range(rounds + 1):
                for name, road in roads.items():
                    start, used = time.perf_counter(), cpu_of(both)
                    assert len(list(road.generate(requests))) == IMAGES
                    if number:  # the first warms up
                        taken[name].append(time.perf_counter() - start)
                        cpu[name] += (cpu_of(both) - used) / rounds
        print(f"\nnano, {IMAGES} images, {in_flight} in flight, {rounds} rounds taking turns\n")
        print("| road | median s | over in process, round by round | mean s of CPU, both sides | over in process |")
        print("|---|---|---|---|---|")
        for name, seconds in taken.items():
            ratios = sorted(one / other for one, other in zip(seconds, taken["in process"], strict=True))
            middle, least, most = statistics.median(ratios), ratios[0], ratios[-1]
            own, over = cpu[name], cpu[name] / cpu["in process"]
            words = f"{middle:.3f} ({least:.3f} to {most:.3f})"
            print(f"| {name} | {statistics.median(seconds):.3f} | {words} | {own:.3f} | {over:.3f} |")
    finally:
        server.terminate()
        server.wait()


def cpu_of(processes: Sequence[psutil.Process]) -> float:
    """Seconds, of all their threads: what others do on the machine leaves it alone."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--in-flight", type=int, default=8)
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    image = made("qwen_image", {"height": 512, "width": 512, "num_inference_steps": 10, "true_cfg_scale": 1.0}, 3584)
    video = made(
        "wan2_2",
        {"height": 720, "width": 1280, "num_inference_steps": 10, "true_cfg_scale": 1.0, "extra": {"frames": 81}},
        4096,
    )
    print(f"{os.cpu_count()} cores, {parsed.rounds} rounds\n")
    print("| trajectory | road | least s | mean s of CPU, both sides | bytes over the socket |\n|---|---|---|---|---|")
    for name, trajectory in (("image 512 x 512", image), ("video 1280 x 720 x 81", video)):
        for road, seconds, cpu, size in roads(trajectory, parsed.rounds):
            print(f"| {name} | {road} | {seconds:.4f} | {cpu:.4f} | {size} |", flush=True)
    overhead(parsed.rounds, parsed.in_flight)


if __name__ == "__main__":
    main()
