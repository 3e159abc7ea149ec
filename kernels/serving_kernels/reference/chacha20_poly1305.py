"""ChaCha20-Poly1305 (RFC 8439) in plain PyTorch and Python integers; slow, and short enough to check by eye."""

from __future__ import annotations

import hmac

import torch
from torch import Tensor

_CONSTANTS = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)
_MASK_32 = 0xFFFFFFFF
_PRIME = (1 << 130) - 5
_CLAMP = 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF


def _words(data: bytes) -> list[int]:
    return [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]


def _rotate(x: Tensor, bits: int) -> Tensor:
    return ((x << bits) | (x >> (32 - bits))) & _MASK_32


def _quarter_round(x: list[Tensor], a: int, b: int, c: int, d: int) -> None:
    """RFC 8439 section 2.1, in place on the 16 words of every block at once."""
    for left, right, bits in ((a, d, 16), (c, b, 12), (a, d, 8), (c, b, 7)):
        other = b if left == a else d
        x[left] = (x[left] + x[other]) & _MASK_32
        x[right] = _rotate(x[right] ^ x[left], bits)


def keystream(key: bytes, nonce: bytes, counter: int, num_blocks: int) -> Tensor:
    """Return `[64 * num_blocks]` uint8: RFC 8439 section 2.3 for `counter`, `counter + 1` and on.

    Words are kept in int64, because PyTorch's unsigned 32-bit type has few operations.
    """
    counters = torch.arange(counter, counter + num_blocks, dtype=torch.int64)
    fixed = [*_CONSTANTS, *_words(key)]
    state = [torch.full_like(counters, word) for word in fixed]
    state += [counters, *(torch.full_like(counters, word) for word in _words(nonce))]
    x = list(state)
    for _ in range(10):
        for i in range(4):
            _quarter_round(x, i, 4 + i, 8 + i, 12 + i)
        for i in range(4):
            _quarter_round(x, i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    words = torch.stack([(a + b) & _MASK_32 for a, b in zip(x, state, strict=True)], dim=1).reshape(-1)
    shifts = torch.tensor([0, 8, 16, 24])
    return ((words[:, None] >> shifts) & 0xFF).to(torch.uint8).reshape(-1)


def poly1305(key: bytes, message: bytes) -> bytes:
    """Return the 16-byte tag of `message` under the one-time `key`; RFC 8439 section 2.5."""
    r = int.from_bytes(key[:16], "little") & _CLAMP
    s = int.from_bytes(key[16:32], "little")
    total = 0
    for start in range(0, len(message), 16):
        block = message[start : start + 16]
        total = (total + int.from_bytes(block + b"\x01", "little")) * r % _PRIME
    return ((total + s) & ((1 << 128) - 1)).to_bytes(16, "little")


def compute_tag(ciphertext: Tensor, *, key: bytes, nonce: bytes, aad: bytes) -> bytes:
    """Return the tag of one chunk; RFC 8439 section 2.8."""
    text = bytes(ciphertext.cpu().numpy())
    one_time_key = bytes(keystream(key, nonce, 0, 1)[:32].numpy())
    lengths = len(aad).to_bytes(8, "little") + len(text).to_bytes(8, "little")
    return poly1305(one_time_key, aad + bytes(-len(aad) % 16) + text + bytes(-len(text) % 16) + lengths)


def open_chunk(ciphertext: Tensor, tag: bytes, *, key: bytes, nonce: bytes, aad: bytes) -> Tensor:
    """Return the plaintext of one chunk, `[n]` uint8, new.

    Raises:
        ValueError: If the tag does not verify; nothing was decrypted.
    """
    if not hmac.compare_digest(compute_tag(ciphertext, key=key, nonce=nonce, aad=aad), tag):
        raise ValueError("The tag does not verify.")
    num_blocks = -(-ciphertext.numel() // 64)
    return ciphertext ^ keystream(key, nonce, 1, num_blocks)[: ciphertext.numel()].to(ciphertext.device)
