"""Regular expressions in files of others, which are matched against every module name by an engine that backtracks."""

import re

MAX_LENGTH = 1000
# Each repeat multiplies the ways to match a name of some 60 characters by up to its length; four of them cost seconds
# over all modules of the largest models, five minutes.
MAX_REPEATS = 4

_PLAIN = re.compile(r"[\w.\-]*")
# escape, character class, group opening, repeat (with its lazy or possessive mark), anything else
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\\\]])*\]|\(\?\S?|(?:[*+?]|\{\d*,?\d*\})[?+]?|.", re.DOTALL)
_REPEAT = re.compile(r"[*+?{].*", re.DOTALL)
_OPENINGS = ("(?:", "(?=", "(?!", "(?<", "(?P")


def is_name(pattern: str) -> bool:
    """Whether it is a plain (part of a) module's name."""
    return _PLAIN.fullmatch(pattern) is not None


def pattern_problem(pattern: str) -> str | None:
    """Why `pattern` is refused, or None.

    Let through is what names need: at most `MAX_REPEATS` repeats, none of a group (other than `(...)?`), so that the
    time to match grows at most with that power of a name's length.
    """
    if is_name(pattern):
        return None
    if len(pattern) > MAX_LENGTH:
        return f"{len(pattern)} characters, allowed {MAX_LENGTH}"
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"not a regular expression ({error})"
    tokens = _TOKEN.findall(pattern)
    if flags := [token for token in tokens if token.startswith("(?") and token not in _OPENINGS]:
        return f"{flags[0]!r}, allowed are {', '.join(_OPENINGS)}"
    repeats = [i for i, token in enumerate(tokens) if _REPEAT.fullmatch(token)]
    if any(tokens[i - 1] == ")" and not tokens[i].startswith("?") for i in repeats):
        return "a repeated group"
    if len(repeats) > MAX_REPEATS:
        return f"{len(repeats)} repeats, allowed {MAX_REPEATS}"
    return None
