"""Makes BootPIG's training triplets: captions, pictures, masks, records (PyTorch; never jax)."""
