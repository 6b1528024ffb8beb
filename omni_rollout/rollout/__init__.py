"""The rollout worker: vllm-omni's engine, step by step. The only place, with `models/*/rollout.py`, that imports it."""

from __future__ import annotations

import os

# Left to itself vLLM prefixes every line that this process prints, ours included, and logs at INFO. Set it to 1 to see.
os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")
