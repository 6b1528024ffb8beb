"""The trainer's step against its floor, and weight sync."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from benchmarks.speed.contenders import requests, transformer, transformer_inputs
from benchmarks.speed.shapes import Shape
from benchmarks.speed.turns import Process, ratios, rounds, together

IMAGES = 16  # at most, in an update
OURS, FLOOR = "ours", "floor"


class Ours:
    """Engine and learner in one process, as `omni-rollout train` has them; the trajectories are the engine's."""

    def __init__(self, shape: Shape, micro_batch: int) -> None:
        import torch

        from omni_rollout.launch.compose import compose
        from omni_rollout.policy.learner import Learner
        from omni_rollout.rollout.engine import RolloutEngine

        config = compose(
            [f"model.path={shape.path}", f"model.dtype={shape.dtype}", f"trainer.micro_batch_size={micro_batch}"],
            unused=["prompts"],
        )
        self._engine = RolloutEngine(shape.path, dtype=shape.dtype, max_num_seqs=shape.in_flight)
        torch.set_num_threads(shape.threads)
        self._learner = Learner(config)
        self._trajectories = list(self._engine.generate(requests(shape, 0)))
        # None is 0, or the update would leave its row out.
        self._advantages = torch.tensor([1.0 if row % 2 else -1.0 for row in range(shape.images)])

    def step(self, number: int) -> None:
        """Forward and backward over all pairs of trajectory and step, clipping, AdamW."""
        old = [trajectory.log_probs for trajectory in self._trajectories]
        self._learner.step(self._trajectories, self._advantages, old, number)

    def sync(self, number: int) -> None:
        self._engine.update_weights(self._learner.weights(), number)

    def copy(self, number: int) -> int:
        """What no sync can be without: a copy of every tensor. Returns their bytes."""
        copies = [tensor.detach().clone() for _, tensor in self._learner.weights()]
        return sum(tensor.numel() * tensor.element_size() for tensor in copies)

    def close(self) -> None:
        self._engine.close()


class Floor:
    """The stock transformer under autograd on as many rows, in the same micro-batches; weights in the shape's dtype."""

    def __init__(self, shape: Shape, micro_batch: int) -> None:
        import torch

        self._shape = shape
        self._transformer = transformer(shape)
        pairs = shape.images * (shape.steps - 1)
        self._sizes = [min(micro_batch, pairs - start) for start in range(0, pairs, micro_batch)]
        dtype = getattr(torch, shape.dtype)
        self._inputs = {rows: transformer_inputs(shape, rows, dtype) for rows in set(self._sizes)}
        self._optimizer = torch.optim.AdamW(self._transformer.parameters(), lr=1e-6)

    def step(self, number: int) -> None:
        import torch

        for rows in self._sizes:
            velocity = self._transformer(**self._inputs[rows])[0]
            if self._shape.guided:
                negative = self._transformer(**self._inputs[rows])[0]
                velocity = negative + self._shape.true_cfg_scale * (velocity - negative)
            velocity.float().square().mean().backward()
        torch.nn.utils.clip_grad_norm_(self._transformer.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def close(self) -> None:
        """Its process ends."""


def update(shape: Shape, number: int) -> dict[str, Any]:
    """The update's seconds beside the floor's, and the sync's beside those of a plain copy; all in turns."""
    shape = replace(shape, images=min(shape.images, IMAGES))
    micro_batch = 16 if shape.tokens <= 64 else 4
    processes = {
        name: Process(f"update, {name}", make, shape, micro_batch, threads=shape.threads)
        for name, make in ((OURS, Ours), (FLOOR, Floor))
    }
    seconds: dict[str, list[float]] = {OURS: [], FLOOR: [], "sync": [], "copy": []}
    with together(processes):
        for process in processes.values():  # not counted
            process.ask("step", 1)
        processes[OURS].ask("sync", 1)
        size = processes[OURS].ask("copy", 1)[0]
        for turn, order in rounds((OURS, FLOOR, "sync", "copy"), number):
            for name in order:
                process, method = (processes[OURS], name) if name in ("sync", "copy") else (processes[name], "step")
                seconds[name].append(process.ask(method, turn + 1)[1])
    return {
        "shape": shape.name,
        "pairs": shape.images * (shape.steps - 1),
        "micro_batch": micro_batch,
        "megabytes": size / 1e6,
        "load": os.getloadavg()[0],
        "seconds": seconds,
        "update_of_floor": ratios(seconds[OURS], seconds[FLOOR]),
        "sync_of_copy": ratios(seconds["sync"], seconds["copy"]),
    }
