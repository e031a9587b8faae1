"""Losses, checkpoints and metrics of a training run; `retention_jax/train.py` is the command."""
