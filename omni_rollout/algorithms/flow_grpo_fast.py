"""Flow-GRPO-Fast (the published code of arXiv 2505.05470): Flow-GRPO on a window of few steps, deterministic outside.

The loss is Flow-GRPO's. The window, cps steps of noise level 0.8, clip_range 1e-5 and no guidance are keys of other sections:
configs/algorithm/flow_grpo_fast.yaml, for 10 steps. The published code draws one window for each batch and process; here each
group has its own, drawn from the run's seed.
"""

from __future__ import annotations

from dataclasses import dataclass

from omni_rollout.algorithms.flow_grpo import FlowGRPO


@dataclass
class FlowGRPOFast(FlowGRPO):
    pass
