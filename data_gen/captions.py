"""Captions: what the text-to-image model is asked to draw.

The paper (App. A) uses captions of the form

    A photo of a [object], [object positioning] [scene]

and takes the words of `[object]` as the prompt of its segmenter. They come from a grammar
(`grammar`), a language model (`llm_captions`) or a file of the user's own:

    captions.txt      one caption of that form a line
    captions.jsonl    one JSON object a line: {"caption": "...", "object": "..."}

`"object"` may be left out where the caption has the form; with it, the caption may be any text.
Blank lines are skipped. Every other line that cannot be used ends the run before it starts, with
the line's number: hours of drawing follow, and a file is quickly mended. Where a run has more
candidates than the file has captions, the captions are used again in the same order, with other
seeds.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from bootpig_jax.errors import UserError
from data_gen.config import DataGenConfig
from data_gen.grammar import GrammarSource, OpenWorldGrammar, ToylandGrammar
from data_gen.stages import Caption, CaptionSource

JOURNAL_NAME = "captions.jsonl"

MAX_CAPTION = 300
"""Letters in a caption at most: about 60 words, as many as CLIP's text encoder can read."""
MAX_OBJECT = 80
"""Letters in an object's name at most."""

_FORM = re.compile(r"A photo of an? (?P<object>[^,]+), \S.*")
_SPACES = re.compile(r"[ \t\u00a0\u2000-\u200a\u202f\u205f\u3000]+")
_FREQUENT = 10


def make_caption_source(config: DataGenConfig) -> CaptionSource:
    """Returns the source of a run's captions. Asks no server yet.

    Raises:
      UserError: the file of captions, or the journal of an earlier run, cannot be used.
    """
    captions = config.captions
    if captions.source == "file":
        assert captions.file is not None  # the configuration was checked
        return FileSource(captions.file)
    if captions.source == "llm":
        # It takes a second to import.
        from data_gen.llm_captions import LLMCaptions

        assert captions.llm is not None
        journal = config.output_dir / JOURNAL_NAME
        return LLMCaptions(captions.llm, journal, seed=config.seed, total=config.candidates)
    grammar = ToylandGrammar() if captions.source == "toyland" else OpenWorldGrammar()
    return GrammarSource(grammar, config.seed)


def parse_caption(text: str) -> Caption:
    """Reads the object's words out of a caption of the paper's form.

    Args:
      text: one line. Spaces of all kinds become single ones, and letters with their accents one
        character (NFC).

    Raises:
      ValueError: `text` is not of the form "A photo of a [object], ...", or `clean` refuses it.
    """
    text = clean(text, MAX_CAPTION)
    match = _FORM.fullmatch(text)
    if match is None or not any(map(str.isalnum, match["object"])):
        raise ValueError(f'not of the form "A photo of a [object], ...": {text[:80]!r}')
    if "[" in text or "]" in text:
        raise ValueError(f"holds a placeholder in brackets: {text[:80]!r}")
    return Caption(text, clean(match["object"], MAX_OBJECT))


def clean(text: str, max_length: int) -> str:
    """Returns `text` in NFC with single spaces.

    Raises:
      ValueError: it is empty, longer than `max_length`, or holds control characters.
    """
    if len(text) > 4 * max_length:  # before any work is done on it
        raise ValueError(f"longer than {max_length} characters: {text[:80]!r}")
    text = _SPACES.sub(" ", unicodedata.normalize("NFC", text)).strip()
    if not text:
        raise ValueError("empty")
    if not text.isprintable():
        raise ValueError(f"holds control characters: {text[:80]!r}")
    if len(text) > max_length:
        raise ValueError(f"longer than {max_length} characters: {text[:80]!r}")
    return text


class FileSource:
    """Captions from a file of the user's own (see the module's docstring)."""

    rejects: Mapping[str, int] = {}

    def __init__(self, path: Path) -> None:
        """Reads the file.

        Raises:
          UserError: it cannot be read, has no captions, or has a line that is not one.
        """
        self._captions = _read_captions(path)

    def __enter__(self) -> Self:
        """Nothing runs in the background."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing runs in the background."""

    def complete(self, count: int) -> bool:
        """Captions are used again where the file has too few."""
        return True

    def captions(self, indices: Sequence[int]) -> list[Caption]:
        """Returns one caption for each global index."""
        return [self._captions[index % len(self._captions)] for index in indices]


def _read_captions(path: Path) -> list[Caption]:
    if not path.is_file():
        raise UserError(f"captions.file: {path}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"captions.file: {path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"captions.file: {path}: is not UTF-8 text") from error
    parse = _parse_json_line if path.suffix == ".jsonl" else parse_caption
    captions, mistakes = [], []
    # Not splitlines(): that also splits at characters which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            captions.append(parse(line.rstrip("\r")))
        except ValueError as error:
            mistakes.append(f"{path}:{number}: {error}")
    if mistakes:
        more = f" (and {len(mistakes) - 1} more lines)" if len(mistakes) > 1 else ""
        raise UserError(f"captions.file: {mistakes[0]}{more}")
    if not captions:
        raise UserError(f"captions.file: {path}: has no captions: write one a line")
    return captions


def _parse_json_line(line: str) -> Caption:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError('not a JSON object such as {"caption": "A photo of a ..."}') from None
    if not isinstance(value, dict) or not isinstance(value.get("caption"), str):
        raise ValueError('has no "caption" that is a string')
    unknown = sorted(set(value) - {"caption", "object"})
    if unknown:
        raise ValueError(f'has the key {unknown[0][:40]!r}: only "caption" and "object" are known')
    name = value.get("object")
    if name is None:
        return parse_caption(value["caption"])
    if not isinstance(name, str):
        raise ValueError('has an "object" that is not a string')
    try:
        return Caption(clean(value["caption"], MAX_CAPTION), clean(name, MAX_OBJECT))
    except ValueError as error:
        raise ValueError(f"caption or object: {error}") from None


@dataclass(frozen=True)
class CaptionStatistics:
    """What a run's report says of its captions.

    Attributes:
      count: the captions.
      distinct: different texts among them.
      distinct_objects: different objects.
      frequent_objects: up to ten objects with their counts, the most frequent first.
      min_words: of the shortest caption, in words.
      mean_words: per caption.
      max_words: of the longest caption.
    """

    count: int
    distinct: int
    distinct_objects: int
    frequent_objects: tuple[tuple[str, int], ...]
    min_words: int
    mean_words: float
    max_words: int


def caption_statistics(captions: Iterable[Caption]) -> CaptionStatistics:
    """Counts captions, objects and words. Without captions, everything is 0."""
    captions = list(captions)
    objects = Counter(caption.object for caption in captions)
    words = [len(caption.text.split()) for caption in captions]
    frequent = sorted(objects.items(), key=lambda item: (-item[1], item[0]))
    return CaptionStatistics(
        count=len(captions),
        distinct=len({caption.text for caption in captions}),
        distinct_objects=len(objects),
        frequent_objects=tuple(frequent[:_FREQUENT]),
        min_words=min(words, default=0),
        mean_words=sum(words) / len(words) if words else 0.0,
        max_words=max(words, default=0),
    )
