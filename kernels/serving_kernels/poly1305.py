"""Poly1305 (RFC 8439 section 2.5) over aad || ciphertext || lengths, in 26-bit limbs modulo 2^130 - 5."""

from __future__ import annotations

import triton.language as tl

from serving_kernels.launch import block_sum, jit, load_u32

_LIMB_MASK: tl.constexpr = tl.constexpr(0x3FFFFFF)


@jit
def _carry(d0, d1, d2, d3, d4):
    """Bring five 64-bit sums back to 26-bit limbs modulo 2^130 - 5; limb 1 may keep one bit more."""
    d1 += d0 >> 26
    d2 += d1 >> 26
    d3 += d2 >> 26
    d4 += d3 >> 26
    h0 = (d0 & _LIMB_MASK) + (d4 >> 26) * 5
    h1 = (d1 & _LIMB_MASK) + (h0 >> 26)
    return (
        (h0 & _LIMB_MASK).to(tl.uint32),
        h1.to(tl.uint32),
        (d2 & _LIMB_MASK).to(tl.uint32),
        (d3 & _LIMB_MASK).to(tl.uint32),
        (d4 & _LIMB_MASK).to(tl.uint32),
    )


@jit
def _multiply(a0, a1, a2, a3, a4, b0, b1, b2, b3, b4):
    """Product a * b mod 2^130 - 5 in 26-bit limbs; limbs below 2^28 keep every sum below 2^62."""
    x0, x1, x2, x3, x4 = a0.to(tl.uint64), a1.to(tl.uint64), a2.to(tl.uint64), a3.to(tl.uint64), a4.to(tl.uint64)
    y0, y1, y2, y3, y4 = b0.to(tl.uint64), b1.to(tl.uint64), b2.to(tl.uint64), b3.to(tl.uint64), b4.to(tl.uint64)
    # 2^130 = 5, so a product that passes limb 4 comes round five-fold; 5 * b stays within 32 bits.
    z1, z2, z3, z4 = (b1 * 5).to(tl.uint64), (b2 * 5).to(tl.uint64), (b3 * 5).to(tl.uint64), (b4 * 5).to(tl.uint64)
    return _carry(
        x0 * y0 + x1 * z4 + x2 * z3 + x3 * z2 + x4 * z1,
        x0 * y1 + x1 * y0 + x2 * z4 + x3 * z3 + x4 * z2,
        x0 * y2 + x1 * y1 + x2 * y0 + x3 * z4 + x4 * z3,
        x0 * y3 + x1 * y2 + x2 * y1 + x3 * y0 + x4 * z4,
        x0 * y4 + x1 * y3 + x2 * y2 + x3 * y1 + x4 * y0,
    )


@jit
def _limbs(w0, w1, w2, w3):
    """Four little-endian words to five 26-bit limbs."""
    return (
        w0 & _LIMB_MASK,
        ((w0 >> 26) | (w1 << 6)) & _LIMB_MASK,
        ((w1 >> 20) | (w2 << 12)) & _LIMB_MASK,
        ((w2 >> 14) | (w3 << 18)) & _LIMB_MASK,
        w3 >> 8,
    )


@jit
def _load_block(ptr, block, mask):
    """Load four words for every lane, 16 bytes at once; zero where masked."""
    at = (ptr + block * 4)[:, None] + tl.arange(0, 4)[None, :]
    words = tl.load(at, mask=mask[:, None], other=0).to(tl.uint32, bitcast=True)
    even, odd = tl.split(tl.reshape(words, (block.shape[0], 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0, w1, w2, w3


@jit
def _load_limbs(ptr, step, mask):
    """Load five limbs that lie `step` words apart."""
    return (
        tl.load(ptr, mask=mask, other=0).to(tl.uint32, bitcast=True),
        tl.load(ptr + step, mask=mask, other=0).to(tl.uint32, bitcast=True),
        tl.load(ptr + 2 * step, mask=mask, other=0).to(tl.uint32, bitcast=True),
        tl.load(ptr + 3 * step, mask=mask, other=0).to(tl.uint32, bitcast=True),
        tl.load(ptr + 4 * step, mask=mask, other=0).to(tl.uint32, bitcast=True),
    )


@jit
def powers(one_time_ptr, power_ptr, LANES: tl.constexpr, LOG_LANES: tl.constexpr) -> None:
    """Write power[j] = r^(LANES - j), by squaring and multiplying. One program a chunk."""
    chunk = tl.program_id(0)
    lane = tl.arange(0, LANES)
    r = one_time_ptr + chunk * 8
    s0, s1, s2, s3, s4 = _limbs(load_u32(r), load_u32(r + 1), load_u32(r + 2), load_u32(r + 3))
    zero = (lane * 0).to(tl.uint32)
    p0, p1, p2, p3, p4 = zero + 1, zero, zero, zero, zero
    for bit in range(LOG_LANES + 1):
        q0, q1, q2, q3, q4 = _multiply(p0, p1, p2, p3, p4, s0, s1, s2, s3, s4)
        take = (((LANES - lane) >> bit) & 1) == 1
        p0, p1, p2 = tl.where(take, q0, p0), tl.where(take, q1, p1), tl.where(take, q2, p2)
        p3, p4 = tl.where(take, q3, p3), tl.where(take, q4, p4)
        s0, s1, s2, s3, s4 = _multiply(s0, s1, s2, s3, s4, s0, s1, s2, s3, s4)
    at = power_ptr + chunk.to(tl.int64) * 5 * LANES + lane
    tl.store(at, p0.to(tl.int32, bitcast=True))
    tl.store(at + LANES, p1.to(tl.int32, bitcast=True))
    tl.store(at + 2 * LANES, p2.to(tl.int32, bitcast=True))
    tl.store(at + 3 * LANES, p3.to(tl.int32, bitcast=True))
    tl.store(at + 4 * LANES, p4.to(tl.int32, bitcast=True))


@jit
def sum_segments(
    text_ptr, aad_ptr, aad_bytes_ptr, power_ptr, part_ptr, stride_quads, aad_row_blocks, chunk_bytes, last_bytes,
    LANES: tl.constexpr, STEPS: tl.constexpr,
) -> None:  # fmt: skip
    """Write part = sum of block_i * r^(n - i) over one segment of aad || whole ciphertext blocks.

    Blocks are aligned to the right: the last one of the chunk is the last slot of the last segment, and the slots
    before the first stay zero, which Horner's rule does not notice. So every segment weighs r^(LANES * STEPS).
    """
    chunk = tl.program_id(0)
    segment = tl.program_id(1)
    num_segments = tl.num_programs(1)
    num_bytes = tl.where(chunk == tl.num_programs(0) - 1, last_bytes, chunk_bytes)
    aad_blocks = (tl.load(aad_bytes_ptr + chunk) + 15) // 16
    num_blocks = num_bytes // 16
    lane = tl.arange(0, LANES)
    text = text_ptr + chunk.to(tl.int64) * stride_quads * 4
    aad = aad_ptr + (chunk.to(tl.int64) + 1) * aad_row_blocks * 4
    power = power_ptr + chunk.to(tl.int64) * 5 * LANES
    r0, r1, r2 = load_u32(power), load_u32(power + LANES), load_u32(power + 2 * LANES)
    r3, r4 = load_u32(power + 3 * LANES), load_u32(power + 4 * LANES)
    zero = (lane * 0).to(tl.uint32)
    h0, h1, h2, h3, h4 = zero, zero, zero, zero, zero
    first = num_blocks - (num_segments - segment) * (LANES * STEPS)
    for step in range(STEPS):
        block = first + step * LANES + lane
        w0, w1, w2, w3 = _load_block(text, block, block >= 0)
        if (
            first + step * LANES < 0
        ):  # Rare, and the same for the whole program: the text's head and the data before it.
            a0, a1, a2, a3 = _load_block(aad, block, (block < 0) & (block >= -aad_blocks))
            w0, w1, w2, w3 = w0 | a0, w1 | a1, w2 | a2, w3 | a3
        m0, m1, m2, m3, m4 = _limbs(w0, w1, w2, w3)
        m4 = m4 | tl.where(block >= -aad_blocks, 1 << 24, 0).to(tl.uint32)
        h0, h1, h2, h3, h4 = _multiply(h0, h1, h2, h3, h4, r0, r1, r2, r3, r4)
        h0, h1, h2, h3, h4 = h0 + m0, h1 + m1, h2 + m2, h3 + m3, h4 + m4
    at = power + lane
    h0, h1, h2, h3, h4 = _multiply(
        h0, h1, h2, h3, h4,
        load_u32(at), load_u32(at + LANES), load_u32(at + 2 * LANES), load_u32(at + 3 * LANES),
        load_u32(at + 4 * LANES),
    )  # fmt: skip
    g0, g1, g2, g3, g4 = _carry(
        block_sum(h0.to(tl.uint64), axis=0), block_sum(h1.to(tl.uint64), axis=0), block_sum(h2.to(tl.uint64), axis=0),
        block_sum(h3.to(tl.uint64), axis=0), block_sum(h4.to(tl.uint64), axis=0),
    )  # fmt: skip
    part = part_ptr + (chunk.to(tl.int64) * num_segments + segment) * 5
    tl.store(part, g0.to(tl.int32, bitcast=True))
    tl.store(part + 1, g1.to(tl.int32, bitcast=True))
    tl.store(part + 2, g2.to(tl.int32, bitcast=True))
    tl.store(part + 3, g3.to(tl.int32, bitcast=True))
    tl.store(part + 4, g4.to(tl.int32, bitcast=True))


@jit
def verify_tags(
    text_ptr, aad_bytes_ptr, one_time_ptr, power_ptr, part_ptr, tag_ptr, good_ptr, stride_bytes, chunk_bytes,
    last_bytes, num_chunks, num_segments, MAC_LANES: tl.constexpr, LOG_STEPS: tl.constexpr, LANES: tl.constexpr,
) -> None:  # fmt: skip
    """Write 1 where (parts, short block, lengths) mod 2^130 - 5 + s is the tag, else 0. A chunk a lane."""
    chunk = tl.program_id(0) * LANES + tl.arange(0, LANES)
    mask = chunk < num_chunks
    num_bytes = tl.where(chunk == num_chunks - 1, last_bytes, chunk_bytes)
    power = power_ptr + chunk.to(tl.int64) * 5 * MAC_LANES
    # Entry 0 is r^MAC_LANES, the last entry r itself.
    s0, s1, s2, s3, s4 = _load_limbs(power, MAC_LANES, mask)
    r0, r1, r2, r3, r4 = _load_limbs(power + MAC_LANES - 1, MAC_LANES, mask)
    for _ in range(LOG_STEPS):
        s0, s1, s2, s3, s4 = _multiply(s0, s1, s2, s3, s4, s0, s1, s2, s3, s4)
    zero = (chunk * 0).to(tl.uint32)
    h0, h1, h2, h3, h4 = zero, zero, zero, zero, zero
    part = part_ptr + chunk.to(tl.int64) * num_segments * 5
    for segment in range(num_segments):
        h0, h1, h2, h3, h4 = _multiply(h0, h1, h2, h3, h4, s0, s1, s2, s3, s4)
        g0, g1, g2, g3, g4 = _load_limbs(part + segment * 5, 1, mask)
        h0, h1, h2, h3, h4 = h0 + g0, h1 + g1, h2 + g2, h3 + g3, h4 + g4
    rest = num_bytes % 16
    tail = text_ptr + chunk.to(tl.int64) * stride_bytes + num_bytes - rest
    w0, w1, w2, w3 = zero, zero, zero, zero
    for i in tl.static_range(4):
        w0 |= tl.load(tail + i, mask=mask & (i < rest), other=0).to(tl.uint32) << (8 * i)
        w1 |= tl.load(tail + 4 + i, mask=mask & (4 + i < rest), other=0).to(tl.uint32) << (8 * i)
        w2 |= tl.load(tail + 8 + i, mask=mask & (8 + i < rest), other=0).to(tl.uint32) << (8 * i)
        w3 |= tl.load(tail + 12 + i, mask=mask & (12 + i < rest), other=0).to(tl.uint32) << (8 * i)
    m0, m1, m2, m3, m4 = _limbs(w0, w1, w2, w3)
    g0, g1, g2, g3, g4 = _multiply(h0 + m0, h1 + m1, h2 + m2, h3 + m3, h4 + m4 + (1 << 24), r0, r1, r2, r3, r4)
    short = rest > 0
    h0, h1, h2 = tl.where(short, g0, h0), tl.where(short, g1, h1), tl.where(short, g2, h2)
    h3, h4 = tl.where(short, g3, h3), tl.where(short, g4, h4)
    # RFC 8439 section 2.8: the two lengths, 64 bits each, are the last block.
    aad_bytes = tl.load(aad_bytes_ptr + chunk, mask=mask, other=0).to(tl.uint32)
    m0, m1, m2, m3, m4 = _limbs(aad_bytes, zero, num_bytes.to(tl.uint32), zero)
    h0, h1, h2, h3, h4 = _multiply(h0 + m0, h1 + m1, h2 + m2, h3 + m3, h4 + m4 + (1 << 24), r0, r1, r2, r3, r4)
    # Two more rounds of carries leave every limb below 2^26.
    for _ in tl.static_range(2):
        h0, h1, h2, h3, h4 = _carry(
            h0.to(tl.uint64), h1.to(tl.uint64), h2.to(tl.uint64), h3.to(tl.uint64), h4.to(tl.uint64)
        )
    # h >= 2^130 - 5 exactly where h + 5 passes 2^130; then the low 130 bits of h + 5 are the residue.
    g0 = h0 + 5
    g1 = h1 + (g0 >> 26)
    g2 = h2 + (g1 >> 26)
    g3 = h3 + (g2 >> 26)
    g4 = h4 + (g3 >> 26)
    over = (g4 >> 26) > 0
    h0, h1 = tl.where(over, g0 & _LIMB_MASK, h0), tl.where(over, g1 & _LIMB_MASK, h1)
    h2, h3 = tl.where(over, g2 & _LIMB_MASK, h2), tl.where(over, g3 & _LIMB_MASK, h3)
    h4 = tl.where(over, g4 & _LIMB_MASK, h4)
    p0, p1, p2, p3 = _load_block(one_time_ptr, chunk * 2 + 1, mask)
    t0 = (h0 | (h1 << 26)).to(tl.uint64) + p0
    t1 = ((h1 >> 6) | (h2 << 20)).to(tl.uint64) + p1 + (t0 >> 32)
    t2 = ((h2 >> 12) | (h3 << 14)).to(tl.uint64) + p2 + (t1 >> 32)
    t3 = ((h3 >> 18) | (h4 << 8)).to(tl.uint64) + p3 + (t2 >> 32)
    e0, e1, e2, e3 = _load_block(tag_ptr, chunk, mask)
    # Differences are gathered without a branch, so that timing says nothing about where a forged tag is wrong.
    wrong = (t0.to(tl.uint32) ^ e0) | (t1.to(tl.uint32) ^ e1) | (t2.to(tl.uint32) ^ e2) | (t3.to(tl.uint32) ^ e3)
    tl.store(good_ptr + chunk, (wrong == 0).to(tl.int32), mask=mask)
