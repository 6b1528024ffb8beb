"""`omni-rollout plan`: what a run needs of GPUs and hosts, by arithmetic alone. What of it was checked: docs/planning.md."""
