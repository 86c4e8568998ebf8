"""Ways to damage or to forge bytes, texts and values: what a broken disk, a broken line or a hostile sender makes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

Rng = np.random.Generator

BOMBS = (
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"[" * 20_000 + b"]" * 20_000,
    b'{"study":' + b"9" * 6000 + b"}",
    b'{"round":1e999999}',
    b'{"v":NaN,"round":-Infinity}',
    b'{"v":1,"v":1,"v":1}',
    b'"\\ud800"',
    b'{"hospital":"\\udfff\\ud800"}',
    b"\xef\xbb\xbf{}",
    b"null",
    b"[]",
    b"",
    b"\0" * 5000,
)


def flip_bits(raw: bytes, rng: Rng) -> bytes:
    out = bytearray(raw)
    for _ in range(int(rng.choice([1, 1, 1, 2, 8]))):
        # Half of them among the first bytes: headers and lengths are there.
        place = int(rng.integers(min(len(raw), 200)) if rng.random() < 0.5 else rng.integers(len(raw)))
        out[place] ^= 1 << int(rng.integers(8))
    return bytes(out)


def flip_any_bit(raw: bytes, rng: Rng) -> bytes:
    out = bytearray(raw)
    out[int(rng.integers(len(raw)))] ^= 1 << int(rng.integers(8))
    return bytes(out)


def cut(raw: bytes, rng: Rng) -> bytes:
    return raw[: int(rng.choice([0, 1, len(raw) // 2, len(raw) - 1, rng.integers(len(raw))]))]


def cut_the_front(raw: bytes, rng: Rng) -> bytes:
    return raw[int(rng.integers(1, len(raw))) :]


def extend(raw: bytes, rng: Rng) -> bytes:
    tail = (b"\0", b" ", b"\n", bytes(1000), raw, raw[-100:], rng.bytes(50))
    return raw + tail[int(rng.integers(len(tail)))]


def insert(raw: bytes, rng: Rng) -> bytes:
    place, more = int(rng.integers(len(raw))), (b" ", b"\n", b"\0", rng.bytes(4), b'"', b"0")
    return raw[:place] + more[int(rng.integers(len(more)))] + raw[place:]


def remove(raw: bytes, rng: Rng) -> bytes:
    place = int(rng.integers(len(raw)))
    return raw[:place] + raw[place + int(rng.integers(1, 40)) :]


def move_a_piece(raw: bytes, rng: Rng) -> bytes:
    first, second, size = (int(rng.integers(len(raw))) for _ in range(3))
    piece = raw[first : first + size]
    return raw[:second] + piece + raw[second + len(piece) :]


def overwrite(raw: bytes, rng: Rng) -> bytes:
    """A length or a number becomes huge, negative or zero."""
    size, value = int(rng.choice([1, 2, 4, 8])), int(rng.choice([0, 1, 127, 128, 255]))
    place = int(rng.integers(min(len(raw), 300)) if rng.random() < 0.7 else rng.integers(len(raw)))
    return raw[:place] + bytes([value]) * size + raw[place + size :]


def swap_case(raw: bytes, rng: Rng) -> bytes:
    letters = [i for i, byte in enumerate(raw[:5000]) if chr(byte).isascii() and chr(byte).isalpha()]
    if not letters:
        return flip_bits(raw, rng)
    out = bytearray(raw)
    out[int(rng.choice(letters))] ^= 0x20
    return bytes(out)


def noise(raw: bytes, rng: Rng) -> bytes:
    return rng.bytes(int(rng.choice([1, 10, 1000, max(1, len(raw))])))


def bomb(raw: bytes, rng: Rng) -> bytes:
    """Nested JSON and the like, in place of everything or in the middle."""
    piece = BOMBS[int(rng.integers(len(BOMBS)))]
    place = int(rng.integers(len(raw)))
    return (piece, raw[:place] + piece + raw[place:])[int(rng.integers(2))]


BYTES: tuple[Callable[[bytes, Rng], bytes], ...] = (
    flip_bits,
    flip_any_bit,
    cut,
    cut_the_front,
    extend,
    insert,
    remove,
    move_a_piece,
    overwrite,
    swap_case,
    noise,
    bomb,
)

STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**53 + 1, 2**64, -(2**63), 0.5, 1e308, "", "0", "\0", "a" * 70_000, 
    "../../etc", [], [[]], {}, {"a": []}, ["site"], "\ud800", "é", "A" * 64, "0" * 64, " ",
)  # fmt: skip


def strange_value(rng: Rng) -> Any:
    return STRANGE[int(rng.integers(len(STRANGE)))]


def change_field(raw: bytes, rng: Rng) -> bytes:
    """Valid JSON with one value changed, removed, added or of another type. Other bytes where it is no JSON."""
    try:
        values = json.loads(raw)
    except ValueError:
        return flip_bits(raw, rng)
    if not isinstance(values, dict) or not values:
        return flip_bits(raw, rng)
    place, key = values, str(rng.choice(sorted(values)))
    while isinstance(place[key], dict | list) and place[key] and rng.random() < 0.7:
        place = place[key]
        key = str(rng.choice(sorted(place))) if isinstance(place, dict) else int(rng.integers(len(place)))  # type: ignore[assignment]
    match int(rng.integers(5)):
        case 0:
            del place[key]
        case 1:
            values["another"] = strange_value(rng)
        case 2 if isinstance(place[key], str) and place[key]:
            place[key] = place[key][:-1] + chr((ord(place[key][-1]) + 1) % 128)
        case 3 if isinstance(place[key], int | float):
            place[key] += int(rng.choice([-1, 1, 10**15]))
        case _:
            place[key] = strange_value(rng)
    form = {"separators": (",", ":"), "sort_keys": True} if rng.random() < 0.8 else {"indent": 1}
    return json.dumps(values, **form).encode()  # type: ignore[arg-type]


def mutate(raw: bytes, rng: Rng, *, is_json: bool = False) -> tuple[bytes, str]:
    """Other bytes than these, and how they were made."""
    while True:
        if is_json and rng.random() < 0.4:
            how: Callable[[bytes, Rng], bytes] = change_field
        else:
            how = BYTES[int(rng.integers(len(BYTES)))]
        try:
            out = how(raw, rng) if raw else rng.bytes(3)
        except ValueError:
            continue
        if out != raw:
            return out, how.__name__
