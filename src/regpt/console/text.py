"""Text as a console can show it: control characters escaped, long quotations shortened; counts, figures, durations."""

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
    quoted = QUOTED.sub(lambda found: elided(found[0], LONGEST_QUOTE), shown)
    return elided(quoted, LONGEST_MESSAGE)


def without_user(text: str) -> str:
    """`text` without the user and the password of the addresses in it."""
    return USER.sub("", text)


def elided(text: str, length: int) -> str:
    """`text`, or its beginning and its end with "…" between them, `length` characters in all."""
    if len(text) <= length:
        return text
    end = length // 3
    return f"{text[: length - end - 1]}…{text[-end:]}"


def counted(n: int, noun: str, plural: str = "") -> str:
    """`1 document`, `2,000 documents`."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


# ---- figures


PREFIXES = ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def figure(value: float) -> str:
    """Three significant digits without an exponent: 0.0123, 1.23, 123, 1,230."""
    rounded = float(f"{value:.3g}")
    power = int(f"{rounded:e}".partition("e")[2])
    return f"{rounded:,.{max(0, 2 - power) if rounded else 0}f}"


def split_si(value: float) -> tuple[str, str]:
    """Three digits and the prefix: (`124`, `M`); a billion is `B`, as papers of this field count tokens."""
    rounded = float(f"{value:.3g}")
    for scale, prefix in PREFIXES:
        if abs(rounded) >= scale:
            return figure(rounded / scale), prefix
    text = figure(rounded)
    return text.rstrip("0").rstrip(".") if "." in text else text, ""


def si(value: float, unit: str = "") -> str:
    """124439808 → `124M`, 1500 → `1.50k`, 12 → `12`; with a unit `854 MFLOP`, `1.50 GFLOP`."""
    number, prefix = split_si(value)
    return f"{number} {prefix.replace('B', 'G')}{unit}" if unit else number + prefix


def duration(seconds: float) -> str:
    """The two units that matter: `92 ms`, `45 s`, `1 min 32 s`, `2 h 05 min`, `3 d 4 h`."""
    if seconds < 9.95:
        return "0 s" if seconds == 0 else f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"
