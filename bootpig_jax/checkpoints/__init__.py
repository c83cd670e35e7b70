"""Weights in and out: diffusers folders, tokenizers."""
