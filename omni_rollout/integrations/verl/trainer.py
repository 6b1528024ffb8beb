"""The V1 trainer that verl runs under the name `omni_rollout`. verl keeps the loop, TransferQueue and the worker group.

prepare_step          Collator.groups ─► AgentLoopManager (engines, rewards) ─► TransferQueue
replay_buffer.sample  waits until every group is finished
_compute_advantage    rewards ─► advantages
_update_actor         keys, advantages ─► TrainerRank.update_policy, on every rank
on_step_end           TrainerRank.publish ─► every RolloutServer, digests compared
_compute_metrics      Monitor.log
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import ray
import torch
import transfer_queue as tq
from omegaconf import DictConfig, OmegaConf
from transfer_queue import KVBatchMeta
from transformers import AutoTokenizer
from verl.plugin.platform import get_platform
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.trainer.ppo.v1 import PPOTrainer, register_trainer
from verl.utils.debug import marked_timer

from omni_rollout.algorithms import get_algorithm
from omni_rollout.config import Placement
from omni_rollout.data.collate import Collator
from omni_rollout.data.seeds import SeedLedger
from omni_rollout.data.stream import prompt_data
from omni_rollout.errors import WeightSyncError
from omni_rollout.integrations.verl import NAME, replica
from omni_rollout.integrations.verl.agent_loop import AgentLoopManager
from omni_rollout.integrations.verl.colocated import ColocatedRank
from omni_rollout.integrations.verl.deaths import find_dead, restarts
from omni_rollout.integrations.verl.metrics import Samples, captioned, merged, our_timings
from omni_rollout.integrations.verl.rank import RankUpdate, TrainerRank
from omni_rollout.integrations.verl.records import RUNTIME_ENV, Order, Weights, adopt, column
from omni_rollout.integrations.verl.replay_buffer import WatchedReplayBuffer
from omni_rollout.integrations.verl.reward import RewardWorkers
from omni_rollout.models import family_module
from omni_rollout.monitor import Guards, Monitor, last_words, step_metrics, step_notes
from omni_rollout.policy.learner import Which
from omni_rollout.policy.recompute import check_machine
from omni_rollout.rewards import make_rewards
from omni_rollout.run.checkpoints import Checkpoints, how_to_go_on
from omni_rollout.run.evaluation import evaluated
from omni_rollout.run.resume import check_weights, enter, run_state
from omni_rollout.run.start import find_start
from omni_rollout.run.stop import StopFlag
from omni_rollout.trajectories.journal import Journal
from omni_rollout.types import Prompt, RolloutRequest


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
        ranks = self.run.trainer.ranks
        accelerated = get_platform().device_name != "cpu"
        pool = RayResourcePool(process_on_nodes=[1] * ranks, use_gpu=accelerated, max_colocate_count=1, name_prefix=NAME)
        section = OmegaConf.to_container(self.config[NAME])  # a node would take all of verl's configuration along
        colocated = self.run.rollout.placement is Placement.colocated
        rank = ray.remote(ColocatedRank if colocated else TrainerRank)
        worker = RayClassWithInitArgs(cls=rank, section=section)
        self.actor_rollout_wg = RayWorkerGroup(
            resource_pool=pool,
            ray_cls_with_init=worker,
            device_name=get_platform().device_name,
            worker_env=RUNTIME_ENV["env_vars"],
        )
        self.reward_loop_manager = RewardWorkers(config=self.config)
        rollout = self.config.actor_rollout_ref.rollout
        self.servers = self.actor_rollout_wg.workers if colocated else replica.launch(rollout, section, self.run.engines)
        self.actor_rollout_wg.init_model(self.start.checkpoint)
        self.global_steps = self.start.step

    def _init_dataloader(self) -> None:
        run = self.run
        self.stream, self.evaluation_prompts = prompt_data(run)
        all_prompts = [*self.stream.prompts, *self.evaluation_prompts]
        self.rewards = make_rewards(run)
        self.rewards.check(all_prompts, family_module(run.model.family, "spec").KIND)
        tokenizer = AutoTokenizer.from_pretrained(run.model.path, subfolder="tokenizer")
        self.algorithm = get_algorithm(run.algorithm)
        self.collator = Collator(run.model.family, tokenizer, run.sampling, run.collate, self.algorithm.window_start)
        for prompt in all_prompts:
            self.collator.check(self.collator.spec(images=prompt.images), prompt)
        self.guards = Guards(run.run_dir)
        self.seeds = SeedLedger(Path(run.run_dir) / "seeds.jsonl")
        self.total_training_steps = self.steps_per_epoch = max(run.trainer.steps, 1)

    def get_llm_client(self) -> list[Any]:
        """What verl hands to the agent loop."""
        return self.servers

    def get_reward_handles(self) -> list[Any]:
        return self.reward_loop_manager.reward_loop_worker_handles

    def on_init_end(self) -> None:
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
        step, size = self.global_steps, self.run.rollout.group_size
        requests = self.collator.groups(self.stream.batch(step), step, size)
        self.reused, self.padding = self.seeds.record(requests), self.collator.padding(requests)
        self._submit(requests, "train")
        return {}

    def _submit(self, requests: list[RolloutRequest], partition: str) -> int:
        """Orders trajectories, and returns how many groups there will be."""
        groups = list(dict.fromkeys(request.group_id for request in requests))
        tags = [{"is_prompt": True, "status": "pending", "global_steps": self.global_steps} for _ in groups]
        tq.kv_batch_put(keys=groups, partition_id=partition, tags=tags)
        order = Order(requests=tuple(requests), weights=self.weights, step=self.global_steps, partition=partition)
        self.agent_loop_manager.generate_sequences(order)
        return len(groups)

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
        self.told = self.agent_loop_manager.settle()
        self.samples = self._samples(batch)
        self.reused += self.seeds.record_noise(cast(Any, self.samples.sources))
        self.scored = self.rewards.batch(self.samples.breakdown, self.samples.failures)
        self.rewards.require(self.scored)
        self.group_ids = [self.samples.group_ids[row] for row in self.scored.scored]  # the others leave their groups
        rewards = torch.tensor(self.rewards.compared(self.scored, self.group_ids), dtype=torch.float32)
        self.advantages = self.algorithm.advantages(rewards, self.group_ids)
        return batch

    def _update_actor(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        keys, update = [batch.keys[row] for row in self.scored.scored], self.actor_rollout_wg.update_policy
        self.updates: list[RankUpdate] = update(keys, batch.partition_id, self.advantages, self.global_steps)
        self.sampled_by = self.weights.digest
        return batch

    def on_sample_end(self) -> None: ...

    def on_step_end(self) -> None:
        with marked_timer("update_weights", self.timing_raw), last_words(self.sight, self.global_steps):
            self._publish()

    def _publish(self, which: Which = "sampler") -> None:
        """Every server holds the ranks' weights afterwards, or will before it samples again."""
        published: list[Weights] = self.actor_rollout_wg.publish(self.global_steps, which)
        digests = {weights.digest for weights in published}
        if len(digests) > 1:
            raise WeightSyncError(f"step {self.global_steps}: the trainer ranks hold different weights, {sorted(digests)}")
        self.weights = published[0]
        for weights in published[1:]:
            if weights.machine is not None:
                check_machine(weights.machine, {"machine": self.weights.machine})
        self.servers_in_step = replica.push(self.servers, self.weights, self.run.rollout.timeout)

    def _samples(self, batch: KVBatchMeta) -> Samples:
        data = tq.kv_batch_get(keys=batch.keys, partition_id=str(batch.partition_id), select_fields=["sample"])
        return Samples.of(column(data, "sample"), batch.tags)

    def _validate(self) -> dict[str, float]:
        """Deterministic (ode) images from fixed seeds; with an average kept, of the averaged policy as well."""
        name = f"step-{self.global_steps:05d}" if self.global_steps else "before"
        averages = self.run.trainer.ema_decay > 0 and self.global_steps > 0
        if self.algorithm.samples_with_old:
            self._publish("policy")
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
        requests = self.collator.evaluation(self.evaluation_prompts, self.run.evaluation, name)
        groups = self._submit(requests, "val")
        batch, _ = self.replay_buffer.sample(self.global_steps, "val", groups)
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
            timings=our_timings(timing_raw),
            kept=self.told["kept"],
            learning_rate=first.learning_rate,
            collisions=self.seeds.collisions,
            recomputed=first.recomputed,
            drift=self.weights.drift,
        )
        ours |= {
            "rollout/servers": float(self.servers_in_step),
            "rollout/retried": float(self.agent_loop_manager.retried),
            "perf/restarts": float(restarts(self.run.run_dir)),
            **evaluated,
        }
        lost = {"not_kept": self.told["not_kept"], "not_scored": scored.failures}
        digest, recomputed = self.sampled_by, first.recomputed
        notes = step_notes(first.update, sampled_by=digest, recomputed=recomputed, reused=self.reused, **lost)
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
        state = run_state(
            self.run,
            step=self.global_steps,
            weights=self.weights.digest,
            wandb_id=self.sight.wandb_id,
            lines={"metrics.jsonl": self.sight.lines, "seeds.jsonl": self.seeds.lines},
        )
        for failure in self.actor_rollout_wg.save_checkpoint(folder, state):
            if failure is not None:
                raise OSError(failure)
