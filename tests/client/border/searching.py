"""The search for a secret in what leaves: in every form in which it might stand there."""

from __future__ import annotations

import base64
import re
import zlib
from functools import lru_cache
from urllib.parse import quote


@lru_cache(maxsize=256)
def forms(secret: str | bytes) -> set[bytes]:
    """How it could stand somewhere: raw, wide, in hex, in base64 at any place in a longer text, escaped, reversed."""
    texts = {secret, secret.upper(), secret[::-1]} if isinstance(secret, str) else set()
    raws = {form for text in texts for form in (text.encode(), text.encode("utf-16-le"), text.encode("utf-16-be"))}
    if isinstance(secret, bytes):
        raws = {secret}
    found = set(raws) | {quote(raw, safe="").encode() for raw in raws} | {repr(raw)[2:-1].encode() for raw in raws}
    for raw in raws:
        found |= {raw.hex().encode(), raw.hex().upper().encode(), ", ".join(map(str, raw)).encode()}
        for offset in range(3):
            whole = base64.b64encode(bytes(offset) + raw)
            # Without the characters at both ends that what stands beside it decides too.
            inner = whole[(0, 2, 3)[offset] : (offset + len(raw)) * 8 // 6]
            found |= {inner, inner.replace(b"+", b"-").replace(b"/", b"_")}
    return found


def unpacked(data: bytes) -> bytes:
    """The bytes, and what any zlib or gzip stream in them holds."""
    found = [data]
    for start in (match.start() for match in re.finditer(rb"\x78[\x01\x5e\x9c\xda]|\x1f\x8b", data)):
        try:
            found.append(zlib.decompressobj(47).decompress(data[start:], 1 << 20))
        except zlib.error:
            continue
    return b"\0".join(found)


def contains(data: bytes, *secrets: str | bytes) -> bool:
    """Whether any of the secrets is in there."""
    whole = unpacked(data)
    return any(form in whole for secret in secrets for form in forms(secret))
