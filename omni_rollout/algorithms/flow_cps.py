"""Flow-CPS (arXiv 2509.05952): Flow-GRPO's loss on steps that keep the coefficients of the ODE.

    s = sigma' sin(a pi / 2),   mean = (1 - sigma') x0 + sqrt(sigma'^2 - s^2) x1,   log_prob = -mean((x' - mean)^2)

The step is `sampling.sde_type=cps`, a its noise_level; the published log-prob, without 1 / (2 s^2), is
`sampling.log_prob_form=unnormalised`. With it the ratio is Flow-GRPO's to the power 2 s^2: clip ranges do not carry over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from omni_rollout.algorithms.flow_grpo import FlowGRPO
from omni_rollout.config import SDETypeName, TrainConfig


@dataclass
class FlowCPS(FlowGRPO):
    def problems(self, config: TrainConfig) -> Iterator[str]:
        yield from super().problems(config)
        if config.sampling.sde_type is not SDETypeName.cps:
            yield f"sampling.sde_type={config.sampling.sde_type.value}: flow_cps learns from cps steps; give cps"
