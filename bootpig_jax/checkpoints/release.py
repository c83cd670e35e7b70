"""What the authors' release (SalesforceAIResearch/bootpig, PyTorch) writes.

Each of its checkpoints is a folder with `base_unet/` and `ref_unet/`, saved by diffusers. Their
class, `BootPIGUNet`, is diffusers' `UNet2DConditionModel` with other forward functions and one
field more in `config.json`, `bootpig_mode` ("base" or "ref"). It has no parameters of its own and
renames none. So its folders load here as any UNet's do, and its `from_pretrained` loads what
`save_unet` writes.

What the folders do not hold is how the release conditions on references: it trains with the
reference tokens that feed the keys scaled by 1.1, and gives the Reference UNet the caption up to
its first comma. Weights trained so should be sampled so, hence `is_release`.
"""

import json
from pathlib import Path

UNET_CLASS = "BootPIGUNet"
REFERENCE_KEY_SCALE = 1.1


def is_release(bootpig: str | Path) -> bool:
    """Whether the authors' release wrote a folder with `base_unet/` and `ref_unet/`."""
    return all(
        _class_name(Path(bootpig) / name) == UNET_CLASS for name in ("base_unet", "ref_unet")
    )


def _class_name(folder: Path) -> str | None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # what is wrong with it, loading the weights will say
    return config.get("_class_name") if isinstance(config, dict) else None
