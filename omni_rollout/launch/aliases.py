"""What others call our keys: the table behind "no such key", printed in docs/coming_from.md by `as_table`.

Names are those of flow_grpo's config/base.py (sample.*, train.*), of verl and verl-omni, and of Flow-Factory's YAML files.
"""

from __future__ import annotations

from collections.abc import Iterator

NONE = ""  # there is no such key here, and the note says why or what instead

# theirs -> ours, and what differs. A longer name of theirs ends in one of these: actor_rollout_ref.rollout.n is rollout.n.
ALIASES: dict[str, tuple[str, str]] = {
    # flow_grpo
    "train.beta": ("algorithm.kl_coef", "theirs is per step with its dt or without, by version; 0 keeps no reference"),
    "beta": ("algorithm.kl_coef", ""),
    "num_image_per_prompt": ("rollout.group_size", "images of one prompt, among which advantages are taken"),
    "sample.train_batch_size": ("rollout.prompts_per_step", "a step samples prompts_per_step x group_size images"),
    "num_batches_per_epoch": ("rollout.prompts_per_step", "there are no epochs: a step is one rollout and one update"),
    "num_epochs": ("trainer.steps", "there are no epochs: a step is one rollout and one update"),
    "num_inner_epochs": ("trainer.updates_per_step", "mini-batches of one rollout, each seen once"),
    "train.batch_size": ("trainer.micro_batch_size", "(trajectory, step) pairs a backward pass"),
    "gradient_accumulation_steps": ("trainer.updates_per_step", "gradients are summed over a mini-batch by themselves"),
    "num_steps": ("sampling.num_inference_steps", ""),
    "eval_num_steps": ("sampling.num_inference_steps", "evaluation takes as many steps as training"),
    "guidance_scale": ("sampling.true_cfg_scale", "1.0 and below turn guidance off"),
    "cfg_scale": ("sampling.true_cfg_scale", "1.0 and below turn guidance off"),
    "train.cfg": ("sampling.true_cfg_scale", "training guides exactly as sampling did"),
    "resolution": ("sampling.height", "and sampling.width"),
    "global_std": ("algorithm.advantage_std", "global or group"),
    "per_prompt_stat_tracking": ("algorithm.advantage_std", "the mean is always the group's; the deviation is global or group"),
    "adv_clip_max": ("algorithm.advantage_clip", ""),
    "timestep_fraction": ("sampling.sde_window_range", "[first, end) of the steps that are trained; or sde_window_size"),
    "pretrained.model": ("model.path", "a checkpoint in diffusers layout, or a hub id"),
    "pretrained": ("model.path", "a checkpoint in diffusers layout, or a hub id"),
    "mixed_precision": ("model.dtype", "float32 or bfloat16; master weights are fp32"),
    "use_lora": ("trainer.lora_rank", "0 trains full weights"),
    "lora_path": ("trainer.resume", "a checkpoint's folder"),
    "train.ema": ("trainer.ema_decay", "0 keeps no average"),
    "adam_beta1": ("trainer.betas", "[beta1, beta2]"),
    "adam_beta2": ("trainer.betas", "[beta1, beta2]"),
    "adam_weight_decay": ("trainer.weight_decay", ""),
    "adam_epsilon": (NONE, "AdamW's epsilon is torch's own"),
    "dataset": ("prompts", "a file: .txt, .jsonl or .parquet"),
    "prompt_fn": ("prompts", "a file: .txt, .jsonl or .parquet"),
    "reward_fn": ("reward", "reward=NAME, or reward.weights={NAME: WEIGHT}"),
    "rewards": ("reward", "reward=NAME, or reward.weights={NAME: WEIGHT}"),
    "logdir": ("run_dir", ""),
    "run_name": ("run_dir", "the run is named like its folder"),
    "save_freq": ("trainer.save_every", "steps"),
    "eval_freq": ("evaluation.every", "steps"),
    "num_checkpoint_limit": ("trainer.keep_checkpoints", ""),
    "resume_from": ("trainer.resume", "auto, or a checkpoint's folder"),
    "allow_tf32": (NONE, "parity=exact pins it"),
    "same_latent": (NONE, "every image starts from noise of its own seed"),
    # verl, verl-omni
    "rollout.n": ("rollout.group_size", "images of one prompt, among which advantages are taken"),
    "n": ("rollout.group_size", ""),
    "lr": ("trainer.learning_rate", ""),
    "optim.lr": ("trainer.learning_rate", ""),
    "lr_warmup_steps": ("trainer.warmup_steps", ""),
    "warmup": ("trainer.warmup_steps", ""),
    "lr_scheduler_type": ("trainer.schedule", "constant or linear"),
    "clip_ratio": (
        "trainer.clip_range",
        "a hundred to a thousand times smaller than for text; see above",
    ),
    "clip_ratio_high": ("trainer.clip_range", "one for both sides"),
    "clip_ratio_low": ("trainer.clip_range", "one for both sides"),
    "grad_clip": ("trainer.max_grad_norm", ""),
    "kl_loss_coef": ("algorithm.kl_coef", ""),
    "use_kl_loss": ("algorithm.kl_coef", "above 0 turns it on"),
    "use_kl_in_reward": (NONE, "the KL is part of the loss: algorithm.kl_coef"),
    "adv_estimator": ("algorithm", "algorithm=NAME"),
    "norm_adv_by_std_in_grpo": ("algorithm.advantage_std", "global or group"),
    "train_files": ("prompts", ""),
    "val_files": ("evaluation.prompts", ""),
    "data.train_batch_size": ("rollout.prompts_per_step", "prompts, not images"),
    "val_batch_size": ("evaluation.images", "how many are made in all"),
    "max_prompt_length": ("collate.prompt_width", "text tokens; every prompt is as wide"),
    "ppo_mini_batch_size": ("trainer.updates_per_step", "how many mini-batches, not how large"),
    "ppo_micro_batch_size_per_gpu": ("trainer.micro_batch_size", "(trajectory, step) pairs a backward pass"),
    "micro_batch_size_per_gpu": ("trainer.micro_batch_size", "(trajectory, step) pairs a backward pass"),
    "ppo_epochs": ("trainer.updates_per_step", "mini-batches of one rollout, each seen once"),
    "total_epochs": ("trainer.steps", "there are no epochs: a step is one rollout and one update"),
    "total_training_steps": ("trainer.steps", ""),
    "max_steps": ("trainer.steps", ""),
    "test_freq": ("evaluation.every", "steps"),
    "trainer.logger": ("wandb.mode", "online, offline or disabled; metrics.jsonl is always written"),
    "report_to": ("wandb.mode", "online, offline or disabled; metrics.jsonl is always written"),
    "project_name": ("wandb.project", ""),
    "experiment_name": ("run_dir", "the run is named like its folder"),
    "default_local_dir": ("run_dir", ""),
    "output_dir": ("run_dir", ""),
    "resume_mode": ("trainer.resume", "none, auto, or a checkpoint's folder"),
    "n_gpus_per_node": ("trainer.ranks", "with backend=verl; launch.gpus_per_node under Slurm"),
    "nnodes": ("launch.nodes", "with launch=slurm"),
    "strategy": ("trainer.engine", "torch, fsdp2 or deepspeed"),
    "hybrid_engine": ("rollout.placement", "apart or colocated"),
    "param_offload": ("trainer.offload", "none, optimizer or all"),
    "optimizer_offload": ("trainer.offload", "none, optimizer or all"),
    "enable_gradient_checkpointing": ("trainer.gradient_checkpointing", ""),
    "gpu_memory_utilization": (NONE, "the engine takes what it needs: omni-rollout plan says how much"),
    "tensor_model_parallel_size": (
        NONE,
        "parity=exact allows no parallelism inside an engine; give rollout.workers",
    ),
    "calculate_log_probs": ("trainer.old_log_probs", "rollout or recompute"),
    "max_num_batched_tokens": ("rollout.max_num_seqs", "images denoised together"),
    # Flow-Factory
    "model_name_or_path": ("model.path", "a checkpoint in diffusers layout, or a hub id"),
    "model_type": ("model.family", ""),
    "finetune_type": ("trainer.lora_rank", "0 trains full weights"),
    "trainer_type": ("algorithm", "algorithm=NAME"),
    "dataset_dir": ("prompts", "a file: .txt, .jsonl or .parquet"),
    "unique_sample_num_per_epoch": ("rollout.prompts_per_step", ""),
    "num_train_timesteps": ("sampling.sde_window_size", "steps in a row that are trained"),
    "kl_beta": ("algorithm.kl_coef", ""),
    "per_device_batch_size": ("rollout.max_num_seqs", "images denoised together; trainer.micro_batch_size for the update"),
    "reward_model": ("reward", "reward=NAME, or reward.weights={NAME: WEIGHT}"),
    "save_dir": ("run_dir", ""),
    "logging_backend": ("wandb.mode", "online, offline or disabled; metrics.jsonl is always written"),
    "dynamics_type": ("sampling.sde_type", "sde, cps, dance_sde or ode"),
}


def meant(key: str) -> tuple[str, str] | None:
    """(our key or NONE, what differs) of a key of theirs, the longest name that `key` ends in first; None: not known."""
    parts = key.split(".")
    ends = (".".join(parts[start:]) for start in range(len(parts)))
    return next((ALIASES[end] for end in ends if end in ALIASES), None)


def as_table() -> Iterator[str]:
    """Markdown, as docs/coming_from.md has it."""
    yield from ("| theirs | here | |", "|---|---|---|")
    yield from (f"| `{theirs}` | {f'`{ours}`' if ours else '–'} | {note} |" for theirs, (ours, note) in ALIASES.items())


if __name__ == "__main__":
    print("\n".join(as_table()))
