"""Replacing personal data by placeholders before a text leaves, and putting it back into what returns."""

from __future__ import annotations

import json
import re
import threading
from bisect import insort
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from agora.errors import InvalidRequest
from graphs.departure.kinds import KINDS
from graphs.departure.lookalikes import end_of, plain

Found = tuple[int, int, str]
"""Where something stands, and of which kind it is."""

_Literal = tuple[int, int, tuple[str, int]]

_LITERAL: Final = "text"
"""The kind of what looks like a placeholder in use, in a text where it is none: it is replaced, too, so that what comes
back is not mistaken for it."""

_NAMES: Final = "|".join(
    sorted((k.upper().replace("_", r"\\?[_ -]?") for k in (*KINDS, _LITERAL)), key=len, reverse=True)
)

_LOOSE: Final = re.compile(
    rf"<(?:{_NAMES})_\d{{1,6}}>"
    # Models write it as [email_1], (Email 1), &lt;EMAIL_1&gt;, \<EMAIL\_1\> ...
    rf"|(?:&lt;|\\<|[<\[({{«])\s?(?:{_NAMES})\\?[_ -]?\d{{1,6}}\s?(?:&gt;|\\>|[>\])}}»])"
    # ... or bare, which needs the underscore: "email 1" may mean something else.
    rf"|(?<![A-Za-z0-9_])(?:{_NAMES})\\?_\d{{1,6}}(?![A-Za-z0-9_])",
    # ASCII alone: what other letters and digits are held to be alike could not be read as a kind and a number.
    re.IGNORECASE | re.ASCII,
)

_WORD: Final = re.compile(r"\w+")

_PARTS: Final = re.compile(r"&lt;|&gt;|[^A-Za-z0-9]")

_CANONICAL: Final[Mapping[str, str]] = {k.upper().replace("_", ""): k.upper() for k in (*KINDS, _LITERAL)}

_NO_NAMES: Final = frozenset(
    ["Sir", "Madam", "Mr", "Mrs", "Ms", "Mx", "Miss", "Dr", "Prof", "Herr", "Frau", "The", "And"]
)
"""Words in capitals next to names that are none."""

MIN_NAME_CHARS: Final = 3
"""Letters of a part of a name that is replaced where it stands alone: shorter ones are too often something else."""

MIN_LINE_CHARS: Final = 8
"""Characters of a line of a value that is replaced where it stands alone: a text that is shortened may keep one line
of a key, and shorter ones give little away."""


def _canonical(loose: str) -> tuple[str, int]:
    """The kind, in capitals, and the number of what looks like a placeholder."""
    plain = _PARTS.sub("", loose).upper()
    kind = plain.rstrip("0123456789")
    return _CANONICAL[kind], int(plain[len(kind) :])


class Vault:
    """What stands for what, within one run: the same value always has the same placeholder.

    It never leaves this process, and is forgotten with the run.

    Attributes:
        lock: Held while a text is redacted: long ones are in threads.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._known: dict[str, tuple[str, str]] = {}
        self._numbers: Counter[str] = Counter()
        # By the first word of a value: how far into the value it begins, and less the value's length; in this order.
        self._shapes: dict[str, list[tuple[int, int]]] = {}

    def placeholder(self, kind: str, value: str, taken: Collection[tuple[str, int]] = ()) -> str:
        """What stands for that value.

        Args:
            kind: Of which kind it is, if it is new.
            value: It.
            taken: Kinds and numbers that a new placeholder must not have.
        """
        if value not in self._known:
            name = kind.upper()
            self._numbers[name] += 1
            while (name, self._numbers[name]) in taken:
                self._numbers[name] += 1
            self._known[value] = (kind, f"<{name}_{self._numbers[name]}>")
            if (first := _WORD.search(value)) is not None:
                shapes, shape = self._shapes.setdefault(first[0], []), (first.start(), -len(value))
                if shape not in shapes:
                    insort(shapes, shape)
        return self._known[value][1]

    def known_in(self, text: str) -> Iterable[Found]:
        """Where values stand that were replaced before in this run, also where no rule would find them."""
        if not self._known:
            return
        end = 0
        for word in _WORD.finditer(text):
            # Of those that may begin here, the longest.
            for before, negative in self._shapes.get(word[0], ()):
                start = word.start() - before
                stop = start - negative
                if start < end or stop > len(text):
                    continue
                known = self._known.get(text[start:stop])
                if known is not None and _whole(text, start, stop):
                    yield start, stop, known[0]
                    end = stop
                    break


@dataclass(frozen=True, slots=True)
class Redacted:
    """A text without personal data, as far as it was found.

    Attributes:
        text: What may leave.
        replaced: Placeholder by what it stands for, of this text alone.
    """

    text: str
    replaced: Mapping[str, str]

    @property
    def told(self) -> str:
        """What was replaced, in words: `2 email, 1 phone`."""
        kinds = Counter(p[1:-1].rpartition("_")[0].lower() for p in self.replaced)
        return ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in kinds.items() if kind != _LITERAL) or "nothing"

    def restore(self, text: str) -> str:
        """A text that came back, with the real values.

        Placeholders are known by other brackets, another case, or none, as models change them. Those that did not
        leave with this text stay as they are: whoever made them up learns nothing by it.
        """
        if not self.replaced:
            return text
        restored = _LOOSE.sub(self._value, text)
        if restored != text and _is_json(text) and not _is_json(restored):
            # A line break or a backslash within a value: JSON must stay JSON.
            return _LOOSE.sub(lambda m: json.dumps(self._value(m), ensure_ascii=False)[1:-1], text)
        return restored

    def _value(self, m: re.Match[str]) -> str:
        kind, number = _canonical(m[0])
        return self.replaced.get(f"<{kind}_{number}>", m[0])


class Redactor:
    """Replaces what the rules of `graphs.departure.kinds` find.

    Args:
        kinds: Which kinds of personal data; see `KINDS`.

    Raises:
        InvalidRequest: If there is no such kind.
    """

    def __init__(self, kinds: Iterable[str] = tuple(KINDS)) -> None:
        wanted = tuple(kinds)
        for kind in wanted:
            if kind not in KINDS:
                raise InvalidRequest(
                    f"there is no kind of personal data {kind!r}; allowed: {', '.join(KINDS)}",
                    hint="see graphs.departure.kinds for what each finds",
                )
        self._finders = {k: KINDS[k] for k in KINDS if k in wanted}

    def redact(self, text: str, vault: Vault) -> Redacted:
        """The text with placeholders like `<EMAIL_1>` in place of personal data.

        Args:
            text: What is about to leave.
            vault: What this run has replaced before.
        """
        with vault.lock:
            return self._redacted(text, vault)

    def learn(self, text: str, vault: Vault) -> None:
        """Takes note of the personal data in a text of which parts may leave, so that it is known in all of them.

        Args:
            text: The whole of it.
            vault: What this run has replaced before.
        """
        with vault.lock:
            self._learnt(text, vault, _literal(text))

    def _learnt(self, text: str, vault: Vault, literal: Sequence[_Literal]) -> list[Found]:
        taken = {canonical for _, _, canonical in literal}
        found = self._found(text)
        for a, b, kind in found:
            vault.placeholder(kind, text[a:b], taken)
            for part in _parts(kind, text[a:b]):
                vault.placeholder(kind, part, taken)
        return found

    def _redacted(self, text: str, vault: Vault) -> Redacted:
        literal = _literal(text)
        taken = {canonical for _, _, canonical in literal}
        found = _merged([*self._learnt(text, vault, literal), *vault.known_in(text)])
        used = {vault.placeholder(kind, text[a:b], taken) for a, b, kind in found}
        clashing = [(a, b, _LITERAL) for a, b, (kind, number) in literal if f"<{kind}_{number}>" in used]
        replaced: dict[str, str] = {}
        parts: list[str] = []
        at = 0
        for a, b, kind in _merged([*found, *clashing]) if clashing else found:
            value = text[a:b]
            placeholder = vault.placeholder(kind, value, taken)
            replaced[placeholder] = value
            parts += (text[at:a], placeholder)
            at = b
        return Redacted("".join((*parts, text[at:])), replaced)

    def _found(self, text: str) -> list[Found]:
        read, at = plain(text)
        found = ((a, b, kind) for kind, find in self._finders.items() for a, b in find(read))
        return _merged((at[a], end_of(text, at[b - 1] + 1), kind) for a, b, kind in found if a < b)


def _is_json(text: str) -> bool:
    """Whether a text is a JSON object or list."""
    if text.lstrip()[:1] not in ("{", "["):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _literal(text: str) -> list[_Literal]:
    """What looks like a placeholder in a text where it is none."""
    return [(m.start(), m.end(), _canonical(m[0])) for m in _LOOSE.finditer(text)]


def _merged(found: Iterable[Found]) -> list[Found]:
    """Places that overlap made one, of the kind that comes first: no part of any of them may be left."""
    merged: list[Found] = []
    for a, b, kind in sorted(found):
        if merged and a < merged[-1][1]:
            start, end, other = merged[-1]
            merged[-1] = (start, max(b, end), min(kind, other, key=_RANK.__getitem__))
        elif a < b:
            merged.append((a, b, kind))
    return merged


_RANK: Final[Mapping[str, int]] = {k: n for n, k in enumerate((*KINDS, _LITERAL))}


def _parts(kind: str, value: str) -> list[str]:
    """The parts of a value that tell of it where they stand alone: those of a name, and the lines of a long key."""
    if kind == "name":
        return [w for w in value.split() if len(w) >= MIN_NAME_CHARS and w not in _NO_NAMES]
    lines = [line.strip() for line in value.splitlines()]
    return [line for line in lines if len(line) >= MIN_LINE_CHARS and line != value]


def _whole(text: str, start: int, end: int) -> bool:
    """Whether what stands there is not a part of a longer word or number."""
    before = text[start].isalnum() and start > 0 and _WORD.match(text, start - 1) is not None
    after = text[end - 1].isalnum() and _WORD.match(text, end) is not None
    return not before and not after
