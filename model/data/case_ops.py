"""Capitals as marks: a lossless transform of text, so that `The`, `the` and `THE` share pieces.

A word that holds capitals is written in small letters behind marks:

    The cat        CAP the cat             a mark stands before the space, so that the piece
    A big RED cat  CAP a big CAPS_red cat  of a space and a word stays whole (_: that space)
    iPhone         i CAP phone

CAP makes the next letter a capital, CAPS all letters of the word, of which it has at least two.
Marks are control characters, which normalization removes from every text: none has to be escaped.

Bytes: a pair of letters takes part only if both have the same length in UTF-8, so each piece stands
for as many bytes of the text as of its small letters, and a mark for none. Pairs that another
letter shares, that normalization would change, or that are newer than Unicode 3.2 (a later Python
might know others) are left as they are.

Source: CaseOps of the parameter-golf records, which keeps the bytes of each token beside the shards
instead.
"""

import re
import unicodedata

CAP, CAPS = "\x01", "\x02"
MARKS = (CAP, CAPS)
LAST = 0x10427  # no capital of Unicode 3.2 that has a small letter lies beyond


def _is_pair(capital: str) -> bool:
    small = capital.lower()
    return (
        unicodedata.ucd_3_2_0.category(capital) == "Lu"
        and len(small) == 1
        and small != capital
        and small.upper() == capital
        and len(small.encode()) == len(capital.encode())
        and all(unicodedata.normalize("NFKC", one) == one for one in (small, capital))
    )


SMALL = {one: one.lower() for one in map(chr, range(LAST + 1)) if _is_pair(one)}
_SMALL = str.maketrans(SMALL)
_CAPITAL = str.maketrans({small: capital for capital, small in SMALL.items()})
_CAPITALS, _SMALLS = (re.escape("".join(letters)) for letters in (SMALL, SMALL.values()))
_LETTERS = _CAPITALS + _SMALLS
# A whole word of capitals, else a single capital: begins with it, which `re` looks for fastest.
_CAPITAL_RUN = re.compile(
    f"[{_CAPITALS}](?:(?<![{_LETTERS}][{_CAPITALS}])[{_CAPITALS}]+(?![{_LETTERS}]))?"
)
_MARKED = re.compile(f"([{CAP}{CAPS}])( ?[{_SMALLS}])([{_SMALLS}]*)|[{CAP}{CAPS}]")


def mark(text: str) -> str:
    """The text with marks and without capitals; it must hold no marks."""
    marked = _CAPITAL_RUN.sub(_marked, text)
    for sign in MARKS:
        marked = marked.replace(f" {sign}", f"{sign} ")
    return marked


def _marked(found: re.Match[str]) -> str:
    letters = found[0]
    return (CAP if len(letters) == 1 else CAPS) + letters.translate(_SMALL)


def unmark(marked: str) -> str:
    """The text whose `mark` is given; marks that stand before no letter are left out."""
    return _MARKED.sub(_unmarked, marked)


def _unmarked(found: re.Match[str]) -> str:
    sign, first, rest = found.groups()
    if sign is None:
        return ""
    return first.translate(_CAPITAL) + (rest.translate(_CAPITAL) if sign == CAPS else rest)
