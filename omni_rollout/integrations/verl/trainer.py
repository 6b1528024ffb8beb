"""The V1 trainer that verl runs under the name `omni_rollout`. verl keeps the loop, TransferQueue and the worker group.

prepare_step          Collator.groups ─► AgentLoopManager (engines, rewards) ─► TransferQueue
replay_buffer.sample  waits until every group is finished
_compute_advantage    rewards ─► advantages
_update_actor         keys, advantages ─► TrainerRank.update_policy, on every rank
on_step_end           TrainerRank.publish ─► every RolloutServer, digests compared
_compute_metrics      Monitor.log

With rollout.ahead=1 the next step is ordered as soon as this one is sampled (on_sample_end), and the servers, busy with it,
get what on_step_end published when it is done.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import ray
import torch
import transfer_queue as tq
from omegaconf import DictConfig, OmegaConf
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1 import PPOTrainer, register_trainer
from verl.utils.debug import marked_timer

from omni_rollout.config import Placement
from omni_rollout.data.seeds import SeedLedger
from omni_rollout.integrations.verl import NAME, replica
from omni_rollout.integrations.verl.agent_loop import AgentLoopManager
from omni_rollout.integrations.verl.deaths import answers, find_dead, places, restarts
from omni_rollout.integrations.verl.group import rank_group
from omni_rollout.integrations.verl.metrics import Samples, captioned, merged, our_timings
from omni_rollout.integrations.verl.rank import RankUpdate
from omni_rollout.integrations.verl.records import Order, Weights, adopt, agreed, column
from omni_rollout.integrations.verl.replay_buffer import WatchedReplayBuffer
from omni_rollout.integrations.verl.reward import RewardWorkers
from omni_rollout.monitor import Guards, Monitor, last_words, step_metrics, step_notes
from omni_rollout.policy.learner import Which
from omni_rollout.run.checkpoints import Checkpoints, how_to_go_on
from omni_rollout.run.evaluation import evaluated
from omni_rollout.run.material import Material
from omni_rollout.run.resume import behaviour_version, check_weights, enter, run_state
from omni_rollout.run.start import find_start
from omni_rollout.run.stop import StopFlag
from omni_rollout.trajectories.journal import Journal
from omni_rollout.types import Prompt


@register_trainer(NAME)
class OmniTrainer(PPOTrainer):
    actor_rollout_wg: Any  # its methods are those of TrainerRank, added at run time
    agent_loop_manager: Any
    replay_buffer: Any

    def __init__(self, config: DictConfig) -> None:
        self.run = adopt(config)
        self.start = find_start(self.run)  # before anything is started
        config.trainer.val_before_train = self.run.evaluation.images > 0 and not self.start.step
        super().__init__(config)
        self.trainer_mode = "sync"  # verl takes every name but this for an asynchronous trainer

    def _build_replay_buffer(self) -> WatchedReplayBuffer:
        return WatchedReplayBuffer("sync", self.config.trainer.v1, None, "wait", sampler_kwargs=DictConfig({}))

    def _setup(self) -> None:
        self.stop = StopFlag(self.run.run_dir)
        self.stop.clear()
        enter(self.run, self.start)
        self._init_dump_executor()
        self._init_dataloader()
        section = OmegaConf.to_container(self.config[NAME])  # a node would take all of verl's configuration along
        self.actor_rollout_wg = rank_group(self.run, section)
        self.reward_loop_manager = RewardWorkers(config=self.config)
        colocated, rollout = self.run.rollout.placement is Placement.colocated, self.config.actor_rollout_ref.rollout
        self.servers = self.actor_rollout_wg.workers if colocated else replica.launch(rollout, section, self.run.engines)
        ray.get(self.actor_rollout_wg.init_model(self.start.checkpoint))
        self.places = places(self.actor_rollout_wg.workers)
        self.global_steps = self.start.step

    def _init_dataloader(self) -> None:
        run = self.run
        self.material = Material.of(run)
        self.rewards, self.algorithm = self.material.rewards, self.material.algorithm
        self.guards = Guards(run.run_dir)
        self.seeds = SeedLedger(Path(run.run_dir) / "seeds.jsonl")
        self.total_training_steps = self.steps_per_epoch = max(run.trainer.steps, 1)

    def get_llm_client(self) -> list[Any]:
        """What verl hands to the agent loop."""
        return self.servers

    def get_reward_handles(self) -> list[Any]:
        return self.reward_loop_manager.reward_loop_worker_handles

    def on_init_end(self) -> None:
        self.ordered: dict[int, Order] = {}  # step -> what is being sampled, or was and is to be learned from
        self._publish()  # also proves, before the first rollout, that all sides read the same checkpoint
        check_weights(self.start, self.weights.digest)

    def fit(self, agent_loop_manager: AgentLoopManager) -> None:
        run, start = self.run, self.start
        self.replay_buffer.agent_loop = agent_loop_manager
        self.checkpoints = Checkpoints(run, Journal(run.run_dir))
        wandb_id = start.run.wandb_id if start.run is not None else None
        with Monitor(Path(run.run_dir), run, run.trainer.steps, wandb_id) as self.sight:
            super().fit(agent_loop_manager)
            self.sight.summary(self.checkpoints.last)
        self.checkpoints.check()

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, Any]) -> KVBatchMeta:
        self.stop.stepping()
        with last_words(self.sight, self.global_steps):
            try:
                return super().step(metrics, timing_raw)
            except Exception as error:
                find_dead(self.actor_rollout_wg.workers, error)
                raise

    def prepare_step(self) -> dict[str, float]:
        if self.global_steps not in self.ordered:
            ahead, first = self.run.rollout.ahead, behaviour_version(self.start)
            behind = ahead and first < self.weights.version == self.start.step  # a run that goes on: as it would have been
            self._order(self.global_steps, self._published("behaviour", first) if behind else self.weights)
        return {}

    def _order(self, step: int, weights: Weights) -> None:
        requests = tuple(self.material.requests(step))
        self.ordered[step] = Order(requests=requests, weights=weights, step=step, partition="train")
        self.agent_loop_manager.generate_sequences(self.ordered[step])

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict[str, Any], **_: Any) -> KVBatchMeta:
        """In the order of request ids, whatever the order of arrival; the ranks share the rows out themselves."""
        order = sorted(range(len(batch.keys)), key=lambda index: batch.tags[index]["request_id"])
        return KVBatchMeta(
            partition_id=batch.partition_id,
            keys=[batch.keys[index] for index in order],
            tags=[batch.tags[index] for index in order],
            extra_info=batch.extra_info,
        )

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        return batch  # the ranks have the rollout's, or recompute them

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        order, self.told = self.ordered.pop(self.global_steps), self.agent_loop_manager.settle(self.global_steps)
        self.version, self.sampled_by = order.weights.version, order.weights.digest  # Ray may let go of the tensors
        self.samples, self.padding = self._samples(batch), self.material.collator.padding(order.requests)
        self.reused = self.seeds.record(order.requests) + self.seeds.record_noise(cast(Any, self.samples.sources))
        self.scored = self.rewards.batch(self.samples.breakdown, self.samples.failures)
        self.rewards.require(self.scored)
        self.group_ids = [self.samples.group_ids[row] for row in self.scored.scored]  # the others leave their groups
        rewards = torch.tensor(self.rewards.compared(self.scored, self.group_ids), dtype=torch.float32)
        self.advantages = self.algorithm.advantages(rewards, self.group_ids)
        return batch

    def _update_actor(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        keys, update = [batch.keys[row] for row in self.scored.scored], self.actor_rollout_wg.update_policy
        asked = update(keys, batch.partition_id, self.advantages, self.global_steps, self.version)
        self.updates: list[RankUpdate] = self._answers(asked)
        return batch

    def on_sample_end(self) -> None:
        if self.run.rollout.ahead and self.global_steps < self.run.trainer.steps:
            self._push()
            self._order(self.global_steps + 1, self.weights)

    def on_step_end(self) -> None:
        with marked_timer("update_weights", self.timing_raw), last_words(self.sight, self.global_steps):
            self.weights = self._published("sampler", self.global_steps)
            if not self.ordered:
                self._push()

    def _publish(self, which: Which = "sampler") -> None:
        self.weights = self._published(which, self.global_steps)
        self._push()

    def _push(self) -> None:
        """Every server holds `weights` afterwards, or will before it samples again; what they sample now is finished first."""
        if self.ordered:
            self.agent_loop_manager.drain()
        self.servers_in_step = replica.push(self.servers, self.weights, self.run.rollout.timeout)

    def _published(self, which: Which, version: int) -> Weights:
        return agreed(self._answers(self.actor_rollout_wg.publish(version, which)), self.global_steps)

    def _answers(self, asked: list[Any]) -> list[Any]:
        """Of all trainer ranks. Raises HungError after `launch.timeout`."""
        return answers(asked, self.actor_rollout_wg.workers, self.places, self.run.launch.timeout)

    def _samples(self, batch: KVBatchMeta) -> Samples:
        data = tq.kv_batch_get(keys=batch.keys, partition_id=str(batch.partition_id), select_fields=["sample"])
        return Samples.of(column(data, "sample"), batch.tags)

    def _validate(self) -> dict[str, float]:
        """Deterministic (ode) images from fixed seeds; with an average kept, of the averaged policy as well."""
        name = f"step-{self.global_steps:05d}" if self.global_steps else "before"
        averages = self.run.trainer.ema_decay > 0 and self.global_steps > 0
        if self.algorithm.samples_with_old:
            self._publish("policy")
        elif self.ordered:
            self._push()
        metrics, notes, scored, samples = self._evaluate(name)
        self.images = captioned(samples, scored)
        texts = [prompt["text"] for prompt in samples.prompts]
        guarded, lost = self.guards(self.global_steps, samples.media, texts, scored)
        self.lost = notes | lost
        if averages:
            self._publish("average")
            averaged, *_ = self._evaluate(f"{name}-ema")
            metrics |= {f"{key}_ema": value for key, value in averaged.items()}
        if averages or self.algorithm.samples_with_old:
            self._publish()
        if not self.global_steps:
            self.sight.log(0, metrics | guarded, notes=self.lost, evaluation=self.images)
        return metrics | guarded

    def _evaluate(self, name: str) -> tuple[dict[str, float], dict[str, str], list[float | None], Samples]:
        step, requests = self.global_steps, tuple(self.material.evaluation(name))
        order = Order(requests=requests, weights=self.weights, step=step, partition="val")
        self.agent_loop_manager.generate_sequences(order)
        batch, _ = self.replay_buffer.sample(step, "val", len(order.groups))
        batch = self._balance_batch(batch, {})
        samples = self._samples(batch)
        tq.kv_clear(keys=batch.keys, partition_id="val")
        prompts = [Prompt.from_json(prompt) for prompt in samples.prompts]
        scored = self.rewards.batch(samples.breakdown, samples.failures)
        return *evaluated(self.rewards, samples.media, prompts, scored), scored.total, samples

    def _compute_metrics(
        self, batch: KVBatchMeta, metrics: dict[str, Any], timing_raw: dict[str, float], global_steps: int, epoch: int
    ) -> None:
        """Adds this step's numbers, as the embedded trainer has them, to what verl logs, and writes them to the run folder."""
        evaluated = {key: value for key, value in metrics.items() if key.startswith(("evaluation/", "guard/"))}
        samples, scored, first, rewards = self.samples, self.scored, self.updates[0], self.scored.of(self.scored.scored)
        ours = step_metrics(
            merged([rank.update for rank in self.updates]),
            rewards=rewards.total,
            breakdown=rewards.breakdown,
            failed=len(scored.total) - len(rewards.total),
            group_ids=self.group_ids,
            elements=samples.elements,
            padding=self.padding,
            clip_range=self.run.trainer.clip_range,
            timings={**our_timings(timing_raw), "sampling": self.told["seconds"]},
            kept=self.told["kept"],
            learning_rate=first.learning_rate,
            collisions=self.seeds.collisions,
            recomputed=first.inspection.recompute,
            staleness=global_steps - 1 - self.version,
            sampled=first.inspection.parity,
            drift=self.weights.drift,
        )
        ours |= {
            "rollout/servers": float(self.servers_in_step),
            "rollout/weights_bytes": float(self.weights.bytes),
            "rollout/fetched_bytes": float(max(rank.fetched for rank in self.updates)),
            "rollout/retried": float(self.agent_loop_manager.retried),
            "perf/restarts": float(restarts(self.run.run_dir)),
            **evaluated,
        }
        lost = {"not_kept": self.told["not_kept"], "not_scored": scored.failures}
        seen = {"sampled_by": self.sampled_by, "recomputed": first.inspection.recompute, "reused": self.reused}
        notes = step_notes(first.update, **seen, **lost)
        metrics.update(ours)
        images = self.images if evaluated else ()
        notes |= {**(self.lost if evaluated else {}), **self.checkpoints.notes()}
        self.sight.log(global_steps, ours, captioned(samples, scored.total), notes, images)
        self._finish(global_steps)

    def _finish(self, step: int) -> None:
        """What follows a step that is in metrics.jsonl: a checkpoint, if one is due, and the end, if it was asked for."""
        stopping = self.stop.is_set
        if self.checkpoints.due(step, stopping=stopping):
            self.checkpoints.save(step, self._write)
        else:
            self.checkpoints.after(step)
        if stopping and step < self.run.trainer.steps:
            print(f"stopped after step {step}, as asked; {how_to_go_on(self.run.run_dir)}", flush=True)
            self.total_training_steps = step  # ends verl's loop

    def _write(self, folder: Path) -> None:
        lines, weights = {"metrics.jsonl": self.sight.lines, "seeds.jsonl": self.seeds.lines}, self.weights.digest
        state = run_state(self.run, step=self.global_steps, weights=weights, wandb_id=self.sight.wandb_id, lines=lines)
        for failure in self._answers(self.actor_rollout_wg.save_checkpoint(folder, state)):
            if failure is not None:
                raise OSError(failure)
