"""Damage JSON and bytes at random, and always in the same way for the same `random.Random`.

tree = parse('{"a": 1}')
text = write(mutate_json(tree, chance, values))     # not always JSON any more
content = mutate_bytes(content, chance)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from random import Random
from typing import Any


class Pairs(list[tuple[str, Any]]):
    """A JSON object as a list of (key, value), so that a key may be there twice."""


class Raw(str):
    """Text that is written as it is, JSON or not."""


WEIRD: list[Any] = [
    *(Raw(t) for t in ("NaN", "-Infinity", "-0", "1e1", "1E400", "0x1f", "010", "1.", "+1", "'a'", "tru", "", "/*a*/")),
    *(Raw(t) for t in ('"\\ud800"', '"\\u0000"', '"\\u001b[2J"', '"\\/"', '"\\x41"', "9" * 5000, "-" + "9" * 19)),
    *(Raw("[" * n + "]" * n) for n in (2, 20, 3000)),
    *(Raw('{"a":' * n + "1" + "}" * n) for n in (2, 20, 3000)),
    *(-1, 0, 1, 7, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 0.5, -1e-9, 1e308, True, False, None),
    *("", " ", "a", "a\0b", "../a", "/etc/passwd", "{layer}", "{expert}", "%s%n", "\u202eabc", "é\u0301", "a" * 3000),
    *([], [[]], [None], ["a"], [1, 2, 3], Pairs(), Pairs([("a", 1)]), Pairs([("", None)])),
]


def parse(text: str) -> Any:
    """Return JSON with objects as Pairs."""
    return json.loads(text, object_pairs_hook=Pairs)


def write(tree: Any) -> str:
    """Return a tree as text; what is Raw in it as it is."""
    if isinstance(tree, Raw):
        return str(tree)
    if isinstance(tree, dict):
        tree = Pairs(tree.items())
    if isinstance(tree, Pairs):
        return "{" + ", ".join(f"{write(key)}: {write(value)}" for key, value in tree) + "}"
    if isinstance(tree, list):
        return "[" + ", ".join(map(write, tree)) + "]"
    return json.dumps(tree)


def mutate_json(tree: Any, chance: Random, values: Sequence[Any]) -> Any:
    """Return the tree with one to three changes. values: what may stand in place of others, beside WEIRD."""
    root = [tree]
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        _change(root, chance, values)
    return root[0]


def _change(root: list[Any], chance: Random, values: Sequence[Any]) -> None:
    places = list(_places(root))
    owner, i = chance.choice(places)
    key, value = owner[i] if isinstance(owner, Pairs) else (None, owner[i])
    fresh = deepcopy(chance.choice(values if chance.random() < 0.5 else WEIRD))  # a tree must not come to hold itself
    kind = chance.randrange(8)
    if kind == 0 and owner is not root:
        del owner[i]
        return
    if kind == 1 and owner is not root:  # twice, the same or not
        owner.insert(chance.randrange(len(owner) + 1), owner[i] if chance.random() < 0.5 else _item(key, fresh))
        return
    if kind == 2 and key is not None:
        owner[i] = (_text(fresh) if chance.random() < 0.7 else key + chance.choice("_.s\0é"), value)
        return
    if kind == 3:  # something from elsewhere in the tree
        other, j = chance.choice(places)
        fresh = deepcopy(other[j][1] if isinstance(other, Pairs) else other[j])
    elif kind == 4 and type(value) in (int, float):
        fresh = chance.choice(
            [value + 1, value - 1, -value, value * 2, float(value), str(value), [value], value + 2**40]
        )
    elif kind == 5 and isinstance(value, str):
        at = chance.randrange(len(value) + 1)
        fresh = value[:at] + chance.choice(("\0", ".", "/", "\\", "é", " ", "\n", "{", "0", "../")) + value[at:]
    elif kind == 6 and isinstance(value, list):
        fresh = type(value)(value)
        chance.shuffle(fresh)
    elif kind == 7:
        fresh = chance.choice([[value], Pairs([("a", value)])])
    owner[i] = _item(key, fresh)


def _item(key: str | None, value: Any) -> Any:
    return value if key is None else (key, value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(str(value))[:40]


def _places(tree: list[Any]) -> Iterator[tuple[list[Any], int]]:
    for i, item in enumerate(tree):
        yield tree, i
        inner = item[1] if isinstance(tree, Pairs) else item
        if isinstance(inner, list):
            yield from _places(inner)


def each_string_replaced(tree: Any, new: str) -> Iterator[tuple[str, Any]]:
    """Yield (which, the tree) with each string of it, key or value, replaced in turn; always the same tree."""
    for owner, i in list(_places([tree])):
        old = owner[i]
        if isinstance(owner, Pairs):
            key, value = old
            owner[i] = (new, value)
            yield f"key {key!r}", tree
            if isinstance(value, str):
                owner[i] = (key, new)
                yield f"value of {key!r}", tree
        elif isinstance(old, str):
            owner[i] = new
            yield f"item {old!r}", tree
        owner[i] = old


PIECES = [bytes([byte]) for byte in b' 09-",:{}[]#\\\t\n\0\xff'] + [b"1e1", b"null"]


def mutate_bytes(content: bytes, chance: Random) -> bytes:
    """Return content with one to three small changes: a bit, a run, a splice from elsewhere, a piece of syntax."""
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 3))):
        at = chance.randrange(len(changed) + 1)
        kind = chance.randrange(6)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del changed[at : at + chance.randint(1, 12)]
        elif kind == 2:
            changed[at:at] = chance.choice(PIECES)
        elif kind == 3:
            begin = chance.randrange(len(changed) + 1)
            changed[at : at + chance.choice((0, 0, 5))] = changed[begin : begin + chance.randint(1, 60)]
        elif kind == 4:
            digits = [i for i, byte in enumerate(changed) if chr(byte).isdigit()]
            if digits:
                changed[chance.choice(digits)] = ord(chance.choice("0123456789"))
        elif at < len(changed):
            changed[at] = chance.randrange(256)
    return bytes(changed)
