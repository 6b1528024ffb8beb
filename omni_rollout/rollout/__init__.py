"""The rollout worker: vllm-omni's engine, step by step. The only place, with `models/*/rollout.py`, that imports it."""
