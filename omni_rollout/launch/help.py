"""What `omni-rollout COMMAND --help` says below the options."""

ROLLOUT_KEYS = """
keys (all of them, with their defaults: omni_rollout/config.py):
  model=nano|nano_edit|nano_layered|nano_wan|qwen_image|qwen_image_edit|qwen_image_edit_plus|qwen_image_layered|wan2_2
       |wan2_2_i2v
                                          a checkpoint with its own sizes, steps, guidance and text width
  model.path=FOLDER                       a checkpoint in diffusers layout; after model=nano, with that one's sizes
  model.dtype=float32|bfloat16            what the transformer computes in
  sampling.height, .width                 pixels, multiples of 16
  collate.prompt_width                    text tokens, for every prompt the same (or at most: collate.width)
  sampling.num_inference_steps, .true_cfg_scale, .negative_prompt, .seed
  sampling.sde_type=sde|cps|dance_sde|ode, .noise_level, .sde_window_size, .sde_window_range
  rollout.group_size                      images per prompt: 1 for rollout, 8 for train
  rollout.max_num_seqs=N|auto             images denoised together; auto: the number that is fastest here, measured at the start
"""
CHECKPOINT_KEYS = """\
  checkpoint=RUN|STEP                     a run folder (its newest checkpoint) or one of its checkpoints/step_...,
                                          with its run's own settings; single keys given here come before those
  checkpoint_weights=policy|ema           ema: the average of the weights that the run kept
"""
TRAIN_KEYS = f"""{ROLLOUT_KEYS.rstrip()}
  rollout.prompts_per_step
  reward=ocr|pickscore|geneval|recolour|matte|displacement|jpeg_compressibility|recomposition
                                          any reward's name; or reward.weights={{NAME: WEIGHT}}, and for one of your own
                                          reward.source.NAME=module:function|file.py:function|http://...: docs/extending.md
  reward.normalise=none|group, .timeout, .max_failed; evaluation.reward.weights={{NAME: WEIGHT}}
  algorithm=flow_grpo|flow_grpo_fast|flow_cps|mix_grpo|dance_grpo|grpo_guard|flow_dppo
           |diffusion_nft|awm|diffusion_dpo|sft
                                          these four learn from sampling.sde_type=ode; or algorithm.source=FILE.py
  backend=embedded|verl                   one process, or verl's trainer on Ray with rollout.workers and trainer.ranks
  rollout.placement=apart|colocated       on verl: engines in processes of their own, or one beside each trainer rank
  trainer.steps, .learning_rate, .clip_range, .lora_rank, .engine=torch|fsdp2|deepspeed
  trainer.micro_batch_size, .micro_batch_tokens
                                          pairs of trajectory and step in a pass, and tokens, at most
  trainer.fit=auto                        set what makes the run fit this machine's memory, and say so
  rollout.offload=none|encoders, trainer.offload=none|optimizer|all
                                          what leaves the device while it is not needed: docs/planning.md
  prompts=FILE                            .txt (one a line), .jsonl or .parquet with `prompt`; other columns go to the rewards
  evaluation.images, .every, .prompts     fixed seeds, before and after training
  wandb.mode=online|offline|disabled      without a key: offline
  monitor.tensorboard=true                the same metrics in run_dir/tensorboard
  run_dir=FOLDER                          config.yaml, metrics.jsonl, images/, checkpoints/
  trainer.save_every, .keep_checkpoints   steps between checkpoints, and how many stay
  trainer.resume=none|auto|FOLDER         go on from run_dir's newest checkpoint, or from one that is named
  profile=true                            of step 2 (profile_step=N): a torch trace and a table by stage, in run_dir/profile
  dry_run=true [gpus=8x80]                check paths, prompts, rewards and memory, say what would be trained, and stop

examples:
  omni-rollout train experiment=nano_ocr
  omni-rollout train experiment=nano_ocr trainer.steps=10 trainer.lora_rank=16 run_dir=runs/lora
"""


REPLAY_STATUS = """
exit status:
  0  every log-prob has the same bits, whatever machine it comes from
  1  a capsule does not hold, or was refused
  3  some were made on another machine, whose kernels round otherwise: no gap is larger than rounding explains
  4  the same, and a gap is larger; what rounding explains is measured here, by scoring the capsule again with other kernels

example:
  omni-rollout replay rollouts/*.safetensors model=nano --json replay.json
"""
