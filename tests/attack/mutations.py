"""Seeded damage to files: values replaced in what was parsed, and bytes changed in what was not."""

from __future__ import annotations

import copy
import json
import random
import re
from typing import Any

HUGE = 10**400
DEEP: list[Any] = []
for _ in range(60):  # the parsers' own limits are tried by text
    DEEP = [DEEP]
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, HUGE),
    *(0.0, -0.0, 0.5, -1.5, 1e-320, 1e18, 1e308, -1e308, float("nan"), float("inf"), float("-inf")),
    *(
        "",
        " ",
        "a",
        "0",
        "1e5",
        "..",
        "/",
        "../../etc/passwd",
        "\0",
        "a\0b",
        "é" * 300,
        "[/]",
        "[red]",
        "\x1b[2J",
        "\n",
    ),
    *("\ud800", "none", "1.jpg", "C:\\x\\1.jpg", "%s", "{}", "x" * 5000),
    *([], {}, [[]], [None], [0, 0, 0, 0], [1e308] * 4, [float("nan")] * 4, [-5, -5, 200, 200], {"id": 1}, DEEP),
]
NUMBERS = ["nan", "inf", "-inf", "1e308", "1e400", "-0", "0", "", "9" * 400, "1e-320", "0x10", "1_000", "1,5", "٣"]
TOKENS = [
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"-",
    b"[",
    b"]",
    b"{",
    b"}",
    b'"',
    b",",
    b":",
    b"\\ud800",
    b"\\u0000",
    b"\xff",
]
TOKENS += [
    b"\0",
    b"\xef\xbb\xbf",
    b"9" * 400,
    b"9" * 5000,
    b"null",
    b"true",
    b"&a",
    b"*a",
    b"!!python/object:os.system ",
]
TOKENS += [b"<", b">", b"&lol;", b"<!DOCTYPE x [<!ENTITY a 'b'>]>", b"\r\n", b"\t", b" ", b"0", b"-1", b"0.5"]


def odd(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(ODD))


def near(rng: random.Random, number: float) -> Any:
    """A number that may pass for the one given: what no syntax refuses, and often no check."""
    return rng.choice(
        [number * 1000, -number, number + 0.5, float(number), number / 1000, number + 1, number - 1, 1e6, 0, 1e-9]
    )


def places(value: Any, depth: int = 0) -> list[tuple[Any, Any]]:
    """Every (container, key or index) in nested lists and dictionaries."""
    keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
    found = [(value, key) for key in keys]
    for key in keys:
        if isinstance(value[key], (dict, list)) and depth < 20:
            found += places(value[key], depth + 1)
    return found


def mutate_value(rng: random.Random, value: Any, changes: int = 3) -> Any:
    """A copy of nested lists and dictionaries with one to ``changes`` changes: replaced, removed, doubled, swapped."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, changes])):
        found = places(value)
        if not found:
            return odd(rng)
        container, key = rng.choice(found)
        what = rng.random()
        current = container[key]
        if what < 0.35 and isinstance(current, (int, float)) and abs(current) < 1e15:
            container[key] = near(rng, current)
        elif what < 0.6:
            container[key] = odd(rng)
        elif what < 0.75:
            del container[key]
        elif what < 0.85 and isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        elif what < 0.92 and isinstance(container, dict):
            container[str(odd(rng))[:50]] = container[key]
        else:
            other, at = rng.choice(found)
            if at in other if isinstance(other, dict) else at < len(other):
                container[key] = copy.deepcopy(other[at])
    return value


def to_json(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def mutate_text(rng: random.Random, data: bytes) -> bytes:
    """Text with tokens put in, bytes lost, an end cut off, or in another encoding."""
    content = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(len(content) + 1)
        what = rng.random()
        numbers = list(re.finditer(rb"\d+\.?\d*", content))
        if numbers and rng.random() < 0.5:
            found = rng.choice(numbers)
            content[found.start() : found.end()] = str(near(rng, float(found.group()[:300]))).encode()
        elif what < 0.5:
            content[at:at] = rng.choice(TOKENS)
        elif what < 0.75:
            del content[at : at + rng.choice([1, 1, 5, 50])]
        elif what < 0.9:
            end = at + rng.randint(1, 20)
            content[at:end] = rng.choice(TOKENS)
        else:
            del content[at:]
    if rng.random() < 0.05:
        return bytes(content).decode("latin-1").encode("utf-16")
    if rng.random() < 0.03:
        return b"[" * 200_000 + bytes(content)
    return bytes(content)


def mutate_lines(rng: random.Random, data: bytes) -> bytes:
    """Text whose syntax mostly stays: numbers replaced, lines doubled or lost; else as mutate_text."""
    if rng.random() < 0.3:
        return mutate_text(rng, data)
    text = data.decode()
    for _ in range(rng.choice([1, 1, 3])):
        lines = text.split("\n")
        at = rng.randrange(len(lines))
        numbers = list(re.finditer(r"-?\d+\.?\d*", text))
        what = rng.random()
        if what < 0.8 and numbers:
            found = rng.choice(numbers)
            value = near(rng, float(found.group()[:300])) if rng.random() < 0.7 else rng.choice(NUMBERS)
            text = f"{text[: found.start()]}{value}{text[found.end() :]}"
        elif what < 0.9:
            text = "\n".join([*lines[: at + 1], *lines[at:]])
        else:
            text = "\n".join(lines[:at] + lines[at + 1 :])
    return text.encode()


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """A binary file with bits flipped, stretches zeroed, lost, doubled or swapped, or its end cut off."""
    content = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 30])):
        # Half of the damage goes to the beginning, where headers are.
        at = rng.randrange(max(1, min(len(content), 300 if rng.random() < 0.5 else len(content))))
        size = rng.choice([1, 2, 4, 16, 1000])
        what = rng.random()
        if what < 0.35:
            content[at : at + 1] = bytes([rng.randrange(256)])
        elif what < 0.55:
            content[at : at + 4] = rng.choice(
                [b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\xff\xff\xff\x7f"]
            )
        elif what < 0.65:
            content[at : at + size] = bytes(len(content[at : at + size]))
        elif what < 0.75:
            del content[at : at + size]
        elif what < 0.85:
            content[at:at] = content[at : at + size]
        elif what < 0.95:
            content[at : at + size] = rng.randbytes(len(content[at : at + size]))
        else:
            del content[at:]
    return bytes(content)
