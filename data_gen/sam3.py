"""Text to mask by SAM 3, which takes the words themselves (Carion et al. 2025).

It answers with many candidates ("queries"), each with a mask and a score, and with one score for
whether the words are in the picture at all. As its authors do, the two scores are multiplied; the
query that scores highest gives the mask.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image
from transformers import AutoTokenizer

# `transformers` itself hides the class where torchvision is missing, which only box prompts need.
from transformers.models.sam3.modeling_sam3 import Sam3Model

from data_gen.config import MasksConfig
from data_gen.networks import find_device, hash_weights, inference, load, read_model
from data_gen.stages import Rejected, Segmentation

_MASK_THRESHOLD = 0.5  # of a pixel's probability: the authors'


class Sam3:
    """SAM 3 by `transformers`.

    Rejects with `not_found` where no mask has a score above the threshold.
    """

    def __init__(self, config: MasksConfig) -> None:
        """Loads the network onto its device.

        Raises:
          UserError: it cannot be loaded, or there is no such device.
        """
        self._config = config
        name = str(config.sam3.model)
        self._model = load("sam3.model", name, _read_model).to(find_device(config.device)).eval()
        self._tokenizer = load("sam3.model", name, AutoTokenizer.from_pretrained)
        self.model_hash = hash_weights(self._model)

    def segment(
        self,
        pictures: Sequence[UInt8[np.ndarray, "h w 3"]],
        objects: Sequence[str],
        seeds: Sequence[int],
    ) -> list[Segmentation | Rejected]:
        """Returns the mask of the named object in each picture (see `stages.Segmenter`)."""
        found: list[Segmentation | Rejected] = []
        for start in range(0, len(pictures), self._config.batch_size):
            batch = slice(start, start + self._config.batch_size)
            found += self._segment_batch(pictures[batch], objects[batch])
        return found

    def _segment_batch(
        self, pictures: Sequence[UInt8[np.ndarray, "h w 3"]], objects: Sequence[str]
    ) -> list[Segmentation | Rejected]:
        with inference(self._config) as device:
            text = self._tokenizer(
                list(objects),
                padding="max_length",
                truncation=True,
                max_length=self._model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            ).to(device)
            side = self._model.config.image_size
            answer = self._model(
                pixel_values=torch.from_numpy(as_input(pictures, side)).to(device),
                input_ids=text.input_ids,
                attention_mask=text.attention_mask,
            )
            scores = answer.pred_logits.float().sigmoid() * answer.presence_logits.float().sigmoid()
            found: list[Segmentation | Rejected] = []
            for picture, of_queries, logits in zip(
                pictures, scores, answer.pred_masks, strict=True
            ):
                best = int(of_queries.argmax())
                score = float(of_queries[best])
                if score <= self._config.sam3.threshold:
                    found.append(Rejected("not_found"))
                    continue
                probability = torch.nn.functional.interpolate(
                    logits[None, None, best].float().sigmoid(),
                    size=picture.shape[:2],
                    mode="bilinear",
                    align_corners=False,
                )[0, 0]
                found.append(Segmentation((probability > _MASK_THRESHOLD).cpu().numpy(), score))
        return found


def as_input(
    pictures: Sequence[UInt8[np.ndarray, "h w 3"]], side: int
) -> Float32[np.ndarray, "b 3 {side} {side}"]:
    """Resizes pictures to squares and scales them to [-1, 1], as SAM 3 was trained.

    What transformers' own processor does, which cannot be had without torchvision.
    """
    resized = [
        np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BILINEAR))
        for picture in pictures
    ]
    return np.stack(resized).transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1


def _read_model(name: str) -> Any:
    return read_model(Sam3Model, name)
