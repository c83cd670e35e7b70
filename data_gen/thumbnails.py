"""Small JPEGs of pictures, for people to look at."""

import cv2
import numpy as np
from jaxtyping import UInt8

_SIDE = 144  # pixels
_QUALITY = 80


def thumbnail(picture: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """Returns the RGB picture as a JPEG whose longer side is 144 pixels."""
    height, width = picture.shape[:2]
    scale = _SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    # What is enlarged shows its pixels as they are.
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    small = cv2.resize(np.ascontiguousarray(picture[..., ::-1]), size, interpolation=method)
    done, encoded = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    if not done:
        raise ValueError(f"cannot encode an array of shape {small.shape} as JPEG")
    return encoded.tobytes()
