"""The networks of Stable Diffusion in `flax.nnx`, sized by a checkpoint's `config.json`."""
