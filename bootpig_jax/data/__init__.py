"""Training data: the record format, the augmentation of references, and the input pipeline."""
