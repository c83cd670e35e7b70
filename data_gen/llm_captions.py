"""Captions by a language model: the paper's prompt (App. A), asked again and again.

Calls are numbered. The answer of each is written to a journal as soon as it is there, one line a
call, so a run that goes on asks nothing twice. The journal alone decides the captions: the answers
in the order of their calls, each read line by line; what has not the paper's form is dropped, and
so are near-duplicates of an earlier caption. So caption `i` does not depend on how many calls were
in flight, nor on which came back first.

The prompt is the same in every call. What makes the answers differ is the model's sampling: its
temperature and the seed that is sent with each call, drawn from (run seed, call number).

Two captions are near-duplicates if they name the same object and have at least three quarters of
their words in common (Jaccard index), both compared without case, accents, plural -s and the
commonest little words.
"""

import fcntl
import hashlib
import json
import math
import os
import re
import threading
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

from bootpig_jax.errors import UserError
from data_gen.captions import MAX_CAPTION, clean, parse_caption
from data_gen.chat_server import ChatServer, Stopped
from data_gen.config import LLMConfig
from data_gen.stages import Caption, picture_seed

SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {"captions": {"type": "array", "items": {"type": "string"}}},
    "required": ["captions"],
    "additionalProperties": False,
}
"""The JSON schema of an answer, in the subset that servers with strict schemas know."""

_SIMILAR = 0.75
_LITTLE_WORDS = frozenset("a an the of on in at to by with and or its it is photo".split())
_OFF_FORM_CALLS = 20  # in a row without one caption of the form: the model does not understand
_REPEATING_CALLS = 200  # in a row without one new caption: the model has no more to say
_GRACE = 5.0  # seconds that calls in flight have to come back when a run ends

# Numbering, bullets, quotation marks and the paper's own "Caption:" before a caption, and what may
# be left of them behind it.
_DECORATED = re.compile(r"[\W\d_]*(?:[Cc]aption\W*\d*\W*)?(?P<caption>A photo of an? .*)")
_WORD = re.compile(r"[^\W_]+")
_BEHIND = " \"'“”‘’`*_,"


def prompt(config: LLMConfig) -> str:
    """Returns the paper's prompt, word for word where one caption is asked for."""
    if config.captions_per_call == 1:
        task = "Generate a caption for an image where there is"
        each = ""
    else:
        count = config.captions_per_call
        task = f"Generate {count} captions for {count} different images. In each image there is"
        each = " on a line of its own for each caption"
    words = f" A caption has at most {config.max_words} words." if config.max_words else ""
    return (
        f"{task} one main object and possibly other secondary objects. The object needs to be "
        "finite and solid. The main object should not be things like lakes, fields, sky, etc."
        f"{words}\n\nYou should only respond in the following format{each}: Caption: A photo of a "
        "[object], [describe object positioning in scene] [describe scene]"
    )


def answer_lines(answer: str) -> list[str]:
    """Splits an answer into what may be captions: a JSON list's strings, or the lines of text."""
    text = answer.strip()
    if text.startswith("```"):  # a fence of Markdown
        text = text.partition("\n")[2].removesuffix("```")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    items = value.get("captions") if isinstance(value, dict) else value
    if isinstance(items, list):
        return [item for item in items if isinstance(item, str)]
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


def parse_line(line: str) -> Caption:
    """Reads a caption from a line of an answer, without numbering, bullets and quotation marks.

    Raises:
      ValueError: the line is not a caption of the paper's form.
    """
    match = _DECORATED.fullmatch(clean(line, MAX_CAPTION + 40))
    if match is None:
        raise ValueError(f"no caption: {line[:80]!r}")
    return parse_caption(match["caption"].rstrip(_BEHIND))


class DistinctCaptions:
    """Captions in order, without near-duplicates (see the module's docstring).

    Not every pair is compared. Let J be the least Jaccard index of near-duplicates, and each
    caption's n words stand in one common order. If two captions do not share any of their first
    n - ceil(J n) + 1 words, they share too few of all ("prefix filtering", Chaudhuri et al. 2006).
    The longest words come first: they are the rarest, and few captions share them.
    """

    def __init__(self) -> None:
        """Without captions yet."""
        self.captions: list[Caption] = []
        # By the object's words and one of the caption's first words.
        self._index: defaultdict[tuple[str, str], list[frozenset[str]]] = defaultdict(list)

    def add(self, caption: Caption) -> bool:
        """Adds a caption unless it is a near-duplicate; returns whether it was added."""
        of_object = _words(caption.object)
        name = " ".join(sorted(of_object))
        words = _words(caption.text)
        # All captions of an object share its words: they come last.
        ordered = sorted(words, key=lambda word: (word in of_object, -len(word), word))
        first = ordered[: len(words) - math.ceil(_SIMILAR * len(words)) + 1]
        for word in first:
            for other in self._index[name, word]:
                if len(words & other) >= _SIMILAR * len(words | other):
                    return False
        for word in first:
            self._index[name, word].append(words)
        self.captions.append(caption)
        return True


def _words(text: str) -> frozenset[str]:
    """Returns the words of `text` that count when two captions are compared."""
    plain = text.casefold()
    if not plain.isascii():
        letters = unicodedata.normalize("NFKD", plain)
        plain = "".join(c for c in letters if not unicodedata.combining(c))
    words = set(_WORD.findall(plain)) - _LITTLE_WORDS
    return frozenset([w[:-1] if len(w) > 3 and w[-1] == "s" else w for w in words])


class Journal:
    """The answers so far: a file of one JSON object a line, `{"call", "settings", "answer"}`."""

    def __init__(self, path: Path, settings: str) -> None:
        """Opens nothing yet.

        Args:
          path: the file.
          settings: hash of what was asked; answers to other questions are refused.
        """
        self._path = path
        self._settings = settings
        self._file: BinaryIO | None = None

    def read(self) -> dict[int, str]:
        """Returns the answers by the number of their calls.

        A last line that is not whole is passed over: a run was killed while it wrote it.

        Raises:
          UserError: the file cannot be read, is damaged, or belongs to other settings.
        """
        return self._read()[0]

    def open(self) -> dict[int, str]:
        """Opens the file to append to it, for this process alone; returns the answers in it.

        Raises:
          UserError: as `read`, or it cannot be written, or another run writes to it.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            answers, size = self._read()
            self._file.truncate(size)
        except BlockingIOError:
            self.close()
            raise UserError(f"{self._path}: another run is asking for captions: wait") from None
        except OSError as error:
            self.close()
            raise self._cannot_write(error) from error
        except UserError:
            self.close()
            raise
        return answers

    def append(self, call: int, answer: str) -> None:
        """Adds an answer; it is on the disk when this returns.

        Raises:
          UserError: it cannot be written.
        """
        assert self._file is not None
        entry = {"call": call, "settings": self._settings, "answer": answer}
        try:
            self._file.write(json.dumps(entry).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._cannot_write(error) from error

    @property
    def closed(self) -> bool:
        """Whether nothing can be appended."""
        return self._file is None

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _cannot_write(self, error: OSError) -> UserError:
        return UserError(f"{self._path}: cannot be written: {error.strerror}")

    def _read(self) -> tuple[dict[int, str], int]:
        """Returns the answers and the size of the lines that hold them."""
        try:
            lines = self._path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return {}, 0
        except OSError as error:
            raise UserError(f"{self._path}: cannot be read: {error.strerror}") from error
        answers: dict[int, str] = {}
        size = 0
        # What follows the last line's end is no line, or one that was not written to its end.
        for number, line in enumerate(lines[:-1], start=1):
            entry = _entry(line)
            if entry is None:
                if number == len(lines) - 1:
                    break
                raise UserError(
                    f"{self._path}:{number}: the line is damaged: restore the file, or delete the "
                    "line to ask that call again"
                )
            call, settings, answer = entry
            if settings != self._settings:
                raise UserError(
                    f"{self._path}: holds answers to another model, temperature or prompt: restore "
                    "captions.llm, or choose another output_dir"
                )
            answers.setdefault(call, answer)
            size += len(line) + 1
        return answers, size


def _entry(line: bytes) -> tuple[int, str, str] | None:
    try:
        entry = json.loads(line)
        call, settings, answer = entry["call"], entry["settings"], entry["answer"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    if type(call) is not int or not isinstance(settings, str) or not isinstance(answer, str):
        return None
    return call, settings, answer


class LLMCaptions:
    """Asks a chat server for captions, in the background and ahead of the pictures.

    Threads ask for as many captions as were wanted so far, and `ahead` more; never for more than
    the run has candidates.
    """

    def __init__(
        self,
        config: LLMConfig,
        journal: Path,
        *,
        seed: int,
        total: int,
        wait: Callable[[float], object] | None = None,
    ) -> None:
        """Reads the journal; asks nothing yet.

        Args:
          config: the server, and what it is asked.
          journal: the file of answers.
          seed: the run's.
          total: how many captions the run needs.
          wait: waits between two attempts for so many seconds (`ChatServer`); None: really.

        Raises:
          UserError: the journal cannot be used.
        """
        self._config = config
        self._seed = seed
        self._total = total
        self._prompt = prompt(config)
        asked = json.dumps([config.model, config.temperature, self._prompt])
        settings = hashlib.blake2b(asked.encode(), digest_size=8).hexdigest()
        self._journal_path = journal
        self._journal = Journal(journal, settings)
        self._stop = threading.Event()
        self._wait = wait or self._stop.wait
        self._server: ChatServer | None = None
        self._threads: list[threading.Thread] = []
        # Guards all that follows, and tells of every change.
        self._changed = threading.Condition()
        self._wanted = 0  # captions
        self._in_flight: set[int] = set()  # calls
        self._failure: BaseException | None = None
        self._load(self._journal.read())

    @property
    def rejects(self) -> Mapping[str, int]:
        """How many lines were no caption or a near-duplicate so far."""
        with self._changed:
            return dict(self._rejects)

    def __enter__(self) -> Self:
        """Starts to ask, unless all captions are there.

        Raises:
          UserError: the key's variable is not set, or the journal cannot be written.
        """
        if self.complete(self._total):
            return self
        self._server = ChatServer(self._config, self._wait)
        self._load(self._journal.open())
        self._threads = [
            threading.Thread(target=self._work, name=f"captions-{number}", daemon=True)
            for number in range(self._config.concurrency)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends the threads. Calls in flight have five seconds to come back and be written down."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        deadline = time.monotonic() + _GRACE
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._changed:
            self._journal.close()
        # A thread that still waits for the server ends with the process; its answer is not used.
        if self._server is not None and not any(thread.is_alive() for thread in self._threads):
            self._server.close()

    def complete(self, count: int) -> bool:
        """Whether the journal has the first `count` captions."""
        with self._changed:
            return len(self._distinct.captions) >= count

    def captions(self, indices: Sequence[int]) -> list[Caption]:
        """Returns one caption for each global index; waits until they exist.

        Raises:
          UserError: the server failed for good, before these captions were there.
        """
        count = max(indices, default=-1) + 1
        with self._changed:
            if count > self._wanted:
                self._wanted = count
                self._changed.notify_all()
            have = self._distinct.captions
            while len(have) < count:
                if self._failure is not None:
                    raise self._failure
                if self._stop.is_set() or not self._threads:
                    raise RuntimeError("captions are made within the source's `with` block alone")
                self._changed.wait()
            return [have[index] for index in indices]

    def _load(self, answers: dict[int, str]) -> None:
        self._answers = answers
        self._read_calls = 0  # calls 0 ... read_calls - 1 have been read
        self._distinct = DistinctCaptions()
        self._rejects: Counter[str] = Counter()
        self._off_form = self._repeating = 0
        self._read_answers()
        self._off_form = self._repeating = 0  # a run that goes on gets new patience

    def _read_answers(self) -> None:
        """Reads the captions of all answers whose turn it is."""
        while (answer := self._answers.pop(self._read_calls, None)) is not None:
            self._read_calls += 1
            formed = added = 0
            for line in answer_lines(answer):
                try:
                    caption = parse_line(line)
                except ValueError:
                    self._rejects["off_form"] += 1
                    continue
                formed += 1
                if self._distinct.add(caption):
                    added += 1
                else:
                    self._rejects["near_duplicate"] += 1
            self._off_form = 0 if formed else self._off_form + 1
            self._repeating = 0 if added else self._repeating + 1
            self._last_answer = answer

    def _work(self) -> None:
        """Asks until all is there or the run ends: the body of a thread."""
        assert self._server is not None
        while (call := self._next_call()) is not None:
            try:
                # 31 bits: what all servers take.
                seed = picture_seed(self._seed, call) >> 32
                self._accept(call, self._server.ask(self._prompt, SCHEMA, seed))
            except Stopped:
                return
            except UserError as error:
                self._fail(
                    UserError(
                        f"{error}. {self._journal_path} keeps the answers so far: the same command "
                        "goes on from there"
                    )
                )
            except Exception as error:  # a defect: raised in the thread that wants the captions
                self._fail(error)

    def _next_call(self) -> int | None:
        """Waits until another call is needed; None if no more are to be made."""
        with self._changed:
            while not self._stop.is_set() and self._failure is None:
                coming = len(self._in_flight) + len(self._answers)
                expected = len(self._distinct.captions) + coming * self._config.captions_per_call
                if expected < min(self._total, self._wanted + self._config.ahead):
                    call = self._read_calls
                    while call in self._in_flight or call in self._answers:
                        call += 1
                    self._in_flight.add(call)
                    return call
                self._changed.wait()
            return None

    def _accept(self, call: int, answer: str) -> None:
        with self._changed:
            if self._journal.closed:
                return
            self._journal.append(call, answer)
            self._in_flight.discard(call)
            self._answers[call] = answer
            self._read_answers()
            if self._off_form >= _OFF_FORM_CALLS:
                raise UserError(
                    f"captions.llm: {self._off_form} answers in a row hold no caption of the form "
                    f'"A photo of a [object], ...", such as {self._last_answer[:80]!r}: '
                    "choose another model"
                )
            if self._repeating >= _REPEATING_CALLS:
                raise UserError(
                    f"captions.llm: {self._repeating} answers in a row hold no new caption after "
                    f"{len(self._distinct.captions)} of them: raise temperature or "
                    "captions_per_call, or choose another model, in another output_dir"
                )
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()
