"""Folders that the evaluation reads: a small DreamBooth dataset, tiny CLIP and DINO models."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tests.tokenizer_folder import EOS, write_tokenizer

CLASSES = {"backpack": "backpack", "bear_plushie": "stuffed animal", "dog": "dog", "dog2": "dog"}
OBJECT_PROMPTS = ("a {0} {1} in the snow", "a {0} {1} on top of a purple rug", "a red {0} {1}")
LIVE_PROMPTS = ("a {0} {1} in the snow", "a {0} {1} wearing a santa hat", "a wet {0} {1}")


def prompts_and_classes(
    classes: Mapping[str, str] = CLASSES,
    object_prompts: Sequence[str] = OBJECT_PROMPTS,
    live_prompts: Sequence[str] = LIVE_PROMPTS,
) -> str:
    """DreamBooth's text file, in the published syntax."""

    def prompt_list(templates: Sequence[str]) -> str:
        lines = [f"'{template}'.format(unique_token, class_token)" for template in templates]
        return "prompt_list = [\n" + ",\n".join(lines) + "\n]\n"

    table = "\n".join(f"{name},{word}" for name, word in classes.items())
    return (
        f"Classes\n\nsubject_name,class\n{table}\n\nPrompts\n\n"
        f"Object Prompts\n\n{prompt_list(object_prompts)}\n"
        f"Live Subject Prompts\n\n{prompt_list(live_prompts)}"
    )


def picture(seed: int, size: tuple[int, int] = (40, 36)) -> Image.Image:
    """A coloured rectangle on nearly white."""
    rng = np.random.default_rng(seed)
    pixels = np.full((size[1], size[0], 3), 250, np.uint8)
    top, left = rng.integers(4, 10, 2)
    pixels[top : top + 20, left : left + 18] = rng.integers(0, 200, 3)
    return Image.fromarray(pixels)


def write_dreambooth(folder: Path, references: int = 3) -> Path:
    folder.mkdir(parents=True)
    (folder / "prompts_and_classes.txt").write_text(prompts_and_classes())
    for s, name in enumerate(CLASSES):
        (folder / name).mkdir()
        for n in range(references):
            picture(100 * s + n, (48, 40 + n)).save(folder / name / f"{n:02d}.jpg")
    return folder


def write_pictures(folder: Path, subjects: Sequence[str], prompts: int, images: int) -> Path:
    """Generated pictures in the layout that is scored."""
    for s, name in enumerate(subjects):
        for p in range(prompts):
            (folder / name / f"{p:02d}").mkdir(parents=True)
            for j in range(images):
                seed = 10_000 + 100 * s + 10 * p + j
                picture(seed).save(folder / name / f"{p:02d}" / f"{j:02d}.png")
    return folder


def save_clip(folder: Path, *, safe: bool = True) -> Path:
    """A tiny CLIP of transformers' own class, with its tokenizer."""
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    written = write_tokenizer(folder, pad=EOS, kind="vocab.json", max_length=16)
    size = len(CLIPTokenizer.from_pretrained(written))
    text = {
        "vocab_size": size,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "bos_token_id": size - 2,
        "eos_token_id": size - 1,
        "pad_token_id": size - 1,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    save(model, folder, safe=safe)
    return folder


def save_dino(folder: Path, *, safe: bool = True) -> Path:
    """A tiny DINO: transformers' ViT, as facebook/dino-vits16 is stored."""
    import torch
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(1)
    config = ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=56,
        patch_size=8,
    )
    save(ViTModel(config), folder, safe=safe)
    return folder


def save(model, folder: Path, *, safe: bool) -> None:  # type: ignore[no-untyped-def]
    import torch

    if safe:
        model.save_pretrained(folder)
    else:
        folder.mkdir(exist_ok=True)
        model.config.save_pretrained(folder)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
