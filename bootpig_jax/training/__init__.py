"""Training: the step, the optimiser, how arrays lie on devices, checkpoints and the loop."""
