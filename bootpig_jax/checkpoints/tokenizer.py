"""CLIP's byte-pair tokenizer, read from the `tokenizer/` folder of a Stable Diffusion model.

A prompt is normalised (NFC, every run of white space one space, lower case), split into words,
digits and runs of punctuation, and each piece merged into subwords of UTF-8 bytes. The ids are
framed by `<|startoftext|>` and `<|endoftext|>`, cut so that the closing token stays, and padded to
the text encoder's length. The pad token differs between models (SD 2.x pads with "!", SD 1.5 with
`<|endoftext|>`), so it comes from the folder.
"""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int32
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from bootpig_jax.errors import UserError

# The names and defaults that transformers gives CLIP's special tokens.
_SPECIAL_TOKENS = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
_CLIP_MAX_LENGTH = 77
_PIECES = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


@dataclass(frozen=True)
class Tokenizer:
    """Text to padded token ids.

    Attributes:
        backend: The byte-pair model, without framing, truncation or padding.
        bos_id: Id of the opening token.
        eos_id: Id of the closing token.
        pad_id: Id that fills the rest of the row.
        max_length: L, the number of ids in every row.
    """

    backend: tokenizers.Tokenizer
    bos_id: int
    eos_id: int
    pad_id: int
    max_length: int

    def __call__(self, texts: Sequence[str]) -> Int32[np.ndarray, "b l"]:
        """Tokenizes `texts`; what does not fit is cut off silently.

        Raises:
            UserError: A text holds NUL or is not valid Unicode.
        """
        rows = np.full((len(texts), self.max_length), self.pad_id, np.int32)
        for row, text in zip(rows, texts, strict=True):
            ids = self._encode(text).ids[: self.max_length - 2]
            row[: len(ids) + 2] = [self.bos_id, *ids, self.eos_id]
        return rows

    def dropped(self, text: str) -> str:
        """Returns the end of `text` that lies beyond the text encoder's length, or ""."""
        offsets = self._encode(text).offsets[self.max_length - 2 :]
        return text[offsets[0][0] :] if offsets else ""

    def _encode(self, text: str) -> tokenizers.Encoding:
        if "\0" in text:
            raise UserError(f"prompt {text!r}: holds a NUL character; remove it")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"prompt {text!r}: not valid Unicode at character {error.start}; remove it"
            ) from error
        return self.backend.encode(text, add_special_tokens=False)


def tokenize_with_warnings(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    strict: bool = False,
    warn: Callable[[str], None] = warnings.warn,
) -> Int32[np.ndarray, "b l"]:
    """Tokenizes `texts` and says, for each that is too long, which words the model will not see.

    Raises:
        UserError: A text is too long and `strict` is set, or it holds NUL.
    """
    for text in texts:
        dropped = tokenizer.dropped(text)
        if dropped:
            limit = f"prompt longer than {tokenizer.max_length} tokens"
            message = f"{limit}: the model does not see {dropped!r}"
            if strict:
                raise UserError(f"{message}; shorten it")
            warn(message)
    return tokenizer(texts)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Loads the tokenizer in `folder`: `tokenizer.json`, or `vocab.json` with `merges.txt`.

    The special tokens and the length come from `tokenizer_config.json` and, where that has no
    `added_tokens_decoder`, from `special_tokens_map.json`, which then wins: as in transformers.

    Raises:
        UserError: A file is missing, is not what its name says, or lacks a special token.
    """
    folder = Path(folder)
    vocabulary, merges = _read_vocabulary(folder)
    config = _read_json(folder / "tokenizer_config.json", default={})
    if "added_tokens_decoder" not in config:
        config |= _read_json(folder / "special_tokens_map.json", default={})
    added = {entry["content"]: entry for entry in config.get("added_tokens_decoder", {}).values()}
    special = {}
    for name, default in _SPECIAL_TOKENS.items():
        token = config.get(name) or default
        content = token if isinstance(token, str) else token["content"]
        if content not in vocabulary:
            raise UserError(f"{folder}: {name} {content!r} is not in the vocabulary; use its files")
        special[name] = _added_token(added.get(content, token))

    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
            unk_token=special["unk_token"].content,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    # A pad token that is also a word ("!") is then found before the splitting, as in transformers.
    backend.add_tokens(list(special.values()))
    length = int(config.get("model_max_length", _CLIP_MAX_LENGTH))
    return Tokenizer(
        backend=backend,
        bos_id=vocabulary[special["bos_token"].content],
        eos_id=vocabulary[special["eos_token"].content],
        pad_id=vocabulary[special["pad_token"].content],
        # transformers writes 1e30 for "no limit was set".
        max_length=length if 2 < length < 10_000 else _CLIP_MAX_LENGTH,
    )


def _added_token(token: str | dict[str, Any]) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True)
    flags = {
        key: token[key] for key in ("lstrip", "rstrip", "normalized", "single_word") if key in token
    }
    return AddedToken(token["content"], special=True, **flags)


def _read_vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    serialized = folder / "tokenizer.json"
    if serialized.is_file():
        model = _read_json(serialized).get("model", {})
        vocabulary, lines = model.get("vocab"), model.get("merges")
        if not isinstance(vocabulary, dict) or not isinstance(lines, list):
            raise UserError(f"{serialized}: no byte-pair model in it; use CLIP's tokenizer")
    else:
        vocabulary = _read_json(folder / "vocab.json")
        lines = _read_text(folder / "merges.txt").splitlines()
        lines = [line for line in lines if line.strip() and not line.startswith("#version")]
    pairs = [line.split(" ") if isinstance(line, str) else line for line in lines]
    if any(len(pair) != 2 for pair in pairs):
        raise UserError(f"{folder}: a merge is not a pair of tokens; copy the file anew")
    return vocabulary, [(first, second) for first, second in pairs]


def _read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    if default is not None and not path.is_file():
        return dict(default)
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); copy the file anew") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; copy the file anew")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: missing; a tokenizer is tokenizer.json, or vocab.json and merges.txt"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy the file anew") from error
