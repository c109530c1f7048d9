"""One way, and one only, to write a list of values as bytes: what is signed, hashed or bound to a ciphertext."""

from __future__ import annotations

DOMAIN = "silotune/secagg/1"

Value = str | bytes | int | tuple["Value", ...]


def canonical(purpose: str, *fields: Value) -> bytes:
    """Bytes that differ whenever the purpose or a field differs, in value, type, order or number.

    Every value is written as its type, its length in 8 bytes and its content, so that no two lists of values meet.
    Raises TypeError for a value of another type, and for negative numbers.
    """
    return _bytes((DOMAIN, purpose, *fields))


def _bytes(value: Value) -> bytes:
    match value:
        case bytes():
            kind, content = b"b", value
        case str():
            kind, content = b"s", value.encode()
        case int() if not isinstance(value, bool) and value >= 0:
            kind, content = b"i", value.to_bytes((value.bit_length() + 7) // 8, "big")
        case tuple():
            kind, content = b"t", b"".join(_bytes(part) for part in value)
        case _:
            raise TypeError(f"expected text, bytes, a number of at least 0 or a tuple, found {type(value).__name__}")
    return kind + len(content).to_bytes(8, "big") + content
