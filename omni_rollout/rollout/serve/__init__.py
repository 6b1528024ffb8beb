"""`omni-rollout serve`: one RolloutEngine over HTTP, with the same bits as in process.

body ─► bodies ─► limits ─► Collator.asked ─► Host (the engine's own thread) ─► wire ─► frames, as each finishes
"""
