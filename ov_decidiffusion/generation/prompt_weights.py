"""How strongly each word of a prompt counts, written with brackets as in AUTOMATIC1111."""

import re
from dataclasses import dataclass
from itertools import groupby

from ov_decidiffusion.arguments import shown

STRONGER, WEAKER = 1.1, 1 / 1.1  # the weights of round brackets and of square ones
MAX_WEIGHT = 10.0
MAX_OPEN = 100
BREAK = "BREAK"  # the text after it starts a new chunk

# An escaped bracket, a bracket, the number that closes round brackets, BREAK as a word, or other text.
# The quantifiers are possessive, so that a mismatch is found in one pass and not by trying every shorter number.
_TOKENS = re.compile(
    r"\\[()\[\]\\]|[(\[\]]|:\s*+([+-]?(?:\d++(?:\.\d++)?|\.\d++))\s*+\)|\)|\bBREAK\b|[^\\()\[\]:B]+|.", re.DOTALL
)
_CLOSES = {")": "(", "]": "["}


@dataclass
class Piece:
    """A part of a prompt.

    Attributes:
        text: the text without brackets; ``BREAK`` if ``starts_chunk``.
        weight: 1 leaves the text as it is, above 1 it counts more, at 0 it has no effect.
        starts_chunk: whether this is no text, but the mark that the text after it starts a new chunk.
    """

    text: str
    weight: float = 1.0
    starts_chunk: bool = False


def parse_weights(prompt: str, name: str = "prompt") -> list[Piece]:
    r"""Split a prompt with brackets into pieces with weights.

    ``(word)`` counts 1.1 times as much, ``[word]`` 1.1 times less, ``(word:1.3)`` 1.3 times as much. The weights of
    nested brackets multiply, ``\(`` is a literal bracket, and a bracket that is never closed reaches to the end. The
    syntax is that of AUTOMATIC1111's stable-diffusion-webui, described in its wiki under "Attention/emphasis".

    Args:
        prompt: one prompt.
        name: the argument's name, for messages.

    Returns:
        the pieces in order, with neighbours of equal weight joined; a single empty one for an empty prompt.

    Raises:
        ValueError: a weight below 0 or above 10, or too deeply nested brackets.
    """
    pieces: list[Piece] = []
    opened: list[tuple[str, int]] = []  # bracket, and the number of pieces before it
    for match in _TOKENS.finditer(prompt):
        token, number = match[0], match[1]
        bracket = "(" if number else _CLOSES.get(token)
        if token in ("(", "["):
            opened.append((token, len(pieces)))
            if len(opened) > MAX_OPEN:
                raise ValueError(f"`{name}` opens more than {MAX_OPEN} brackets within each other: {shown(prompt)}.")
        elif bracket and opened and opened[-1][0] == bracket:
            factor = float(number) if number else (STRONGER if bracket == "(" else WEAKER)
            _multiply(pieces[opened.pop()[1] :], factor)
        elif token == BREAK:
            pieces.append(Piece(BREAK, starts_chunk=True))
        else:
            pieces.append(Piece(token[1:] if token[0] == "\\" and len(token) > 1 else token))
    for bracket, begin in opened:
        _multiply(pieces[begin:], STRONGER if bracket == "(" else WEAKER)
    for piece in pieces:
        if not 0 <= piece.weight <= MAX_WEIGHT:
            raise ValueError(
                f"`{name}` weighs {shown(piece.text)} by {piece.weight:.4g}, and 0 to {MAX_WEIGHT:g} is allowed: "
                r"change the number, write \( for literal brackets, or give prompt_syntax=False."
            )
    return _joined(pieces)


def _multiply(pieces: list[Piece], factor: float) -> None:
    for piece in pieces:
        piece.weight *= factor


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Join neighbours of equal weight, so that words are tokenized whole."""
    joined = []
    for (weight, starts_chunk), group in groupby(pieces, key=lambda piece: (piece.weight, piece.starts_chunk)):
        alike = list(group)
        joined += alike if starts_chunk else [Piece("".join(piece.text for piece in alike), weight)]
    return joined or [Piece("")]
