"""Embeddings: preprocessing against a re-computation, models against transformers' own calls."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from bootpig_jax.errors import UserError
from bootpig_jax.evaluation.embedders import (
    MODELS,
    Broken,
    EmbeddingCache,
    Preprocessing,
    TorchEmbedder,
    embed_pictures,
    hash_tensors,
    load_embedder,
    preprocess,
)
from tests.evaluation_folders import picture, save_clip, save_dino

CLIP = Preprocessing(
    resize=224,
    crop=224,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
DINO = Preprocessing(resize=256, crop=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
NO_CACHE = EmbeddingCache(None)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dino(tmp_path_factory.mktemp("models") / "dino")


@pytest.fixture(scope="module")
def clip(clip_folder: Path) -> TorchEmbedder:
    return load_embedder("clip", str(clip_folder))


@pytest.fixture(scope="module")
def dino(dino_folder: Path) -> TorchEmbedder:
    return load_embedder("dino", str(dino_folder))


def fixed_picture(height: int, width: int) -> np.ndarray:
    """Smooth colours with hard edges and noise: everything a resampling filter can get wrong."""
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([x * 255 / width, y * 255 / height, (x + y) % 256], -1)
    smooth[height // 3 : height // 2, width // 4 : width // 2] = (255, 0, 40)
    noise = np.random.default_rng(height * width).normal(0, 12, smooth.shape)
    return np.clip(smooth + noise, 0, 255).astype(np.uint8)


def resize_axis(pixels: np.ndarray, size: int) -> np.ndarray:
    """The first axis by Keys' cubic (a = -0.5), widened when shrinking; rounded to 8 bits.

    Pillow's weights are fixed-point numbers of 22 bits, which decides how ties are rounded.
    """
    scale = len(pixels) / size
    support = 2 * max(scale, 1.0)
    weights = np.zeros((size, len(pixels)))
    for i in range(size):
        centre = (i + 0.5) * scale
        for j in range(
            max(0, int(centre - support + 0.5)), min(len(pixels), int(centre + support + 0.5))
        ):
            t = abs((j + 0.5 - centre) / max(scale, 1.0))
            if t < 1:
                weights[i, j] = 1.5 * t**3 - 2.5 * t**2 + 1
            elif t < 2:
                weights[i, j] = -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    weights /= weights.sum(axis=1, keepdims=True)
    fixed = np.trunc(weights * 2**22 + np.copysign(0.5, weights))
    mixed = np.tensordot(fixed, pixels.astype(np.float64), axes=1)  # whole numbers below 2^53
    return np.clip((mixed + 2**21) // 2**22, 0, 255).astype(np.uint8)


def recompute(pixels: np.ndarray, how: Preprocessing) -> np.ndarray:
    """torchvision's Resize(int, bicubic), CenterCrop, ToTensor, Normalize by their definitions."""
    height, width = pixels.shape[:2]
    if height < width:
        new = how.resize, math.floor(how.resize * width / height)
    else:
        new = math.floor(how.resize * height / width), how.resize
    across = resize_axis(pixels.transpose(1, 0, 2), new[1]).transpose(1, 0, 2)
    resized = resize_axis(across, new[0])
    top, left = round((new[0] - how.crop) / 2.0), round((new[1] - how.crop) / 2.0)
    cropped = resized[top : top + how.crop, left : left + how.crop] / 255.0
    return ((cropped - np.array(how.mean)) / np.array(how.std)).transpose(2, 0, 1)


@pytest.mark.parametrize("how", [CLIP, DINO], ids=["clip", "dino"])
@pytest.mark.parametrize("size", [(300, 300), (333, 500), (451, 260), (64, 64), (100, 151)])
def test_preprocessing(size: tuple[int, int], how: Preprocessing) -> None:
    pixels = fixed_picture(*size)
    found = preprocess(pixels, how)
    assert found.shape == (3, 224, 224) and found.dtype == np.float32
    np.testing.assert_allclose(found, recompute(pixels, how), atol=1e-3)
    if how is CLIP:
        processor = CLIPImageProcessorPil()
    else:
        processor = ViTImageProcessorPil(
            size={"shortest_edge": 256},
            resample=Image.Resampling.BICUBIC,
            do_center_crop=True,
            crop_size={"height": 224, "width": 224},
            image_mean=list(DINO.mean),
            image_std=list(DINO.std),
            default_to_square=False,
        )
    theirs = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(found, theirs, atol=1e-3)


def test_half_a_pixel_is_cropped_as_torchvision_does() -> None:
    """Of 111 pixels too many, 56 are cut off before: Python rounds a half to the even number."""
    pixels = fixed_picture(224, 335)
    np.testing.assert_allclose(preprocess(pixels, CLIP), recompute(pixels, CLIP), atol=1e-3)


def test_published_preprocessing() -> None:
    from bootpig_jax.evaluation.embedders import _preprocessing

    assert _preprocessing("clip", 224) == CLIP
    assert _preprocessing("vit", 224) == DINO
    assert _preprocessing("dinov2", 518) == DINO
    assert {name: spec.source for name, spec in MODELS.items()} == {
        "clip": "openai/clip-vit-base-patch32",
        "dino": "facebook/dino-vits16",
        "dinov2": "facebook/dinov2-small",
        "clip_large": "openai/clip-vit-large-patch14",
    }


def test_clip_equals_transformers(clip: TorchEmbedder, clip_folder: Path) -> None:
    # An even remainder: of an odd one, transformers and torchvision round the half differently.
    images = [picture(i, (48, 32)) for i in range(3)]
    texts = ["a dog in the snow", "a dog", "snow " * 30]
    model = transformers.CLIPModel.from_pretrained(clip_folder)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(clip_folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=16, return_tensors="pt")
    pixels = processor(images, return_tensors="pt")
    with torch.no_grad():
        wanted = model(**tokens, **pixels)
    ours = clip.embed_pixels(
        np.stack([preprocess(np.asarray(i), clip.card.preprocessing) for i in images])
    )
    np.testing.assert_allclose(unit(ours), wanted.image_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(unit(clip.embed_texts(texts)), wanted.text_embeds.numpy(), atol=1e-5)


def test_texts_that_are_cut_are_named(
    clip: TorchEmbedder, capsys: pytest.CaptureFixture[str]
) -> None:
    clip.embed_texts(["a dog", "dog " * 40])
    assert "longer than 16 tokens, cut: 'dog dog" in capsys.readouterr().err


def test_dino_is_the_class_token(dino: TorchEmbedder, dino_folder: Path) -> None:
    model = transformers.ViTModel.from_pretrained(dino_folder)
    pixels = preprocess(np.asarray(picture(0, (80, 90))), dino.card.preprocessing)[None]
    assert dino.card.preprocessing.resize == 64 and pixels.shape == (1, 3, 56, 56)
    with torch.no_grad():
        wanted = model(torch.from_numpy(pixels)).last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(dino.embed_pixels(pixels), wanted, atol=1e-6)


def test_dinov2(tmp_path: Path) -> None:
    torch.manual_seed(2)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    transformers.Dinov2Model(config).save_pretrained(tmp_path)
    embedder = load_embedder("dinov2", str(tmp_path))
    pixels = np.zeros((2, 3, 224, 224), np.float32)  # another size than it was trained at
    assert embedder.embed_pixels(pixels).shape == (2, 16)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_pickled_weights(tmp_path: Path, dino: TorchEmbedder) -> None:
    folder = save_dino(tmp_path / "dino", safe=False)
    with pytest.raises(UserError, match="no model.safetensors; --allow-pickle"):
        load_embedder("dino", str(folder))
    pickled = load_embedder("dino", str(folder), allow_pickle=True)
    assert pickled.card.sha256 == dino.card.sha256  # the same weights


def test_the_hash_is_of_names_values_and_use() -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2)}
    changed = [
        tensors | {"b": torch.tensor([0.0, 1e-7])},
        tensors | {"a": tensors["a"].reshape(3, 2)},
        tensors | {"b": torch.zeros(2, dtype=torch.int32)},
        {"a": tensors["a"], "c": tensors["b"]},
    ]
    hashes = [hash_tensors(one) for one in (tensors, *changed)] + [hash_tensors(tensors, "use")]
    assert len(set(hashes)) == 6
    assert hash_tensors(dict(reversed(tensors.items()))) == hashes[0]


def test_models_that_are_not_what_they_should_be(
    tmp_path: Path, clip_folder: Path, dino_folder: Path
) -> None:
    with pytest.raises(UserError, match="is of the kind 'clip', not 'vit'"):
        load_embedder("dino", str(clip_folder))
    with pytest.raises(UserError, match="'vgg' is not one of clip, dino"):
        load_embedder("vgg")
    with pytest.raises(UserError, match="neither a folder nor a hub id"):
        load_embedder("dino", str(tmp_path / "no where"))
    with pytest.raises(UserError, match="can't be downloaded .*name a folder: --embedder dino="):
        load_embedder("dino")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_bytes((dino_folder / "config.json").read_bytes())
    weights = (dino_folder / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="can't be loaded"):
        load_embedder("dino", str(damaged))
    tensors = load_file(dino_folder / "model.safetensors")
    lost = next(name for name in tensors if name.startswith("encoder."))
    del tensors[lost]
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks layers.0"):
        load_embedder("dino", str(damaged))
    config = json.loads((dino_folder / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config)[:-1])
    with pytest.raises(UserError, match="config.json is missing or no JSON"):
        load_embedder("dino", str(damaged))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


class Counting:
    """Counts the pictures that go through a model."""

    def __init__(self, embedder: TorchEmbedder) -> None:
        self.spec, self.card = embedder.spec, embedder.card
        self._embedder = embedder
        self.count = 0

    def embed_pixels(self, pixels: np.ndarray) -> np.ndarray:
        self.count += len(pixels)
        return self._embedder.embed_pixels(pixels)

    def embed_texts(self, texts: list[str]) -> np.ndarray:
        return self._embedder.embed_texts(texts)


def test_batches_workers_and_order_change_nothing(dino: TorchEmbedder) -> None:
    files = [png(picture(i, (40 + i, 60))) for i in range(7)]
    how = {"cache": NO_CACHE}
    first = embed_pictures(dino, files, batch_size=7, workers=1, **how)  # type: ignore[arg-type]
    for batch_size, workers, order in ((2, 3, range(7)), (1, 1, range(6, -1, -1))):
        found = embed_pictures(
            dino, [files[i] for i in order], batch_size=batch_size, workers=workers, cache=NO_CACHE
        )
        for i, embedding in zip(order, found, strict=True):
            np.testing.assert_allclose(embedding, first[i], atol=1e-6)


def test_cache(dino: TorchEmbedder, tmp_path: Path) -> None:
    files = [png(picture(i)) for i in range(4)]
    counting = Counting(dino)
    cache = EmbeddingCache(tmp_path)
    first = embed_pictures(counting, files[:2], cache=cache)
    assert counting.count == 2
    found = embed_pictures(counting, files, cache=cache)
    assert counting.count == 4  # each once
    again = embed_pictures(counting, files, cache=cache)
    assert counting.count == 4
    np.testing.assert_array_equal(np.stack(again), np.stack(found))  # type: ignore[arg-type]
    np.testing.assert_array_equal(first[1], found[1])
    # Of foregrounds, and by another model, they are others.
    masked = embed_pictures(counting, files, variant="masked", cache=cache)
    assert counting.count == 8
    assert not np.allclose(masked[0], found[0])  # type: ignore[arg-type]
    counting.card = counting.card.model_copy(update={"sha256": "other"})
    embed_pictures(counting, files, cache=cache)
    assert counting.count == 12
    other_size = dino.card.preprocessing.model_copy(update={"resize": 60})
    counting.card = dino.card.model_copy(update={"preprocessing": other_size})
    embed_pictures(counting, files, cache=cache)
    assert counting.count == 16
    # A damaged file is computed again.
    for path in tmp_path.rglob("*.npy"):
        path.write_bytes(path.read_bytes()[:-3])
    counting.card = dino.card
    np.testing.assert_array_equal(
        np.stack(embed_pictures(counting, files, cache=cache)),  # type: ignore[arg-type]
        np.stack(found),  # type: ignore[arg-type]
    )
    assert counting.count == 20
    assert not list(tmp_path.rglob("*.tmp"))


def test_broken_pictures(dino: TorchEmbedder, tmp_path: Path) -> None:
    whole = png(picture(0))
    files = [whole, whole[: len(whole) // 2], b"no picture", tmp_path / "gone.png"]
    good, cut, odd, gone = embed_pictures(dino, files, cache=NO_CACHE)
    assert isinstance(good, np.ndarray)
    assert isinstance(cut, Broken) and "cannot be read" in cut.reason
    assert isinstance(odd, Broken) and "is none of PNG" in odd.reason
    assert isinstance(gone, Broken) and "No such file" in gone.reason
    plain = png(Image.new("RGB", (32, 32), (9, 9, 9)))
    (none,) = embed_pictures(dino, [plain], variant="masked", cache=NO_CACHE)
    assert isinstance(none, Broken) and "no subject" in none.reason
