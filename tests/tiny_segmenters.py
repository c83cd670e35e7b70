"""Tiny, randomly initialised GroundingDINO, Segment Anything and SAM 3, of the real classes."""

import json
import sys
import types
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

WORDS = ("a", "red", "blue", "mug", "car", "toy", "robot", "[UNK]", "[PAD]", "[CLS]", "[SEP]")


def import_segment_anything() -> types.ModuleType:
    """Imports segment_anything, with a stand-in for torchvision where that is not installed.

    What it takes from torchvision to cut boxes out is one call of Pillow's.
    """
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        names = ("", ".ops", ".ops.boxes", ".transforms", ".transforms.functional")
        stand_in = {f"torchvision{name}": types.ModuleType(f"torchvision{name}") for name in names}
        stand_in["torchvision.ops.boxes"].__dict__.update(batched_nms=None, box_area=None)
        stand_in["torchvision.transforms.functional"].__dict__.update(
            to_pil_image=Image.fromarray,
            resize=lambda image, size: image.resize(size[::-1], Image.Resampling.BILINEAR),
        )
        sys.modules.update(stand_in)
        try:
            import segment_anything
        finally:
            # Others must not take it for torchvision.
            for name in stand_in:
                del sys.modules[name]
        return segment_anything
    import segment_anything

    return segment_anything


def build_sam() -> torch.nn.Module:
    """A Segment Anything for 64 px pictures, built as `segment_anything.build_sam` builds it."""
    from segment_anything.modeling import (
        ImageEncoderViT,
        MaskDecoder,
        PromptEncoder,
        Sam,
        TwoWayTransformer,
    )

    torch.manual_seed(1)
    return Sam(
        image_encoder=ImageEncoderViT(
            depth=2,
            embed_dim=16,
            img_size=64,
            mlp_ratio=2,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            num_heads=2,
            patch_size=8,
            qkv_bias=True,
            use_rel_pos=True,
            global_attn_indexes=(1,),
            window_size=4,
            out_chans=16,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=16,
            image_embedding_size=(8, 8),
            input_image_size=(64, 64),
            mask_in_chans=4,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=1, embedding_dim=16, mlp_dim=16, num_heads=2),
            transformer_dim=16,
            iou_head_depth=2,
            iou_head_hidden_dim=8,
        ),
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
    )


def save_sam_checkpoint(path: Path) -> Path:
    """Writes what `segment_anything` calls a checkpoint: a pickled table of tensors."""
    torch.save(build_sam().state_dict(), path)
    return path


def save_grounding_dino(folder: Path) -> Path:
    """Writes a GroundingDINO with its tokenizer and image processor, as on the hub."""
    from transformers import (
        BertConfig,
        BertTokenizer,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        SwinConfig,
    )

    torch.manual_seed(0)
    # A point must have the id it has in BERT's own vocabulary: the model's text masks look for it.
    vocabulary = {f"[unused{n}]": n for n in range(1100)}
    renamed = dict(zip(WORDS, range(200, 200 + len(WORDS)), strict=True))
    renamed |= {"[CLS]": 101, "[SEP]": 102, ".": 1012, "?": 1029, "[PAD]": 0}
    kept = {word: n for word, n in vocabulary.items() if n not in renamed.values()}
    tokens = sorted((kept | renamed).items(), key=lambda item: item[1])
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(word for word, _ in tokens) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=64,
            window_size=4,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 1, 1],
            out_indices=[2, 3, 4],
        ),
        text_config=BertConfig(
            vocab_size=len(tokens),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=64,
        ),
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=12,
        max_text_len=32,
        num_feature_levels=3,
        encoder_n_points=2,
        decoder_n_points=2,
    )
    GroundingDinoForObjectDetection(config).eval().save_pretrained(folder)
    processor = {
        "image_processor_type": "GroundingDinoImageProcessor",
        "size": {"shortest_edge": 96, "longest_edge": 128},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def save_transformers_sam(folder: Path) -> Path:
    """Writes a Segment Anything in transformers' layout."""
    from transformers import (
        SamConfig,
        SamMaskDecoderConfig,
        SamModel,
        SamPromptEncoderConfig,
        SamVisionConfig,
    )

    torch.manual_seed(2)
    config = SamConfig(
        vision_config=SamVisionConfig(
            hidden_size=16,
            output_channels=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=64,
            patch_size=8,
            mlp_ratio=2.0,
            window_size=4,
            global_attn_indexes=[1],
            num_pos_feats=8,
            initializer_range=0.02,
        ),
        prompt_encoder_config=SamPromptEncoderConfig(
            hidden_size=16, image_size=64, patch_size=8, mask_input_channels=4
        ),
        mask_decoder_config=SamMaskDecoderConfig(
            hidden_size=16,
            mlp_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            iou_head_depth=2,
            iou_head_hidden_dim=8,
        ),
    )
    SamModel(config).eval().save_pretrained(folder)
    processor = {
        "image_processor_type": "SamImageProcessor",
        "size": {"longest_edge": 64},
        "pad_size": {"height": 64, "width": 64},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def save_sam3(folder: Path) -> Path:
    """Writes a SAM 3 with its tokenizer, as on the hub: as the detector of a video model."""
    from transformers import CLIPTextConfig, Sam3Config
    from transformers.models.sam3.configuration_sam3 import (
        Sam3DETRDecoderConfig,
        Sam3DETREncoderConfig,
        Sam3GeometryEncoderConfig,
        Sam3MaskDecoderConfig,
        Sam3VisionConfig,
        Sam3ViTConfig,
    )
    from transformers.models.sam3.modeling_sam3 import Sam3Model

    from tests.tokenizer_folder import write_tokenizer

    write_tokenizer(folder, pad="!", kind="tokenizer.json", max_length=16)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    torch.manual_seed(3)
    small = dict(hidden_size=16, num_attention_heads=2)
    config = Sam3Config(
        vision_config=Sam3VisionConfig(
            backbone_config=Sam3ViTConfig(
                **small,
                intermediate_size=16,
                num_hidden_layers=2,
                image_size=56,
                patch_size=14,
                window_size=2,
                global_attn_indexes=[1],
                pretrain_image_size=28,
            ),
            fpn_hidden_size=16,
            backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
        ),
        text_config=CLIPTextConfig(
            **small,
            vocab_size=len(vocabulary),
            intermediate_size=16,
            projection_dim=8,
            num_hidden_layers=1,
            max_position_embeddings=16,
            eos_token_id=len(vocabulary) - 1,
            bos_token_id=len(vocabulary) - 2,
        ),
        geometry_encoder_config=Sam3GeometryEncoderConfig(
            **small, num_layers=1, intermediate_size=16
        ),
        detr_encoder_config=Sam3DETREncoderConfig(**small, num_layers=1, intermediate_size=16),
        detr_decoder_config=Sam3DETRDecoderConfig(
            **small, num_layers=1, intermediate_size=16, num_queries=6
        ),
        mask_decoder_config=Sam3MaskDecoderConfig(**small),
    )
    tensors = {f"detector_model.{name}": t for name, t in Sam3Model(config).state_dict().items()}
    tensors["tracker_model.no_part_of_it"] = torch.zeros(1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    video = {"model_type": "sam3_video", "detector_config": config.to_dict()}
    (folder / "config.json").write_text(json.dumps(video))
    return folder
