"""The model card: the `README.md` beside the weights that a run exports.

It says what a user of the weights has to know, in the form that the Hugging Face hub shows. Folders
of the machine it was trained on are named without what leads to them.
"""

from collections.abc import Mapping
from pathlib import Path

import yaml

from bootpig_jax.config import TrainConfig

# What of the configuration says how the run was made, not what it made.
LEFT_OUT = {"output_dir", "checkpoint", "safety", "validation", "logging"}

TEXT = """\
# BootPIG, trained from {base}

Two UNets that draw a picture of a *subject*, known from one or more reference pictures, as a prompt
asks ([BootPIG, arXiv 2401.13974](https://arxiv.org/abs/2401.13974)). `ref_unet/` reads the
references, `base_unet/` draws and attends to what the other read. VAE, text encoder, tokenizer and
noise schedule are those of the base model, which is needed beside these weights and whose licence
holds for them.

| | |
|---|---|
| Base model | {base} |
| Data | {data}, {records} triplets, at {size} px |
| Updates | {steps}, of {batch} samples |
| Trained | Reference UNet: {reference}; Base UNet: {trained} |
| Exported | {export} |
{validation}
## Use

```python
from bootpig_jax import BootPIGPipeline

pipe = BootPIGPipeline.from_pretrained("{base}", bootpig="THIS_FOLDER")
images = pipe("a dog in the snow", references=[picture])
```

`bootpig.json` says how the references are given to `ref_unet`; the pipeline reads it. In PyTorch
each folder is an ordinary UNet of the same shape as the base model's:

```python
from diffusers import UNet2DConditionModel

base_unet = UNet2DConditionModel.from_pretrained("THIS_FOLDER", subfolder="base_unet")
ref_unet = UNet2DConditionModel.from_pretrained("THIS_FOLDER", subfolder="ref_unet")
```

What joins the two there, the self-attention layers' inputs, has to be added: plain diffusers draws
with `base_unet` as with any Stable Diffusion, without references.

## Configuration

```yaml
{configuration}```
"""


def model_card(
    config: TrainConfig, records: int, steps: int, validation: Mapping[str, float] | None
) -> str:
    """Returns the model card of a run's result.

    Args:
      config: of the run.
      records: triplets in the training data.
      steps: updates made.
      validation: the last validation's metrics and its `step`, if there was one.
    """
    base = _public_name(config.model.base)
    fields = config.model_dump(mode="json", exclude=LEFT_OUT)
    fields["model"]["base"] = base
    for name in ("dir", "cache"):
        if fields["data"][name] is not None:
            fields["data"][name] = _public_name(fields["data"][name])
    parts = {"none": "nothing", "all": "everything", "rsa": "its self-attention layers"}
    card = TEXT.format(
        base=base,
        data=fields["data"]["dir"],
        records=records,
        size=config.data.image_size,
        steps=steps,
        batch=config.batch_size,
        reference=parts[config.trainable.reference],
        trained=parts[config.trainable.base],
        export=config.export_precision
        + ("" if config.ema_decay is None else f", a running average (decay {config.ema_decay})"),
        validation="" if validation is None else _validation_table(validation),
        configuration=yaml.safe_dump(fields, sort_keys=False, allow_unicode=True),
    )
    metadata = {
        "base_model": base,
        "pipeline_tag": "text-to-image",
        "library_name": "bootpig_jax",
        "tags": ["bootpig", "stable-diffusion", "personalization"],
    }
    if not _on_the_hub(config.model.base):
        del metadata["base_model"]
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n\n{card}"


def _validation_table(metrics: Mapping[str, float]) -> str:
    rows = {"loss": "loss", "reference_share": "share of attention that references get"}
    lines = [
        f"| Validation: {label} | {metrics[name]:.4f} (after update {metrics['step']}) |"
        for name, label in rows.items()
        if name in metrics
    ]
    return "\n".join([*lines, ""]) if lines else ""


def _on_the_hub(model: str) -> bool:
    return model.count("/") == 1 and not Path(model).exists()


def _public_name(model: str) -> str:
    return model if _on_the_hub(model) else Path(model).name
