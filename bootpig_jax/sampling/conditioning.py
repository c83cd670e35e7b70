"""How a trained BootPIG wants its references: `bootpig.json` beside `base_unet/` and `ref_unet/`.

Training decides at which timestep the Reference UNet sees the references, which caption it reads
and how strongly reference tokens feed the keys; sampling has to do the same.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, Literal, Self, get_args

from bootpig_jax.checkpoints import release
from bootpig_jax.errors import UserError

ReferenceTimestep = Literal["same", 0]
ReferenceCaption = Literal["target", "first_clause", "object"]

FILE_NAME = "bootpig.json"
MAX_KEY_SCALE = 100


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """What `bootpig.json` holds. The defaults are the paper's, for folders without the file.

    Attributes:
        reference_timestep: "same": references are noised to the target's timestep; 0: they stay
            clean, and their features are computed once.
        reference_key_scale: factor on the reference tokens that feed the keys.
        reference_caption: what the Reference UNet reads; see `caption`.
    """

    reference_timestep: ReferenceTimestep = "same"
    reference_key_scale: float = 1.0
    reference_caption: ReferenceCaption = "target"

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """Reads `bootpig.json` in `folder`.

        If there is none, these are the defaults, or for weights of the authors' release what that
        trains with.

        Raises:
            UserError: The file is no JSON object, or a field is unknown or has a wrong value.
        """
        path = Path(folder) / FILE_NAME
        if not path.exists():
            if release.is_release(folder):
                return cls(
                    reference_key_scale=release.REFERENCE_KEY_SCALE,
                    reference_caption="first_clause",
                )
            return cls()
        try:
            fields: Any = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: not valid JSON ({error}); export the model anew") from None
        if not isinstance(fields, dict):
            raise UserError(f"{path}: not a JSON object; export the model anew")
        unknown = sorted(fields.keys() - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise UserError(f"{path}: unknown field {unknown[0]!r}; remove it")
        values = dataclasses.asdict(cls()) | fields
        timestep, scale = values["reference_timestep"], values["reference_key_scale"]
        if timestep not in get_args(ReferenceTimestep) or isinstance(timestep, bool):
            raise UserError(f'{path}: reference_timestep: use "same" or 0')
        if not isinstance(scale, int | float) or not 0 < scale <= MAX_KEY_SCALE:
            raise UserError(
                f"{path}: reference_key_scale: use a number above 0, {MAX_KEY_SCALE} at most"
            )
        if values["reference_caption"] not in get_args(ReferenceCaption):
            known = ", ".join(get_args(ReferenceCaption))
            raise UserError(f"{path}: reference_caption: use one of {known}")
        return cls(**values | {"reference_key_scale": float(scale)})

    def write(self, folder: str | Path) -> None:
        """Writes `bootpig.json` into `folder`, which exists."""
        text = json.dumps(dataclasses.asdict(self), indent=2)
        (Path(folder) / FILE_NAME).write_text(text + "\n", encoding="utf-8")

    def caption(self, prompt: str) -> str:
        """What the Reference UNet reads when the Base UNet reads `prompt`.

        `first_clause` is the prompt up to its first comma (the authors' release). `object` is that
        without "a photo of a": the words that the training data names the object with.
        """
        if self.reference_caption == "target":
            return prompt
        clause = prompt.split(",")[0].strip()
        if self.reference_caption == "first_clause":
            return clause
        return re.sub(r"^a photo of (an? |the )?", "", clause, flags=re.IGNORECASE)
