"""Text as a console can show it: control characters escaped, long quotations shortened, counts with their noun."""

import re

# C0 without line break and tab, DEL, C1, lone surrogates, and what reorders a line (bidi, Unicode TR 36 section 2.2).
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
QUOTED = re.compile(r"""(?<!\w)(?:'[^'\n]{201,}'|"[^"\n]{201,}")(?!\w)""")
USER = re.compile(r"(?<=://)[^/?#\s'\"]*@")  # user and password of an address
LONGEST_QUOTE, LONGEST_MESSAGE = 200, 1500


def visible(text: str) -> str:
    r"""`text` with control characters other than line break and tab as `\x1b`, `\u202e`; the rest as it is."""
    return UNSAFE.sub(lambda found: escaped(ord(found[0])), text)


def escaped(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def message(text: object) -> str:
    """A sentence for a user: visible, without the passwords of addresses; long quotations, and a long sentence itself,
    are shortened in the middle."""
    shown = without_user(visible(str(text)))
    quoted = QUOTED.sub(lambda found: shortened(found[0], LONGEST_QUOTE), shown)
    return shortened(quoted, LONGEST_MESSAGE)


def without_user(text: str) -> str:
    """`text` without the user and the password of the addresses in it."""
    return USER.sub("", text)


def shortened(text: str, length: int) -> str:
    """`text`, or its beginning and its end with "…" between them, `length` characters in all."""
    if len(text) <= length:
        return text
    end = length // 3
    return f"{text[: length - end - 1]}…{text[-end:]}"


def counted(n: int, noun: str, plural: str = "") -> str:
    """`1 document`, `2,000 documents`."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"
