"""What others call our keys: the table behind "no such key", printed in docs/coming_from.md by `as_table`.

Names are those of flow_grpo's config/base.py (sample.*, train.*), of verl and verl-omni, and of Flow-Factory's YAML files.
"""

from __future__ import annotations

from collections.abc import Iterator

NONE = ""  # there is no such key here, and the note says why or what instead

# theirs -> ours, and what differs. A longer name of theirs ends in one of these: actor_rollout_ref.rollout.n is rollout.n.
# A star stands for a name of the user's choosing.
ALIASES: dict[str, tuple[str, str]] = {
    # flow_grpo
    "train.beta": ("algorithm.kl_coef", "theirs is per step with its dt or without, by version; 0 keeps no reference"),
    "beta": ("algorithm.kl_coef", ""),
    "num_image_per_prompt": ("rollout.group_size", "images of one prompt, among which advantages are taken"),
    "sample.train_batch_size": ("rollout.prompts_per_step", "a step samples prompts_per_step x group_size images"),
    "sample.batch_size": ("rollout.max_num_seqs", "images denoised together; a step samples prompts_per_step x group_size"),
    "num_batches_per_epoch": ("rollout.prompts_per_step", "there are no epochs: a step is one rollout and one update"),
    "num_epochs": ("trainer.steps", "there are no epochs: a step is one rollout and one update"),
    "num_inner_epochs": ("trainer.updates_per_step", "mini-batches of one rollout, each seen once"),
    "train.batch_size": ("trainer.micro_batch_size", "(trajectory, step) pairs a backward pass"),
    "gradient_accumulation_steps": (
        NONE,
        "gradients of a mini-batch are summed over as many passes as trainer.micro_batch_size makes of it; how many "
        "mini-batches a step has (of flow_grpo: num_batches_per_epoch / gradient_accumulation_steps) is "
        "trainer.updates_per_step",
    ),
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
    "reward_fn.*": ("reward.weights", "reward.weights={NAME: WEIGHT}"),
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
    "test_batch_size": ("evaluation.images", "how many are made in all"),
    "eval_guidance_scale": ("sampling.true_cfg_scale", "evaluation guides as training does"),
    "train_num_steps": ("sampling.sde_window_size", "steps in a row that are trained"),
    "mini_num_image_per_prompt": ("rollout.max_num_seqs", "images denoised together; the rest of a group waits"),
    "sample_time_per_prompt": ("rollout.group_size", "images of one prompt, in one rollout"),
    "kl_reward": (NONE, "the KL is part of the loss: algorithm.kl_coef"),
    "train.sft": (NONE, "algorithm=sft alone: from the best of its own images, or with algorithm.columns from a data set's"),
    "frames": ("sampling.extra", "sampling.extra.frames=N, of families that make videos"),
    "activation_checkpointing": ("trainer.gradient_checkpointing", ""),
    "fsdp_optimizer_offload": ("trainer.offload", "none, optimizer or all"),
    "use_8bit_adam": (NONE, "the optimizer is AdamW, its moments fp32; omni-rollout plan says what they take"),
    # verl, verl-omni
    "rollout.n": ("rollout.group_size", "images of one prompt, among which advantages are taken"),
    "n": ("rollout.group_size", ""),
    "lr": ("trainer.learning_rate", ""),
    "optim.lr": ("trainer.learning_rate", ""),
    "lr_warmup_steps": ("trainer.warmup_steps", ""),
    "warmup": ("trainer.warmup_steps", ""),
    "lr_scheduler_type": ("trainer.schedule", "constant or linear"),
    "clip_ratio": ("trainer.clip_range", "1e-5 to 1e-2, not 0.2: a log-prob is a mean over a latent's elements"),
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
    "max_prompt_length": ("collate.prompt_width", "text tokens; see collate.width"),
    "ppo_mini_batch_size": ("trainer.updates_per_step", "how many mini-batches, not how large"),
    "ppo_micro_batch_size_per_gpu": ("trainer.micro_batch_size", "(trajectory, step) pairs a backward pass"),
    "micro_batch_size_per_gpu": ("trainer.micro_batch_size", "(trajectory, step) pairs a backward pass"),
    "ppo_max_token_len_per_gpu": ("trainer.micro_batch_tokens", "of a pass, image and text, guidance's too"),
    "ppo_epochs": ("trainer.updates_per_step", "mini-batches of one rollout, each seen once"),
    "total_epochs": ("trainer.steps", "there are no epochs: a step is one rollout and one update"),
    "total_training_steps": ("trainer.steps", ""),
    "max_steps": ("trainer.steps", ""),
    "test_freq": ("evaluation.every", "steps"),
    "trainer.logger": ("wandb.mode", "or monitor.tensorboard=true; metrics.jsonl is always written"),
    "report_to": ("wandb.mode", "or monitor.tensorboard=true; metrics.jsonl is always written"),
    "project_name": ("wandb.project", ""),
    "experiment_name": ("run_dir", "the run is named like its folder"),
    "max_actor_ckpt_to_keep": ("trainer.keep_checkpoints", ""),
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
    "loss_mode": ("algorithm", "algorithm=NAME"),
    "model.algorithm": ("algorithm", "algorithm=NAME"),
    "max_sequence_length": ("collate.prompt_width", "text tokens; see collate.width"),
    "prompt_length": ("collate.prompt_width", "text tokens; see collate.width"),
    "num_frames": ("sampling.extra", "sampling.extra.frames=N, of families that make videos"),
    "model_dtype": ("model.dtype", "float32 or bfloat16; master weights are fp32"),
    "lora_dtype": (NONE, "factors are fp32"),
    "target_modules": (NONE, "LoRA adapts the attention projections of every block"),
    "custom_reward_function": ("reward.source", "reward.source.NAME=file.py:function, with reward.weights={NAME: WEIGHT}"),
    "custom_reward_function.path": ("reward.source", "reward.source.NAME=file.py:function, with reward.weights={NAME: WEIGHT}"),
    "custom_reward_function.name": ("reward.source", "reward.source.NAME=file.py:function, with reward.weights={NAME: WEIGHT}"),
    "reward_manager": (NONE, "rewards are called as they are, and summed: reward.weights={NAME: WEIGHT}"),
    "reward_manager.name": (NONE, "rewards are called as they are, and summed: reward.weights={NAME: WEIGHT}"),
    "aggregation": ("reward.normalise", "none: a weighted sum; group: of rewards normalised in their group"),
    "weight": ("reward.weights", "reward.weights={NAME: WEIGHT}"),
    "rollout.name": (NONE, "the engine is vllm-omni"),
    "trainer.device": (NONE, "a CUDA device where there is one, else the CPU"),
    "reward_functions": ("reward.weights", "reward.weights={NAME: WEIGHT}; sources in reward.source"),
    "reward_model.model_path": ("reward.model", "reward.model.NAME=FOLDER, of rewards that are read off a model"),
    "reward.num_workers": ("reward.threads", "or a server of its own: omni-rollout reward serve"),
    "agent.num_workers": ("rollout.workers", "engines, with backend=verl"),
    "step_execution": (NONE, "requests are always denoised step by step, and batched as they come"),
    "request_batch_max_wait_ms": (NONE, "requests are always denoised step by step, and batched as they come"),
    "load_format": (NONE, "weights are read from safetensors alone"),
    "layered_summon": (NONE, "weights go to the engine in pieces, each compared by its digest"),
    "attn_backend": (NONE, "parity=exact pins how both sides attend"),
    "rollout_attn_backend": (NONE, "parity=exact pins how both sides attend"),
    "ulysses_sequence_parallel_size": (NONE, "a sequence is not cut; give trainer.ranks"),
    "log_prob_micro_batch_size_per_gpu": ("trainer.micro_batch_size", "(trajectory, step) pairs a pass"),
    "filter_overlong_prompts": (NONE, "a prompt wider than collate.prompt_width is refused before anything is sampled"),
    "data_source": ("reward.weights", "one sum of rewards for all prompts; other columns go to the rewards as they are"),
    "val_before_train": ("evaluation.images", "above 0: before, after, and every evaluation.every steps"),
    "log_val_generations": ("wandb.images", "per step"),
    "rollout_data_dir": ("run_dir", "images are in run_dir/images"),
    "validation_data_dir": ("run_dir", "images are in run_dir/images"),
    "shuffle": (NONE, "prompts are shuffled by sampling.seed and the epoch"),
    "free_cache_engine": (NONE, "engine and trainer hold their weights; omni-rollout plan says what fits"),
    "enforce_eager": ("parity", "exact is eager; fast compiles on a GPU"),
    # everybody
    "epochs": ("trainer.steps", "there are no epochs: a step is one rollout and one update"),
    "batch_size": ("rollout.prompts_per_step", "prompts of a step; trainer.micro_batch_size: pairs of a backward pass"),
    "num_generations": ("rollout.group_size", "images of one prompt, among which advantages are taken"),
    "n_images": ("rollout.group_size", "images of one prompt, among which advantages are taken"),
    "lora.r": ("trainer.lora_rank", "0 trains full weights"),
    "guidance": ("sampling.true_cfg_scale", "1.0 and below turn guidance off"),
    "out": ("run_dir", "out=FOLDER is of rollout and evaluate"),
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
    "logging_backend": ("wandb.mode", "or monitor.tensorboard=true; metrics.jsonl is always written"),
    "dynamics_type": ("sampling.sde_type", "sde, cps, dance_sde or ode"),
    "num_sde_steps": ("sampling.sde_window_size", "steps in a row that are trained"),
    "sde_steps": ("sampling.sde_window_range", "[first, end) in which the window is drawn"),
    "flow_shift": ("sampling.extra", "sampling.extra.flow_shift=NUMBER, of wan2_2 and wan2_2_i2v"),
    "guidance_scale_2": ("sampling.extra", "sampling.extra.true_cfg_scale_2=NUMBER, of wan2_2 and wan2_2_i2v"),
    "condition_image_size": ("sampling.extra", "sampling.extra.vae_area=PIXELS, of qwen_image_edit and qwen_image_edit_plus"),
    "adv_clip_range": ("algorithm.advantage_clip", ""),
    "advantage_aggregation": ("reward.normalise", "none is its sum, group its gdpo"),
    "eval_rewards": ("evaluation.reward.weights", "evaluation.reward.weights={NAME: WEIGHT}"),
    "gradient_step_per_epoch": ("trainer.updates_per_step", "mini-batches of one rollout, each seen once"),
    "ema_update_interval": ("trainer.ema_decay", "the average moves at every step"),
    "kl_type": (NONE, "of coupled algorithms the exact Gaussian KL of a step, of forward ones the velocities' distance"),
    "ref_param_device": (NONE, "with LoRA the reference is no copy; of full weights one lies beside the policy"),
    "max_dataset_size": (NONE, "all prompts are read; give a shorter file"),
    "resume_path": ("trainer.resume", "auto, or a checkpoint's folder"),
    "num_processes": ("trainer.ranks", "with backend=verl; no accelerate, no torchrun"),
    "offload_samples_to_cpu": (NONE, "trajectories are kept in the CPU's memory"),
    "target_components": (NONE, "of two experts both are trained"),
}


def meant(key: str, last_is_ours: bool = False) -> tuple[str, str] | None:
    """(our key or NONE, what differs) of a key of theirs, the longest name that `key` ends in first; None: not known.

    Args:
        last_is_ours: one of our keys has the same last name, which is as good as an alias of that name alone.
    """
    parts = key.split(".")
    ends = [".".join(parts[start:]) for start in range(len(parts))]
    ends += [f"{'.'.join(parts[start:-1])}.*" for start in range(len(parts) - 1)]
    return next((ALIASES[end] for end in ends if end in ALIASES and ("." in end or end == key or not last_is_ours)), None)


def as_table() -> Iterator[str]:
    """Markdown, as docs/coming_from.md has it."""
    yield from ("| theirs | here | |", "|---|---|---|")
    yield from (f"| `{theirs}` | {f'`{ours}`' if ours else '–'} | {note} |" for theirs, (ours, note) in ALIASES.items())


if __name__ == "__main__":
    print("\n".join(as_table()))
