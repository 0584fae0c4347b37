"""An answer's text, token by token, and where a stop string ends it: a function of the tokens alone.

Who drives a session and who reads it each feed the tokens to one of their own and come to the same end, on whatever
gateway, and however the tokens were cut into blocks. The end is where vLLM ends an answer that grows by a token at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from shared.protocol import FinishReason, GenerationParams, Tokens
from shared.text import StopStrings


class TextDecoder(Protocol):
    """Tokens to text, piece by piece: `push` gives the text that is certain now, `flush` what is left over."""

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens complete."""
        ...

    def flush(self) -> str:
        """What no further token will complete."""
        ...


@dataclass(frozen=True, slots=True)
class Ending:
    """What may end a text: strings, once more than `min_tokens` tokens are there. `included` shows what has ended it."""

    strings: tuple[str, ...] = ()
    included: bool = False
    min_tokens: int = 0

    @classmethod
    def of(cls, params: GenerationParams, *, included: bool = False) -> Ending:
        """The ending that `params` ask for."""
        return cls(params.stop, included, params.sampling.min_tokens)


NO_ENDING: Final = Ending()


class AnswerText:
    """The text of an answer as its tokens come. Nothing is shown that may yet turn out to belong to a stop string."""

    def __init__(self, decoder: TextDecoder, ending: Ending = NO_ENDING) -> None:
        self._decoder: Final = decoder
        self._ending: Final = ending
        self._stops: Final = StopStrings(ending.strings, included=ending.included)
        self._count = 0

    @property
    def stop(self) -> str | None:
        """The stop string that has ended it."""
        return self._stops.found

    def push(self, token: int) -> str:
        """What may be shown now that `token` has come."""
        self._count += 1
        text = self._decoder.push((token,))
        return self._stops.push(text, counts=self._count > self._ending.min_tokens)

    def push_last(self, token: int) -> str:
        """`push` for a token that ends the sequence: no part of the text unless the ending is to be shown."""
        return self.push(token) if self._ending.included else ""

    def flush(self) -> str:
        """What is left over at the end."""
        return "" if self.stop is not None else self._stops.flush() + self._decoder.flush()

    def ends_within(self, tokens: Tokens, reason: FinishReason | None) -> int | None:
        """How many of the next `tokens` belong to the answer, if a stop string is complete within them.

        `reason` is why the target ended there, if it did: with "stop" the last token ended the sequence.
        """
        for number, token in enumerate(tokens, 1):
            if number == len(tokens) and reason is FinishReason.STOP:
                self.push_last(token)
            else:
                self.push(token)
            if self.stop is not None:
                return number
        return None
