"""verl 0.9.1 and Ray: N engines, N trainer ranks, the same step. All that names verl or Ray lies in this folder.

    launch.py    TrainConfig -> verl's configuration -> verl's run_ppo
    trainer.py   the V1 trainer that verl runs: what happens in a step, in which order
    agent_loop.py, server.py, replica.py   requests -> engines, one in each Ray actor -> TransferQueue
    rank.py      one trainer rank: PolicyUpdate on its share of the rows
    colocated.py   a trainer rank and an engine in one process, instead of both
    reward.py    the rewards in verl's reward workers
    platform.py  verl on machines without an accelerator; loaded by verl itself, through the entry point `verl.plugins`

verl comes first: its plug-in loader imports this package, so an import of this package that had not begun with verl would
find itself half-done.
"""

from __future__ import annotations

from importlib.metadata import version

import verl  # noqa: F401

from omni_rollout.errors import UserError

VERL = "0.9.1"
NAME = "omni_rollout"  # of what is registered with verl: trainer, rollout; and of our section in its configuration

if version("verl") != VERL:
    raise UserError(
        f"verl {version('verl')} is installed: expected {VERL}, whose interfaces change with every release; "
        'install the extra: pip install "omni_rollout[verl]"'
    )
