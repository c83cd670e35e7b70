"""Writes tokenizer folders as Stable Diffusion's repositories hold them."""

import json
from pathlib import Path

MERGES = (
    "t h|th e</w>|a n|an d</w>|i n|in g</w>|s n|sn o|sno w</w>|d o|do g</w>|p h|ph o|pho t"
    "|phot o</w>"
    "|! !</w>|' s</w>|. .|.. .</w>|1 2|r e</w>|' re</w>|o f</w>"
)
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def byte_alphabet() -> list[str]:
    """CLIP's order: the 188 printable bytes as themselves ("!" first), then the others."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def write_tokenizer(folder: Path, *, pad: str, kind: str, max_length: int = 77) -> Path:
    """A tokenizer folder as Stable Diffusion's repositories hold it, with a handful of merges."""
    folder.mkdir(parents=True)
    merges = [tuple(pair.split(" ")) for pair in MERGES.split("|")]
    letters = byte_alphabet()
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += ["".join(pair) for pair in merges] + [BOS, EOS]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    marked = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    bos, eos = ({"content": content, **marked} for content in (BOS, EOS))
    if kind == "tokenizer.json":
        from transformers import CLIPTokenizer

        CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad).save_pretrained(folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config["model_max_length"] = max_length
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        assert (folder / "tokenizer.json").exists()
        return folder
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    config = {
        "bos_token": {"__type": "AddedToken", **bos},
        "eos_token": {"__type": "AddedToken", **eos},
        "unk_token": {"__type": "AddedToken", **eos},
        # SD 2.1's two files disagree: the map's "!" is what counts.
        "pad_token": EOS,
        "model_max_length": max_length,
        "do_lower_case": True,
        "tokenizer_class": "CLIPTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    special = {"bos_token": bos, "eos_token": eos, "unk_token": eos, "pad_token": pad}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return folder
