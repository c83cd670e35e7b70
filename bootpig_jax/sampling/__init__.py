"""From prompts and reference pictures to images."""
