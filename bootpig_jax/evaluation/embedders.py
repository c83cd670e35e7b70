"""Pictures and texts to embeddings: CLIP and DINO through transformers, and a cache on disk.

Preprocessing follows the reference implementations (OpenAI's CLIP and Meta's DINO, both written
with torchvision): the shorter side is resized with Pillow's bicubic filter, the longer one keeps
the shape, rounded down; the centre is cropped; [0, 1] is normalised. Unlike them, pictures are
turned upright by their EXIF tag, and transparency becomes white.

torch and transformers are imported when a model is loaded, not before.
"""

import contextlib
import hashlib
import io
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image
from tqdm import tqdm

from bootpig_jax.data.pictures import PictureError, open_picture, to_rgb
from bootpig_jax.errors import UserError
from bootpig_jax.evaluation.files import Source, read_source, sha256
from bootpig_jax.files import write_whole
from bootpig_jax.sampling.references import prepare_reference
from bootpig_jax.yaml_config import ConfigModel

Kind = Literal["clip", "vit", "dinov2"]
Variant = Literal["whole", "masked"]

MASKED_SIDE = 512
MASKED = (
    "the foreground alone: cut out by the picture's alpha, keying or GrabCut, cropped, centred on "
    f"white, {MASKED_SIDE} px"
)


@dataclass(frozen=True)
class Spec:
    """A model that pictures are scored with.

    Attributes:
        label: of its image score.
        text_label: of its score of picture and prompt; None if it reads no text.
        kind: which class of transformers.
        source: its id on the hub.
    """

    label: str
    text_label: str | None
    kind: Kind
    source: str


MODELS: dict[str, Spec] = {
    "clip": Spec("CLIP-I", "CLIP-T", "clip", "openai/clip-vit-base-patch32"),
    "dino": Spec("DINO", None, "vit", "facebook/dino-vits16"),
    "dinov2": Spec("DINOv2", None, "dinov2", "facebook/dinov2-small"),
    "clip_large": Spec("CLIP-I L/14", "CLIP-T L/14", "clip", "openai/clip-vit-large-patch14"),
}
_CLIP_STATISTICS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Preprocessing(ConfigModel):
    """From a picture to a network's input.

    Attributes:
        resize: pixels of the shorter side, with the bicubic filter.
        crop: pixels of the centred square.
        mean: of each channel, subtracted from [0, 1].
        std: of each channel, divided by.
    """

    resize: int
    crop: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class ModelCard(ConfigModel):
    """Which model exactly.

    Attributes:
        source: the folder or hub id that was named.
        sha256: of its configuration and all weights.
        preprocessing: of its pictures.
    """

    source: str
    sha256: str
    preprocessing: Preprocessing


class Embedder(Protocol):
    """Turns preprocessed pictures, and texts if it can, into embeddings of any length."""

    @property
    def spec(self) -> Spec:
        """What its scores are called."""
        ...

    @property
    def card(self) -> ModelCard:
        """Which model it is."""
        ...

    def embed_pixels(self, pixels: Float32[np.ndarray, "b 3 h w"]) -> Float32[np.ndarray, "b d"]:
        """Embeds what `preprocess` returns."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Float32[np.ndarray, "b d"]:
        """Embeds texts; only where `spec.text_label` is set."""
        ...


def preprocess(
    rgb: UInt8[np.ndarray, "h w 3"], how: Preprocessing
) -> Float32[np.ndarray, "3 crop crop"]:
    """Resizes, crops and normalises a picture; see the module."""
    height, width = rgb.shape[:2]
    shorter = min(height, width)
    size = int(how.resize * width / shorter), int(how.resize * height / shorter)
    resized = np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BICUBIC))
    top, left = (int(round((side - how.crop) / 2)) for side in resized.shape[:2])
    cropped = resized[top : top + how.crop, left : left + how.crop].astype(np.float32) / 255
    mean, std = np.array(how.mean, np.float32), np.array(how.std, np.float32)
    normalised = (cropped - mean) / std
    return np.ascontiguousarray(normalised.transpose(2, 0, 1), np.float32)


def decode(data: bytes, variant: Variant) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes a picture file; "masked" keeps the foreground alone (`MASKED`).

    Raises:
        PictureError: it is damaged or no picture.
        UserError: no foreground is found.
    """
    image = open_picture(io.BytesIO(data))
    if variant == "whole":
        return to_rgb(image)[0]
    cut = prepare_reference(image, MASKED_SIDE, MASKED_SIDE)
    return np.rint((cut + 1) * 127.5).astype(np.uint8)


# ---------------------------------------------------------------- the models


class TorchEmbedder:
    """A model of transformers.

    Attributes:
        spec: what its scores are called.
        card: which model it is.
    """

    def __init__(
        self, spec: Spec, card: ModelCard, model: Any, tokenizer: Any | None, device: str
    ) -> None:
        self.spec = spec
        self.card = card
        self._model = model.eval().to(device)
        self._tokenizer = tokenizer
        self._device = device

    def embed_pixels(self, pixels: Float32[np.ndarray, "b 3 h w"]) -> Float32[np.ndarray, "b d"]:
        """Embeds pictures: CLIP's projected embedding, or the class token after the last norm."""
        import torch

        # TensorFloat-32 would change the fourth digit.
        with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
            inputs = torch.from_numpy(pixels).to(self._device)
            if self.spec.kind == "clip":
                found = self._model.get_image_features(pixel_values=inputs).pooler_output
            else:
                found = self._model(pixel_values=inputs).last_hidden_state[:, 0]
        return found.float().cpu().numpy()

    def embed_texts(self, texts: Sequence[str]) -> Float32[np.ndarray, "b d"]:
        """Embeds texts with CLIP; what goes beyond its length is cut off, with a warning."""
        import torch

        if self._tokenizer is None:
            raise TypeError(f"{self.card.source} reads no text")
        length = self._model.config.text_config.max_position_embeddings
        for text in texts:
            if len(self._tokenizer(text)["input_ids"]) > length:
                print(f"warning: longer than {length} tokens, cut: {text!r}", file=sys.stderr)
        parts = []
        for start in range(0, len(texts), 64):
            tokens = self._tokenizer(
                list(texts[start : start + 64]),
                padding="max_length",
                truncation=True,
                max_length=length,
                return_tensors="pt",
            ).to(self._device)
            with torch.inference_mode():
                found = self._model.get_text_features(**tokens).pooler_output
            parts.append(found.float().cpu().numpy())
        return np.concatenate(parts)


def load_embedder(
    name: str, source: str | None = None, *, allow_pickle: bool = False, device: str | None = None
) -> TorchEmbedder:
    """Loads one of `MODELS`.

    Args:
        name: which.
        source: a folder or hub id; by default the published model.
        allow_pickle: whether PyTorch's pickled weights are opened where there are no safetensors.
            Only tensors are read from them.
        device: PyTorch's name of it; by default a GPU if there is one.

    Raises:
        UserError: the model can't be found or loaded, or is of another kind.
    """
    if name not in MODELS:
        raise UserError(f"--embedder: {name!r} is not one of {', '.join(MODELS)}")
    spec = MODELS[name]
    source = source or spec.source
    try:
        import torch
        import transformers
    except ImportError:
        raise UserError(
            "scoring needs torch and transformers; pip install 'bootpig_jax[eval]'"
        ) from None

    folder = _find(name, source, allow_pickle)
    cls: Any = {
        "clip": transformers.CLIPModel,
        "vit": transformers.ViTModel,
        "dinov2": transformers.Dinov2Model,
    }[spec.kind]
    config = _read_config(name, folder)
    if config.get("model_type") != cls.config_class.model_type:
        raise UserError(
            f"--embedder {name}: {source} is of the kind {config.get('model_type')!r}, "
            f"not {cls.config_class.model_type!r}"
        )
    options = {"add_pooling_layer": False} if spec.kind == "vit" else {}
    try:
        with _quiet():
            model, info = cls.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=not _needs_pickle(folder),
                weights_only=True,
                output_loading_info=True,
                **options,
            )
        tokenizer = None
        if spec.kind == "clip":
            tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises all kinds on damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--embedder {name}: {source} can't be loaded: {reason}") from error
    if info["missing_keys"]:  # they would be random numbers
        raise UserError(f"--embedder {name}: {source} lacks {sorted(info['missing_keys'])[0]}")
    vision = model.config.vision_config if spec.kind == "clip" else model.config
    card = ModelCard(
        source=source,
        sha256=_hash_model(model),
        preprocessing=_preprocessing(spec.kind, vision.image_size),
    )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return TorchEmbedder(spec, card, model, tokenizer, device)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars and its report on tensors that are not needed."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


def _preprocessing(kind: Kind, image_size: int) -> Preprocessing:
    if kind == "clip":
        mean, std = _CLIP_STATISTICS
        return Preprocessing(resize=image_size, crop=image_size, mean=mean, std=std)
    # DINO resizes to 256 and crops 224. DINOv2's configuration names the size it was trained at
    # last (518), but it is evaluated like DINO; its position embeddings are interpolated.
    crop = 224 if kind == "dinov2" else image_size
    mean, std = _IMAGENET_STATISTICS
    return Preprocessing(resize=crop * 8 // 7, crop=crop, mean=mean, std=std)


def _find(name: str, source: str, allow_pickle: bool) -> Path:
    folder = Path(source)
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
            raise UserError(f"--embedder {name}: {source} is neither a folder nor a hub id")
        import huggingface_hub

        patterns = ["*.json", "*.txt", "model*.safetensors"]
        patterns += ["pytorch_model*.bin"] if allow_pickle else []
        try:
            folder = Path(huggingface_hub.snapshot_download(source, allow_patterns=patterns))
        except Exception as error:  # the client raises many kinds, all meaning "could not get it"
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"--embedder {name}: {source} can't be downloaded ({reason}); "
                f"name a folder: --embedder {name}=FOLDER"
            ) from error
    if _needs_pickle(folder) and not (allow_pickle and list(folder.glob("pytorch_model*.bin"))):
        raise UserError(
            f"--embedder {name}: {source} has no model.safetensors; "
            "--allow-pickle reads the tensors of its pytorch_model.bin"
        )
    return folder


def _needs_pickle(folder: Path) -> bool:
    return not list(folder.glob("model*.safetensors"))


def _read_config(name: str, folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise UserError(
            f"--embedder {name}: {folder / 'config.json'} is missing or no JSON"
        ) from None
    return config if isinstance(config, dict) else {}


def _hash_model(model: Any) -> str:
    """A hash of the weights, whichever kind of file they came from, and of what they are used for.

    The configuration's other entries (who saved it, with which version) change nothing.
    """
    vision = getattr(model.config, "vision_config", model.config)
    used = [
        [getattr(c, name, None) for name in ("hidden_act", "num_attention_heads", "layer_norm_eps")]
        for c in (vision, getattr(model.config, "text_config", None))
    ]
    return hash_tensors(model.state_dict(), json.dumps([type(model).__name__, used]))


def hash_tensors(tensors: Mapping[str, Any], use: str = "") -> str:
    """A hash of PyTorch's tensors and their names, and of `use`."""
    digest = hashlib.sha256(use.encode())
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().cpu().contiguous().numpy()
        digest.update(f"{name} {values.dtype} {values.shape}".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------- many pictures


@dataclass(frozen=True)
class Broken:
    """A picture that has no embedding, and why."""

    reason: str


class EmbeddingCache:
    """Embeddings on disk, one small file each, by model, preprocessing and picture file's hash."""

    def __init__(self, folder: Path | None) -> None:
        """With `None` nothing is kept."""
        self._folder = folder

    def path(self, card: ModelCard, variant: Variant, key: str) -> Path | None:
        """Where the embedding of the picture file with the hash `key` is kept."""
        if self._folder is None:
            return None
        how = f"{card.sha256} {card.preprocessing.model_dump_json()} {variant}"
        if variant == "masked":
            how += f" {MASKED}"
        return self._folder / sha256(how.encode())[:24] / key[:2] / f"{key}.npy"

    def read(self, path: Path | None) -> Float32[np.ndarray, " d"] | None:
        """The embedding, or None if it isn't there or damaged: then it is computed again."""
        try:
            found = None if path is None else np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        if found is None or found.ndim != 1 or found.dtype != np.float32:
            return None
        return found if np.isfinite(found).all() else None

    def write(self, path: Path | None, embedding: Float32[np.ndarray, " d"]) -> None:
        """Keeps an embedding."""
        if path is not None:
            buffer = io.BytesIO()
            np.save(buffer, embedding)
            write_whole(path, buffer.getvalue())


def embed_pictures(
    embedder: Embedder,
    sources: Sequence[Source],
    *,
    variant: Variant = "whole",
    cache: EmbeddingCache,
    batch_size: int = 32,
    workers: int = 2,
    progress: bool = False,
) -> list[Float32[np.ndarray, " d"] | Broken]:
    """The embedding of each picture, or why it has none.

    Args:
        embedder: the model.
        sources: the pictures.
        variant: the whole picture or its foreground.
        cache: where embeddings are kept; those that are there are not computed.
        batch_size: pictures that go through the model together.
        workers: threads that read pictures.
        progress: whether to show a bar on standard error.
    """
    results: list[Float32[np.ndarray, " d"] | Broken | None] = [None] * len(sources)

    def read(index: int) -> tuple[int, Path | None, np.ndarray | None]:
        """Reads a picture; fills in its result where no model is needed."""
        try:
            data = read_source(sources[index])
            path = cache.path(embedder.card, variant, sha256(data))
            results[index] = cache.read(path)
            if results[index] is not None:
                return index, path, None
            return index, path, preprocess(decode(data, variant), embedder.card.preprocessing)
        except OSError as error:
            results[index] = Broken(f"cannot be read ({error.strerror or error})")
        except (PictureError, UserError) as error:
            results[index] = Broken(str(error))
        return index, None, None

    bar = tqdm(
        total=len(sources),
        desc=f"{embedder.spec.label}, {variant}",
        disable=not progress,
        file=sys.stderr,
    )
    with ThreadPoolExecutor(workers) as pool, bar:
        # Only the pictures of one batch are in memory.
        for window in _windows(range(len(sources)), batch_size):
            todo = [
                (index, path, pixels)
                for index, path, pixels in pool.map(read, window)
                if pixels is not None
            ]
            if todo:
                found = embedder.embed_pixels(np.stack([pixels for _, _, pixels in todo]))
                for (index, path, _), embedding in zip(todo, found, strict=True):
                    if np.isfinite(embedding).all() and embedding.any():
                        cache.write(path, embedding)
                        results[index] = embedding
                    else:
                        results[index] = Broken(f"{embedder.spec.label} gives no finite embedding")
            bar.update(len(window))
    return [result for result in results if result is not None]


def _windows(items: Iterable[int], size: int) -> Iterator[list[int]]:
    iterator = iter(items)
    while window := list(itertools.islice(iterator, size)):
        yield window
