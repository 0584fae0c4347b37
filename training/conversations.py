"""Which conversations the target is made to hold with itself: openings of user turns, lengths, temperatures.

A stream is a list of segments. Each begins with forced tokens (a turn's header, an opening such as "Translate German
to English: ") and goes on with what the target samples, until it ends the turn or a limit does. Most user turns have
no opening at all. The openings are generic; none is taken from a benchmark's prompts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

END_OF_TURN: Final = "<|im_end|>"
USER: Final = "<|im_start|>user\n"
ASSISTANT: Final = f"{END_OF_TURN}\n<|im_start|>assistant\n"
NEXT_USER: Final = f"{END_OF_TURN}\n{USER}"
DEFAULT_SYSTEM: Final = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
)


class Role(IntEnum):
    """Who a token of a stream comes from."""

    FORCED = 0
    USER = 1
    GREEDY = 2
    SAMPLED = 3


@dataclass(frozen=True, slots=True)
class Segment:
    """Forced `prefix`, then between `least` and `most` sampled tokens."""

    prefix: str
    role: Role
    temperature: float
    least: int = 0
    most: int = 400


ANSWER_TEMPERATURES: Final = ((0.0, 0.62), (0.4, 0.1), (0.7, 0.14), (1.0, 0.14))
USER_TEMPERATURES: Final = ((0.6, 0.3), (0.8, 0.45), (1.0, 0.25))
DOCUMENT_TEMPERATURES: Final = ((0.4, 0.25), (0.55, 0.4), (0.7, 0.35))

LANGUAGES: Final = (
    *("German",) * 6,
    *("French", "Spanish") * 2,
    *("Italian", "Portuguese", "Dutch", "Latin", "Chinese", "Japanese", "Russian"),
)
STARTS: Final = (
    *("What is", "What are", "How do", "How can", "How does", "Why", "Who", "When", "Where", "Which"),
    *("Can you", "Could you", "Please", "Explain", "Describe", "Write", "Create", "Give me", "List", "I"),
    *("I'm", "I need", "My", "Imagine", "Suppose", "Compare", "Discuss", "Design", "Develop", "Tell me"),
    *("Act as", "Pretend to be", "You are", "Draft", "Rewrite", "Summarize", "Provide", "Analyze", "In"),
    *("Compose a", "Help me", "Hi", "Hello", "Is it", "Are", "Does", "The", "Given", "Edit", "Extract"),
)
QUESTIONS: Final = (
    *(
        "who played",
        "who sang",
        "who wrote",
        "who was the first",
        "who is the",
        "who won the",
        "who invented",
    ),
    *(
        "when did",
        "when was the",
        "when is the",
        "where is",
        "where was",
        "where does",
        "what is the name of",
    ),
    *("what year did", "what does", "what is the", "what was the", "which country", "how many", "how long"),
    *("how old is", "in which", "name the", "is the", "what kind of"),
)
NAMES: Final = (
    *("Anna", "Ben", "Carla", "David", "Elena", "Frank", "Grace", "Henry", "Ivy", "James", "Karen", "Leo"),
    *("Maria", "Nick", "Olga", "Paul", "Rosa", "Sam", "Tina", "Victor", "Wendy", "A farmer", "A store"),
    *("A teacher", "A train", "A baker", "There are", "If", "The price of", "A class of"),
)
PROBLEM_VERBS: Final = (" has", " buys", " is", " wants to", " needs", " earns", " sells", " made", "")
PROBLEM_LEADS: Final = ("", "", "", "", "Solve this problem step by step: ", "Problem: ", "Calculate: ")
CODE: Final = (
    *("Write a Python function", "Write a Python program", "Write a function that", "Implement"),
    *("Write a SQL query", "Write an HTML page", "Fix this code:\n", "Write a script"),
)
SUMMARY_LEADS: Final = (
    *(
        "Summarize: ",
        "Summarize the following text: ",
        "Summarize this article:\n\n",
        "Give a short summary of: ",
    ),
    *("Sum up the main points of this report:\n\n", "TL;DR: "),
)
DOCUMENT_STARTS: Final = (
    *("", "", "The", "A", "In", "(CNN) ", "LONDON — ", "It was", "After", "Police", "Scientists", "When"),
    *("According to", "Researchers", "On Monday", "The history of", "One of", "President", "As"),
)
PASSAGE_LEADS: Final = (
    *("", "", "", "Read this passage and answer the question.\n\n", "Context: ", "Use these references:\n\n"),
)
PASSAGE_QUESTIONS: Final = (
    *("\n\nQuestion: ", "\nQuestion: ", "\n\nAnswer this question: ", "\n", " ", "\n\nBased on the text, "),
)
FOLLOW_UPS: Final = (
    *("", "", "", "", "Now", "Rewrite", "Can you", "What", "Why", "How", "Take your previous", "Make it"),
    *("Do the same", "Give another", "Explain", "Thanks", "Could you", "Translate", "Summarize", "Is"),
)


def _weighted(rng: random.Random, choices: Sequence[tuple[float, float]]) -> float:
    values, weights = zip(*choices, strict=True)
    chosen: float = rng.choices(values, weights)[0]
    return chosen


def _user(
    rng: random.Random,
    header: str,
    opening: str,
    least: int = 0,
    most: int = 160,
    temperatures: Sequence[tuple[float, float]] = USER_TEMPERATURES,
) -> list[Segment]:
    return [Segment(header + opening, Role.USER, _weighted(rng, temperatures), least, most)]


def _plain(rng: random.Random, header: str) -> list[Segment]:
    opening = "" if rng.random() < 0.6 else rng.choice(STARTS)
    return _user(rng, header, opening)


def _question(rng: random.Random, header: str) -> list[Segment]:
    opening = rng.choice(QUESTIONS)
    return _user(rng, header, opening.capitalize() if rng.random() < 0.5 else opening, 2, 30)


def _problem(rng: random.Random, header: str) -> list[Segment]:
    opening = rng.choice(PROBLEM_LEADS) + rng.choice(NAMES) + rng.choice(PROBLEM_VERBS)
    return _user(rng, header, opening, 8, 120)


def _translation(rng: random.Random, header: str) -> list[Segment]:
    language = rng.choice(LANGUAGES)
    opening = rng.choice(
        (
            f"Translate {language} to English: ",
            f"Translate {language} to English: ",
            f"Translate this {language} sentence into English:\n",
            f"Translate from {language} to English: ",
            f"What does this {language} text mean? ",
            f"Translate English to {language}: ",
        )
    )
    return _user(rng, header, opening, 6, 90)


def _code(rng: random.Random, header: str) -> list[Segment]:
    return _user(rng, header, rng.choice(CODE), 4, 120)


def _quoted(rng: random.Random, header: str, document: str) -> list[Segment]:
    """A turn about a text that the target wrote before."""
    if rng.random() < 0.5:
        return [Segment(header + rng.choice(SUMMARY_LEADS) + document, Role.USER, 0.0, 0, 0)]
    question = rng.choice(PASSAGE_QUESTIONS) + rng.choice(QUESTIONS)
    return [Segment(header + rng.choice(PASSAGE_LEADS) + document + question, Role.USER, 0.7, 2, 30)]


def _document(rng: random.Random, header: str, least: int, most: int) -> list[Segment]:
    length = rng.randint(least, most)
    opening = rng.choice(DOCUMENT_STARTS)
    if rng.random() < 0.5:
        lead = rng.choice(SUMMARY_LEADS)
        return _user(rng, header, lead + opening, length, length + 40, DOCUMENT_TEMPERATURES)
    lead = rng.choice(PASSAGE_LEADS)
    passage = _user(rng, header, lead + opening, length, length, DOCUMENT_TEMPERATURES)
    question = rng.choice(PASSAGE_QUESTIONS) + rng.choice(QUESTIONS)
    return [*passage, Segment(question, Role.USER, 0.7, 2, 30)]


def _answer(rng: random.Random) -> Segment:
    temperature = _weighted(rng, ANSWER_TEMPERATURES)
    role = Role.GREEDY if temperature == 0 else Role.SAMPLED
    return Segment(ASSISTANT, role, temperature, 1, 400 if role is Role.SAMPLED else rng.choice((256, 400)))


Opening = Callable[[random.Random, str], list[Segment]]
SHORT: Final[tuple[tuple[Opening, float], ...]] = (
    (_plain, 0.46),
    (_question, 0.14),
    (_problem, 0.13),
    (_translation, 0.13),
    (_code, 0.04),
    (lambda rng, header: _document(rng, header, 80, 260), 0.10),
)
LONG_DOCUMENT: Final = (300, 1000)


def conversation(
    rng: random.Random, *, length: int, long: bool, documents: Sequence[str] = ()
) -> list[Segment]:
    """A stream of at least `length` tokens: some turns of one user, then of the next, as segments.

    `long` begins with a document of several hundred tokens: one to three of `documents` (earlier answers), or one that
    the target makes up in the user's name.
    """
    segments: list[Segment] = []
    reserved = 0
    system = DEFAULT_SYSTEM if rng.random() < 0.9 else ""
    while reserved < length:
        header = system + USER if not segments else NEXT_USER
        if long and not segments and documents and rng.random() < 0.8:
            user = _quoted(
                rng, header, "\n\n".join(rng.sample(documents, min(len(documents), rng.randint(1, 3))))
            )
        elif long and not segments:
            user = _document(rng, header, *LONG_DOCUMENT)
        elif segments and rng.random() < 0.4:
            user = _user(rng, header, rng.choice(FOLLOW_UPS))
        else:
            opening = rng.choices([kind for kind, _ in SHORT], [weight for _, weight in SHORT])[0]
            user = opening(rng, header)
        turn = [*user, _answer(rng)]
        segments += turn
        reserved += sum(segment.least + 6 for segment in turn)
        if len(segments) >= 24:
            break
    segments.append(Segment(NEXT_USER, Role.USER, 0.9, 0, length))
    return segments
