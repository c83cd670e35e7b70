"""A chat server of OpenAI's protocol: one question, one answer, whatever happens on the way.

What can pass is tried again: time-outs, broken connections, half or malformed bodies, and the
statuses 408, 409, 425, 429 and 5xx. In between it waits as long as the server says (`Retry-After`),
and at least 1, 2, 4, ... 60 seconds, each times a random factor in [0.5, 1] that is drawn from the
call's seed. Every other status ends the run at once.

The key comes from an environment variable and leaves this module in the request's header alone: it
is cut out of everything the server says before anyone else sees that.
"""

import json
import os
import random
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import openai

from bootpig_jax.errors import UserError
from data_gen.config import LLMConfig

REDACTED = "[redacted]"

_TRANSIENT = frozenset({408, 409, 425, 429})
_UNSUPPORTED = frozenset({400, 422, 501})  # what servers say to a response_format they do not know
_LONGEST_BACK_OFF = 60.0
_LONGEST_WAIT = 3600.0
_MAX_ANSWER = 200_000  # characters
_SHOWN = 200  # characters of what a server said, in an error
_SECRET_LENGTH = 8  # a shorter "key" is a dummy such as "none", which is also an ordinary word

_HINTS = {
    401: "name the environment variable that holds the key in captions.llm.api_key_env",
    403: "name the environment variable that holds the key in captions.llm.api_key_env",
    404: "check captions.llm.base_url and captions.llm.model",
    400: "adapt captions.llm (json_schema=off, send_seed=false, max_tokens) to the server",
    422: "adapt captions.llm (json_schema=off, send_seed=false, max_tokens) to the server",
}


class Stopped(Exception):
    """The wait between two attempts was cut short because nobody needs the answer any more."""


@dataclass(frozen=True)
class _Failure:
    """An attempt without an answer.

    Attributes:
      reason: what happened, without the key.
      transient: whether another attempt may help.
      status: of the response, None without one.
      retry_after: seconds that the server asks to wait.
    """

    reason: str
    transient: bool = True
    status: int | None = None
    retry_after: float = 0.0


class ChatServer:
    """The server that a configuration names. May be used by several threads at once."""

    def __init__(self, config: LLMConfig, wait: Callable[[float], object]) -> None:
        """Sets up the client; connects to nothing yet.

        Args:
          config: the server and how it is asked.
          wait: waits for so many seconds between two attempts; true if it was told to stop.

        Raises:
          UserError: the key's variable is not set.
        """
        self._config = config
        self._wait = wait
        self._key = _key(config)
        self._schema = config.json_schema != "off"
        self._client = openai.OpenAI(
            base_url=config.base_url,
            # Never None: the client would take OPENAI_API_KEY, which may be another server's.
            api_key=self._key or "none",
            timeout=config.timeout_s,
            max_retries=0,
        )

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def ask(self, prompt: str, schema: Mapping[str, Any], seed: int) -> str:
        """Asks once, in as many attempts as it takes.

        Args:
          prompt: the user's message.
          schema: the JSON schema that the answer should follow where the server has that.
          seed: in [0, 2^31), of the model's sampling and of the waits.

        Returns:
          The answer's text.

        Raises:
          UserError: the server refused, or every attempt failed.
          Stopped: a wait was cut short.
        """
        rng = random.Random(seed)
        failure = _Failure("it was never asked")
        for attempt in range(self._config.attempts):
            if attempt:
                back_off = min(2.0 ** (attempt - 1), _LONGEST_BACK_OFF) * rng.uniform(0.5, 1)
                if self._wait(max(back_off, failure.retry_after)):
                    raise Stopped
            outcome = self._attempt(prompt, schema, seed)
            if isinstance(outcome, str):
                return outcome
            failure = outcome
            if not failure.transient:
                hint = _HINTS.get(failure.status or 0)
                raise UserError(self._error(failure) + (f": {hint}" if hint else ""))
            if failure.retry_after > _LONGEST_WAIT:
                raise UserError(
                    f"{self._error(failure)}: it asks to wait {failure.retry_after:.0f} s"
                )
        raise UserError(f"{self._error(failure)}: gave up after {self._config.attempts} attempts")

    def redact(self, text: str) -> str:
        """Returns `text` without the key, in whatever way it is escaped."""
        if len(self._key) < _SECRET_LENGTH:
            return text
        forms = {self._key, json.dumps(self._key)[1:-1], self._key.replace("/", "\\/")}
        for form in forms | {urllib.parse.quote(self._key, safe="")}:
            text = text.replace(form, REDACTED)
        return text

    def _error(self, failure: _Failure) -> str:
        return self.redact(f"captions.llm: {self._config.base_url}: {failure.reason}")

    def _attempt(self, prompt: str, schema: Mapping[str, Any], seed: int) -> str | _Failure:
        """Returns the answer or why there is none. No exception leaves it: they hold the key."""
        with_schema = self._schema
        outcome = self._request(prompt, schema if with_schema else None, seed)
        if (
            isinstance(outcome, _Failure)
            and outcome.status in _UNSUPPORTED
            and with_schema
            and self._config.json_schema == "auto"
        ):
            self._schema = False
            outcome = self._request(prompt, None, seed)
        return outcome

    def _request(self, prompt: str, schema: Mapping[str, Any] | None, seed: int) -> str | _Failure:
        config = self._config
        arguments: dict[str, Any] = {
            "model": config.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": config.temperature,
        }
        if config.send_seed:
            arguments["seed"] = seed
        if config.max_tokens is not None:
            arguments["max_tokens"] = config.max_tokens
        if schema is not None:
            arguments["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "captions", "strict": True, "schema": schema},
            }
        if not self._key:
            arguments["extra_headers"] = {"Authorization": openai.omit}
        try:
            response = self._client.chat.completions.with_raw_response.create(**arguments)
            return self._answer(response.http_response.json())
        except openai.APIStatusError as error:
            status = error.status_code
            return _Failure(
                f"HTTP {status}: {self._shown(error.response.text)}",
                transient=status in _TRANSIENT or status >= 500,
                status=status,
                retry_after=retry_after(error.response.headers),
            )
        except openai.APITimeoutError:
            return _Failure(f"no answer within {config.timeout_s:g} s")
        except openai.APIConnectionError as error:
            return _Failure(self._shown(str(error.__cause__ or error)))
        except (ValueError, RecursionError):
            return _Failure("the answer is not JSON")

    def _answer(self, body: Any) -> str | _Failure:
        """Takes the text out of a response's body."""
        try:
            choice = body["choices"][0]
            text, reason = choice["message"]["content"], choice.get("finish_reason")
        except (LookupError, TypeError, AttributeError):
            return _Failure(f"not a chat completion: {self._shown(json.dumps(body))}")
        if not isinstance(text, str):
            return _Failure(f"an answer without text: {self._shown(json.dumps(choice))}")
        if len(text) > _MAX_ANSWER:
            return _Failure(f"an answer of {len(text)} characters: set captions.llm.max_tokens")
        if reason == "length":  # cut at max_tokens: the last line is not whole
            text = text.rpartition("\n")[0]
        return self.redact(text)

    def _shown(self, text: str) -> str:
        # Redacted before it is cut: half a key would not be found.
        line = " ".join(self.redact(text).split())
        return "".join(c if c.isprintable() else "?" for c in line[:_SHOWN]) or "no explanation"


def retry_after(headers: Mapping[str, str]) -> float:
    """Returns the seconds that a response asks to wait, 0 if it does not say.

    `Retry-After` holds seconds, or a date (RFC 9110), which is taken relative to the response's own
    `Date`: the two clocks may differ.
    """
    text = headers.get("retry-after", "")
    try:
        seconds = float(text)
    except ValueError:
        try:
            then, now = (parsedate_to_datetime(t) for t in (text, headers.get("date", "")))
            seconds = (then - now).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return seconds if seconds > 0 else 0.0  # also for NaN


def _key(config: LLMConfig) -> str:
    """Returns the server's key, "" if none is to be sent."""
    name = config.api_key_env
    if name is None:
        return ""
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(
            f"captions.llm.api_key_env: the environment variable {name} is not set: "
            "set it to the server's key"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(
            f"captions.llm.api_key_env: what the environment variable {name} holds is no key: "
            "it has spaces, control characters or letters outside of ASCII"
        )
    return key
