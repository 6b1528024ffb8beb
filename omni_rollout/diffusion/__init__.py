"""The only mathematics: what the rollout and the trainer both import."""
