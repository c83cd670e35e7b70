"""The sizes of Toyland's Stable Diffusion, and its folder's small files."""

import json
from pathlib import Path

from bootpig_jax.models.text_encoder import TextEncoderConfig
from bootpig_jax.models.unet import UNetConfig
from bootpig_jax.models.vae import VAEConfig
from bootpig_jax.toyland.world import VOCABULARY

VAE_SIZES = VAEConfig(
    block_out_channels=(16, 32, 64),
    layers_per_block=1,
    norm_num_groups=8,
    sample_size=64,
)
UNET_SIZES = UNetConfig(
    block_out_channels=(32, 64, 96),
    cross_attention_dim=64,
    attention_head_dim=(2, 4, 6),
    # Tokens stand for 8 pixels or more: enough for Toyland's shapes, a sixteenth of the work.
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=16,
    use_linear_projection=True,
    sample_size=16,
)
TEXT_LENGTH = 16  # tokens; the longest caption has 15 with its two ends
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")

# SD 2.1's noise schedule, with its prediction of the velocity: at high noise the loss is then the
# error of the picture itself, which is where a reference has most to say.
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
TOKENIZER = {
    "tokenizer_class": "CLIPTokenizer",
    "model_max_length": TEXT_LENGTH,
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
PIPELINE = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def byte_pairs() -> tuple[dict[str, int], list[str]]:
    """A CLIP vocabulary in which every word of Toyland is one token: ids by token, and merges.

    Each word is built from its letters, left to right; any other text falls apart into bytes.
    """
    # CLIP's byte alphabet: printable bytes stand for themselves, the others are shifted up.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = iter(range(256, 512))
    letters = [chr(b) if b in printable else chr(next(shifted)) for b in range(256)]
    words = [left + right for word in VOCABULARY for left, right in _pairs(word)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *words]
    # The earliest merge that fits anywhere in a word goes first. Longest words first, so that a
    # shorter one's does not break into them ("h o", of "house", into "photo").
    longest_first = sorted(VOCABULARY, key=lambda word: (len(word), word), reverse=True)
    merges = [f"{left} {right}" for word in longest_first for left, right in _pairs(word)]
    ids = {token: i for i, token in enumerate([*dict.fromkeys(tokens), *SPECIAL_TOKENS])}
    return ids, list(dict.fromkeys(merges))


def _pairs(word: str) -> list[tuple[str, str]]:
    """What is joined to build a word from its letters, left to right."""
    letters = [*word[:-1], f"{word[-1]}</w>"]
    return [("".join(letters[:i]), letters[i]) for i in range(1, len(letters))]


def text_encoder_sizes() -> TextEncoderConfig:
    """The text encoder's sizes, its vocabulary being Toyland's."""
    vocabulary, _ = byte_pairs()
    return TextEncoderConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(vocabulary),
        max_position_embeddings=TEXT_LENGTH,
        hidden_act="gelu",
    )


def write_small_files(folder: Path) -> None:
    """Writes what a diffusers folder has besides its networks: index, scheduler, tokenizer."""
    vocabulary, merges = byte_pairs()
    files = {
        "model_index.json": PIPELINE,
        "scheduler/scheduler_config.json": SCHEDULER,
        "tokenizer/tokenizer_config.json": TOKENIZER,
        "tokenizer/vocab.json": vocabulary,
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "tokenizer" / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8"
    )
