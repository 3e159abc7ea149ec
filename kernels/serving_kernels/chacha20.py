"""ChaCha20 (RFC 8439 section 2.4): one-time keys and the keystream over the ciphertext, a 64-byte block a lane."""

from __future__ import annotations

import triton.language as tl

from serving_kernels.launch import jit, load_u32


@jit
def _quarter_round(a, b, c, d):
    """RFC 8439 section 2.1; sums wrap at 2^32."""
    a = a + b
    d = d ^ a
    d = (d << 16) | (d >> 16)
    c = c + d
    b = b ^ c
    b = (b << 12) | (b >> 20)
    a = a + b
    d = d ^ a
    d = (d << 8) | (d >> 24)
    c = c + d
    b = b ^ c
    b = (b << 7) | (b >> 25)
    return a, b, c, d


@jit
def _chacha20_block(key_ptr, n0, n1, n2, counter):
    """RFC 8439 section 2.3: the 16 output words of the block numbered `counter`, for every lane of it."""
    zero = counter & 0
    c0 = zero + 0x61707865
    c1 = zero + 0x3320646E
    c2 = zero + 0x79622D32
    c3 = zero + 0x6B206574
    k0 = zero + load_u32(key_ptr)
    k1 = zero + load_u32(key_ptr + 1)
    k2 = zero + load_u32(key_ptr + 2)
    k3 = zero + load_u32(key_ptr + 3)
    k4 = zero + load_u32(key_ptr + 4)
    k5 = zero + load_u32(key_ptr + 5)
    k6 = zero + load_u32(key_ptr + 6)
    k7 = zero + load_u32(key_ptr + 7)
    x0, x1, x2, x3 = c0, c1, c2, c3
    x4, x5, x6, x7, x8, x9, x10, x11 = k0, k1, k2, k3, k4, k5, k6, k7
    x12, x13, x14, x15 = counter, n0, n1, n2
    for _ in range(10):
        x0, x4, x8, x12 = _quarter_round(x0, x4, x8, x12)
        x1, x5, x9, x13 = _quarter_round(x1, x5, x9, x13)
        x2, x6, x10, x14 = _quarter_round(x2, x6, x10, x14)
        x3, x7, x11, x15 = _quarter_round(x3, x7, x11, x15)
        x0, x5, x10, x15 = _quarter_round(x0, x5, x10, x15)
        x1, x6, x11, x12 = _quarter_round(x1, x6, x11, x12)
        x2, x7, x8, x13 = _quarter_round(x2, x7, x8, x13)
        x3, x4, x9, x14 = _quarter_round(x3, x4, x9, x14)
    return (
        x0 + c0, x1 + c1, x2 + c2, x3 + c3, x4 + k0, x5 + k1, x6 + k2, x7 + k3,
        x8 + k4, x9 + k5, x10 + k6, x11 + k7, x12 + counter, x13 + n0, x14 + n1, x15 + n2,
    )  # fmt: skip


@jit
def _load_nonce(nonce_ptr, chunk, mask):
    """Load the three words of a chunk's nonce."""
    at = nonce_ptr + chunk * 3
    return (
        tl.load(at, mask=mask, other=0).to(tl.uint32, bitcast=True),
        tl.load(at + 1, mask=mask, other=0).to(tl.uint32, bitcast=True),
        tl.load(at + 2, mask=mask, other=0).to(tl.uint32, bitcast=True),
    )


@jit
def one_time_keys(key_ptr, nonce_ptr, one_time_ptr, num_chunks, LANES: tl.constexpr) -> None:
    """Write the first eight words of ChaCha20(key, nonce, 0), r clamped; RFC 8439 section 2.6. A chunk a lane."""
    chunk = tl.program_id(0) * LANES + tl.arange(0, LANES)
    mask = chunk < num_chunks
    n0, n1, n2 = _load_nonce(nonce_ptr, chunk, mask)
    words = _chacha20_block(key_ptr, n0, n1, n2, (chunk * 0).to(tl.uint32))
    at = one_time_ptr + chunk * 8
    tl.store(at, (words[0] & 0x0FFFFFFF).to(tl.int32, bitcast=True), mask=mask)
    for i in tl.static_range(1, 4):
        tl.store(at + i, (words[i] & 0x0FFFFFFC).to(tl.int32, bitcast=True), mask=mask)
    for i in tl.static_range(4, 8):
        tl.store(at + i, words[i].to(tl.int32, bitcast=True), mask=mask)


@jit
def _rows(w):
    """Sixteen words a lane to `[LANES, 16]`, so that a row's loads and stores are 16 bytes wide."""
    a0, a1, a2, a3 = tl.join(w[0], w[8]), tl.join(w[1], w[9]), tl.join(w[2], w[10]), tl.join(w[3], w[11])
    a4, a5, a6, a7 = tl.join(w[4], w[12]), tl.join(w[5], w[13]), tl.join(w[6], w[14]), tl.join(w[7], w[15])
    b0, b1, b2, b3 = tl.join(a0, a4), tl.join(a1, a5), tl.join(a2, a6), tl.join(a3, a7)
    return tl.reshape(tl.join(tl.join(b0, b2), tl.join(b1, b3)), (w[0].shape[0], 16))


@jit
def decrypt(
    text_ptr, key_ptr, nonce_ptr, out_ptr, stride_quads, chunk_blocks, num_blocks, LANES: tl.constexpr
) -> None:  # fmt: skip
    """Write out = text ^ ChaCha20(key, nonce, 1 + block), whole 64-byte blocks only, one a lane, chunk after chunk."""
    number = tl.program_id(0) * LANES + tl.arange(0, LANES)
    mask = number < num_blocks
    chunk = number // chunk_blocks
    block = number - chunk * chunk_blocks
    n0, n1, n2 = _load_nonce(nonce_ptr, chunk, mask)
    words = _chacha20_block(key_ptr, n0, n1, n2, block.to(tl.uint32) + 1)
    text = text_ptr + chunk.to(tl.int64) * stride_quads * 4 + block * 16
    out = out_ptr + number.to(tl.int64) * 16
    column = tl.arange(0, 16)[None, :]
    word = tl.load(text[:, None] + column, mask=mask[:, None], other=0)
    tl.store(out[:, None] + column, word ^ _rows(words).to(tl.int32, bitcast=True), mask=mask[:, None])


@jit
def decrypt_tail(text_ptr, key_ptr, nonce_ptr, out_ptr, num_bytes) -> None:
    """Write out = text ^ keystream for the bytes after the last whole block; pointers are the last chunk's."""
    byte = tl.arange(0, 64)
    zero = (byte * 0).to(tl.uint32)
    n0, n1, n2 = load_u32(nonce_ptr), load_u32(nonce_ptr + 1), load_u32(nonce_ptr + 2)
    words = _chacha20_block(key_ptr, zero + n0, zero + n1, zero + n2, zero + (num_bytes // 64 + 1))
    word = zero
    for i in tl.static_range(16):
        word = tl.where(byte // 4 == i, words[i], word)
    at = num_bytes // 64 * 64 + byte
    mask = at < num_bytes
    text = tl.load(text_ptr + at, mask=mask, other=0)
    plain = text.to(tl.uint32) ^ (word >> ((byte % 4) * 8).to(tl.uint32))
    tl.store(out_ptr + at, (plain & 0xFF).to(tl.uint8), mask=mask)
