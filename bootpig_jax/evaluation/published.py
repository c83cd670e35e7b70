"""The tables of the paper (arXiv 2401.13974): CLIP-T, CLIP-I and DINO, times 100, on DreamBooth."""

Published = tuple[tuple[str, dict[str, float]], ...]

MEASURES = ("CLIP-T", "CLIP-I", "DINO")


def _rows(*rows: tuple[str, float | None, float, float]) -> Published:
    return tuple(
        (name, {m: v for m, v in zip(MEASURES, values, strict=True) if v is not None})
        for name, *values in rows
    )


REAL_PICTURES = {"CLIP-I": 88.5, "DINO": 77.4}

# Table 1, and what Table 3 adds to it.
TABLE_1: Published = _rows(
    ("Textual Inversion", 25.5, 78.0, 56.9),
    ("DreamBooth", 30.5, 80.3, 66.8),
    ("CustomDiffusion", 24.5, 80.1, 69.5),
    ("CustomDiffusion, reproduced", 28.9, 80.6, 65.5),
    ("BLIP-Diffusion + finetuning", 30.2, 80.5, 67.0),
    ("ViCo, reproduced", 28.0, 77.7, 58.5),
    ("ELITE", 25.5, 76.2, 65.2),
    ("ELITE, reproduced", 29.6, 78.8, 61.4),
    ("BLIP-Diffusion", 30.0, 77.9, 59.4),
    ("BootPIG", 31.1, 79.7, 67.4),
    ("the real pictures", None, 88.5, 77.4),
)

# Table 2, by the name that a method takes to stand beside a row: what is trained of the Base UNet /
# of the Reference UNet, and whether references are augmented. The first ran out of memory.
TABLE_2: dict[str, tuple[str, dict[str, float]]] = {
    name: (row, dict(zip(MEASURES, values, strict=False)))
    for name, row, values in (
        ("table2_all_all", "all / all, yes", ()),
        ("table2_none_all", "none / all, yes", (30.6, 72.8, 43.8)),
        ("table2_all_none", "all / none, yes", (31.6, 78.8, 66.4)),
        ("table2_rsa_none", "RSA / none, yes", (30.9, 78.2, 64.9)),
        ("table2_rsa_all_no_augmentation", "RSA / all, no", (30.2, 78.8, 67.0)),
        ("BootPIG", "RSA / all, yes", (31.1, 79.7, 67.4)),
    )
}
