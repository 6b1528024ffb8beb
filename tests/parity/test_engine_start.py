"""What an engine needs of the machine as it starts."""

from __future__ import annotations

import socket

import pytest
from vllm_omni.diffusion.data import OmniDiffusionConfig

from omni_rollout.rollout.engine import RolloutEngine


def test_a_port_taken_since_it_was_chosen_does_not_stop_the_engine(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        taken = other.getsockname()[1]
        monkeypatch.setattr(OmniDiffusionConfig, "_resolve_master_port", lambda self: taken)
        RolloutEngine(checkpoint, max_num_seqs=1).close()
