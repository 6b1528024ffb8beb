"""What happens before a model is loaded: Hydra, checks, and where things lie."""
