"""The training loop, optimiser, checkpoints and metrics that both stages share."""
