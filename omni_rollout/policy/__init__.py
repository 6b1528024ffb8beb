"""The trainer's side of the policy: optimizer engines, LoRA, weight average, checkpoints."""
