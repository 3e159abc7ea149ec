"""Open ChaCha20-Poly1305 (RFC 8439) chunks on the device, from ciphertext straight to its destination.

The bytes go through five kernels: `one_time_keys` makes each chunk's Poly1305 key, `powers` the powers of its r,
`sum_segments` the sum over its 16-byte blocks, a segment a program; `verify_tags` joins the segments and compares the
tag; `decrypt` runs only after the host has seen that every tag of the call is right, so no plaintext of a forged chunk
ever exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from serving_kernels import launch
from serving_kernels.chacha20 import decrypt, decrypt_tail, one_time_keys
from serving_kernels.launch import INTERPRETED, OpenPlan
from serving_kernels.poly1305 import powers, sum_segments, verify_tags

if TYPE_CHECKING:
    from collections.abc import Sequence

KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16
MAX_CHUNK_BYTES = 1 << 30  # Block and word numbers inside a chunk stay in int32.
MAX_BLOCKS = (1 << 31) - (1 << 16)  # So does the number of a 64-byte block inside a call, a program's lanes included.
MAX_CHUNKS = 1 << 27  # Nor does the number of a word of their one-time keys, eight a chunk.
MAX_AAD_BYTES = 1 << 16


class TagMismatchError(ValueError):
    """At least one tag did not verify; nothing was decrypted.

    Args:
        chunks: Which chunks of the call, by index.
    """

    def __init__(self, chunks: list[int]) -> None:
        super().__init__(
            f"{len(chunks)} chunk(s) failed authentication, the first is chunk {chunks[0]} of this call; nothing was "
            "decrypted. The ciphertext, tag, nonce, associated data or key is not the one that was sealed."
        )
        self.chunks = chunks


def open_into(
    ciphertext: Tensor,
    tags: Tensor | Sequence[bytes],
    *,
    key: bytes,
    nonces: Sequence[bytes],
    aads: Sequence[bytes],
    out: Tensor,
    chunk_bytes: int | None = None,
    stride_bytes: int | None = None,
    plan: OpenPlan | None = None,
) -> None:
    """Verify every chunk's tag, then decrypt all of them into `out`; a batch of chunks under one key.

    Chunk `i` is `ciphertext[i * stride_bytes :][: chunk_bytes]`, the last one shorter where `out` is; its plaintext
    goes to `out[i * chunk_bytes :][: chunk_bytes]`. With `stride_bytes = chunk_bytes + 16` a sealed shard's chunks are
    opened where they lie, tags between them.

    Args:
        ciphertext: `[n]` uint8, contiguous, 4-byte aligned, on the device of `out`.
        tags: One 16-byte tag a chunk; a `[chunks, 16]` uint8 tensor or bytes.
        key: 32 bytes. It is copied to the device and wiped there before the call returns.
        nonces: One 12-byte nonce a chunk.
        aads: One piece of associated data a chunk; any length, also empty.
        out: `[n]` uint8, contiguous, 4-byte aligned, no byte in common with `ciphertext`;
            `param.data.view(-1).view(torch.uint8)` for a parameter. Written only after every tag of the call verified.
        chunk_bytes: Plaintext bytes a chunk, a multiple of 64; None where there is one chunk.
        stride_bytes: From one chunk's ciphertext to the next one's, a multiple of 16; None for `chunk_bytes`.
        plan: Launch shape; None for the one that `launch.open_plan` chooses.

    Raises:
        TagMismatchError: A tag is wrong; `out` is as it was, and no plaintext was computed.
        ValueError: A shape, dtype, device, alignment or length does not fit.

    Source:
        RFC 8439 section 2.8.
    """
    num_chunks = len(nonces)
    chunk_bytes = out.numel() if chunk_bytes is None else chunk_bytes
    stride_bytes = chunk_bytes if stride_bytes is None else stride_bytes
    _check_tensors(ciphertext, out)
    _check_layout(ciphertext.numel(), out.numel(), num_chunks, chunk_bytes, stride_bytes)
    _check_secrets(key, nonces, aads, tags)
    batch = _Batch(
        text=ciphertext,
        num_chunks=num_chunks,
        chunk_bytes=chunk_bytes,
        last_bytes=out.numel() - (num_chunks - 1) * chunk_bytes,
        stride_bytes=stride_bytes,
        plan=plan or launch.open_plan(chunk_bytes, interpreted=INTERPRETED),
    )
    host_key = torch.frombuffer(bytearray(key), dtype=torch.int32)
    key_words = host_key.to(out.device)
    nonce_words = _to_words(b"".join(nonces), out.device)
    one_time = torch.empty(num_chunks * 8, dtype=torch.int32, device=out.device)
    try:
        lanes = launch.chunk_lanes(num_chunks)
        one_time_keys[(triton.cdiv(num_chunks, lanes),)](
            key_words, nonce_words, one_time, num_chunks, LANES=lanes, num_warps=1
        )
        good = _check_tags(batch, _tag_words(tags, out.device), aads, one_time)
        # The copy to the host waits for the device: the host has seen every verdict before any plaintext can exist.
        bad = [chunk for chunk, verdict in enumerate(good.tolist()) if verdict != 1]
        if bad:
            raise TagMismatchError(bad)
        _decrypt_all(batch, key_words, nonce_words, out)
    finally:
        host_key.zero_()
        key_words.zero_()
        one_time.zero_()


@dataclass(frozen=True, slots=True)
class _Batch:
    """The chunks of one call and how they lie."""

    text: Tensor
    num_chunks: int
    chunk_bytes: int
    last_bytes: int
    stride_bytes: int
    plan: OpenPlan


def _check_tags(batch: _Batch, tags: Tensor, aads: Sequence[bytes], one_time: Tensor) -> Tensor:
    """Return `[chunks]` int32 on the device, 1 where the tag is right."""
    plan, device = batch.plan, batch.text.device
    lanes, chunks = plan.mac_lanes, batch.num_chunks
    aad_blocks = max(-(-len(aad) // 16) for aad in aads)
    # Each row ends where the text begins: zeros, then the data, padded to whole blocks as RFC 8439 section 2.8 has it.
    rows = b"".join((aad + bytes(-len(aad) % 16)).rjust(aad_blocks * 16, b"\0") for aad in aads)
    aad_words = _to_words(rows or bytes(16), device)
    aad_sizes = torch.tensor([len(aad) for aad in aads], dtype=torch.int32, device=device)
    num_blocks = aad_blocks + max(batch.chunk_bytes, batch.last_bytes) // 16
    num_segments = max(1, triton.cdiv(num_blocks, lanes * plan.mac_steps))
    table = torch.empty(chunks * 5 * lanes, dtype=torch.int32, device=device)
    parts = torch.empty(chunks * num_segments * 5, dtype=torch.int32, device=device)
    good = torch.zeros(chunks, dtype=torch.int32, device=device)
    chunk_lanes = launch.chunk_lanes(chunks)
    try:
        powers[(chunks,)](one_time, table, LANES=lanes, LOG_LANES=lanes.bit_length() - 1, num_warps=plan.mac_warps)
        sum_segments[(chunks, num_segments)](
            _words(batch.text), aad_words, aad_sizes, table, parts, batch.stride_bytes // 16, aad_blocks,
            batch.chunk_bytes, batch.last_bytes, LANES=lanes, STEPS=plan.mac_steps, num_warps=plan.mac_warps,
        )  # fmt: skip
        verify_tags[(triton.cdiv(chunks, chunk_lanes),)](
            batch.text, aad_sizes, one_time, table, parts, tags, good, batch.stride_bytes, batch.chunk_bytes,
            batch.last_bytes, chunks, num_segments, MAC_LANES=lanes, LOG_STEPS=plan.mac_steps.bit_length() - 1,
            LANES=chunk_lanes, num_warps=1,
        )  # fmt: skip
    finally:
        # Powers of the one-time keys, and sums from which these can be solved. The stream puts this after the kernels.
        table.zero_()
        parts.zero_()
    return good


def _decrypt_all(batch: _Batch, key_words: Tensor, nonce_words: Tensor, out: Tensor) -> None:
    """Launch the cipher; only ever after every tag was found right."""
    lanes, last = batch.plan.cipher_lanes, batch.num_chunks - 1
    chunk_blocks = batch.chunk_bytes // 64
    num_blocks = last * chunk_blocks + batch.last_bytes // 64
    if num_blocks:
        decrypt[(triton.cdiv(num_blocks, lanes),)](
            _words(batch.text), key_words, nonce_words, _words(out), batch.stride_bytes // 16, chunk_blocks, num_blocks,
            LANES=lanes, num_warps=batch.plan.cipher_warps,
        )  # fmt: skip
    if batch.last_bytes % 64:
        decrypt_tail[(1,)](
            batch.text[last * batch.stride_bytes :], key_words, nonce_words[last * 3 :],
            out[last * batch.chunk_bytes :], batch.last_bytes, num_warps=1,
        )  # fmt: skip


def _words(data: Tensor) -> Tensor:
    """The whole 4-byte words of `data`, as int32; the kernels never reach past them."""
    return data[: data.numel() // 4 * 4].view(torch.int32)


def _to_words(data: bytes, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.int32).to(device)


def _tag_words(tags: Tensor | Sequence[bytes], device: torch.device) -> Tensor:
    """`[4 * chunks]` int32 on the device."""
    if isinstance(tags, Tensor):
        # A copy begins at a word, wherever in other memory the tags lie.
        return tags.to(device).contiguous().clone().view(-1).view(torch.int32)
    return _to_words(b"".join(tags), device)


def _check_tensors(ciphertext: Tensor, out: Tensor) -> None:
    for name, tensor in (("ciphertext", ciphertext), ("out", out)):
        if tensor.dtype != torch.uint8 or tensor.dim() != 1 or not tensor.is_contiguous():
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {list(tensor.shape)}, stride {list(tensor.stride())}; it must be "
                "one contiguous row of uint8."
            )
        if tensor.data_ptr() % 4 or tensor.storage_offset() % 4:
            raise ValueError(f"{name} starts at an address that 4 does not divide; align it to 4 bytes.")
    if ciphertext.device != out.device:
        raise ValueError(f"ciphertext is on {ciphertext.device} and out on {out.device}; put both on one device.")
    expected = "cpu" if INTERPRETED else "cuda"
    if out.device.type != expected:
        raise ValueError(f"out is on {out.device}; this process runs its kernels on {expected}.")
    start, end = ciphertext.data_ptr(), ciphertext.data_ptr() + ciphertext.numel()
    if start < out.data_ptr() + out.numel() and out.data_ptr() < end:
        raise ValueError("ciphertext and out share memory; give out memory of its own.")


def _check_layout(num_cipher_bytes: int, num_bytes: int, num_chunks: int, chunk_bytes: int, stride_bytes: int) -> None:
    if num_chunks < 1:
        raise ValueError("There is no nonce; give one for each chunk.")
    if num_chunks > MAX_CHUNKS:
        raise ValueError(f"A call has at most {MAX_CHUNKS} chunks; there are {num_chunks}.")
    if not 0 <= chunk_bytes <= MAX_CHUNK_BYTES or num_bytes // 64 > MAX_BLOCKS:
        raise ValueError(f"A chunk has at most {MAX_CHUNK_BYTES} bytes and a call {MAX_BLOCKS * 64}.")
    last_bytes = num_bytes - (num_chunks - 1) * chunk_bytes
    if not min(1, chunk_bytes) <= last_bytes <= chunk_bytes:
        raise ValueError(f"{num_chunks} chunks of {chunk_bytes} bytes cannot fill {num_bytes} bytes.")
    if num_chunks > 1 and (chunk_bytes % 64 or stride_bytes % 16 or stride_bytes < chunk_bytes):
        raise ValueError(
            f"Chunks of {chunk_bytes} bytes, {stride_bytes} apart: the first must be a multiple of 64, the second "
            "one of 16 and no smaller."
        )
    if num_cipher_bytes < (num_chunks - 1) * stride_bytes + last_bytes:
        raise ValueError(f"ciphertext has {num_cipher_bytes} bytes, too few for {num_chunks} chunks.")


def _check_secrets(key: bytes, nonces: Sequence[bytes], aads: Sequence[bytes], tags: Tensor | Sequence[bytes]) -> None:
    """Lengths only; no value reaches a message."""
    if len(key) != KEY_BYTES:
        raise ValueError(f"The key has {len(key)} bytes; ChaCha20-Poly1305 takes {KEY_BYTES}.")
    if isinstance(tags, Tensor) and not tags.dim():
        raise ValueError("tags is a single number; it must be [chunks, 16] uint8.")
    if len(aads) != len(nonces) or len(tags) != len(nonces):
        raise ValueError(f"There are {len(nonces)} nonces, {len(tags)} tags and {len(aads)} associated data.")
    if any(len(nonce) != NONCE_BYTES for nonce in nonces):
        raise ValueError(f"A nonce does not have {NONCE_BYTES} bytes.")
    if any(len(aad) > MAX_AAD_BYTES for aad in aads):
        raise ValueError(f"Associated data is longer than {MAX_AAD_BYTES} bytes.")
    if isinstance(tags, Tensor):
        if tags.dtype != torch.uint8 or tags.shape[1:] != (TAG_BYTES,):
            raise ValueError(f"tags is {tags.dtype} of shape {list(tags.shape)}; it must be [chunks, 16] uint8.")
    elif any(len(tag) != TAG_BYTES for tag in tags):
        raise ValueError(f"A tag does not have {TAG_BYTES} bytes.")
