"""The diffusion process: noise schedule and targets (Eq. 1), guidance (Eq. 4), solvers."""
