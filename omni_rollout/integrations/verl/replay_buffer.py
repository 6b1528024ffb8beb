"""Where verl waits for trajectories."""

from __future__ import annotations

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

from omni_rollout.integrations.verl.agent_loop import AgentLoopManager

POLL_SECONDS = 0.2


class WatchedReplayBuffer(ReplayBuffer):
    """Waits with an eye on the agent loop: verl's own would wait for ever for groups whose maker has died."""

    agent_loop: AgentLoopManager

    def _wait_for_next_poll(self, partition_id: str, last_debug_time: float) -> float:
        self.agent_loop.wait(POLL_SECONDS)
        return last_debug_time
