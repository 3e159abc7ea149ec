"""The ChaCha20-Poly1305 kernels, interpreted: RFC 8439's vectors, another implementation, every field forged."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from serving_kernels import chacha20
from serving_kernels import chacha20_poly1305 as op
from serving_kernels.launch import DEVICE_OPEN_PLAN, OpenPlan
from serving_kernels.reference import chacha20_poly1305 as reference

SUNSCREEN = (
    b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, "
    b"sunscreen would be it."
)
# RFC 8439 section 2.8.2.
SECTION_2_8_2 = {
    "key": "808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9f",
    "nonce": "070000004041424344454647",
    "aad": "50515253c0c1c2c3c4c5c6c7",
    "ciphertext": "d31a8d34648e60db7b86afbc53ef7ec2a4aded51296e08fea9e2b5a736ee62d63dbea45e8ca9671282fafb69da92728b1a71"
    "de0a9e060b2905d6a5b67ecd3b3692ddbd7f2d778b8c9803aee328091b58fab324e4fad675945585808b4831d7bc3ff4def0"
    "8e4b7a9de576d26586cec64b6116",
    "tag": "1ae10b594f09e26a7e902ecbd0600691",
}
# RFC 8439 appendix A.5.
APPENDIX_A_5 = {
    "key": "1c9240a5eb55d38af333888604f6b5f0473917c1402b80099dca5cbc207075c0",
    "nonce": "000000000102030405060708",
    "aad": "f33388860000000000004e91",
    "ciphertext": "64a0861575861af460f062c79be643bd5e805cfd345cf389f108670ac76c8cb24c6cfc18755d43eea09ee94e382d26b0bdb7"
    "b73c321b0100d4f03b7f355894cf332f830e710b97ce98c8a84abd0b948114ad176e008d33bd60f982b1ff37c8559797a06e"
    "f4f0ef61c186324e2b3506383606907b6a7c02b0f9f6157b53c867e4b9166c767b804d46a59b5216cde7a4e99040c5a40433"
    "225ee282a1b0a06c523eaf4534d7f83fa1155b0047718cbc546a0d072b04b3564eea1b422273f548271a0bb2316053fa7699"
    "1955ebd63159434ecebb4e466dae5a1073a6727627097a1049e617d91d361094fa68f0ff77987130305beaba2eda04df997b"
    "714d6c6f2c29a6ad5cb4022b02709b",
    "tag": "eead9d67890cbb22392336fea1851f38",
}
SMALL_PLAN = OpenPlan(cipher_lanes=16, mac_lanes=16, mac_steps=2)


@dataclass(frozen=True)
class Sealed:
    """One batch as it was sealed, and what it held."""

    plaintext: bytes
    ciphertext: torch.Tensor
    tags: list[bytes]
    key: bytes
    nonces: list[bytes]
    aads: list[bytes]
    chunk_bytes: int
    stride_bytes: int


def seal(
    num_bytes: int, *, chunk_bytes: int | None = None, aad_sizes: tuple[int, ...] = (12,), gap: int = 16
) -> Sealed:
    """Seal random bytes with another implementation, `gap` bytes between the chunks."""
    chunk = chunk_bytes or num_bytes
    plaintext, key = secrets.token_bytes(num_bytes), secrets.token_bytes(32)
    pieces = [plaintext[at : at + chunk] for at in range(0, num_bytes, chunk)] if num_bytes else [b""]
    nonces = [secrets.token_bytes(12) for _ in pieces]
    aads = [secrets.token_bytes(aad_sizes[i % len(aad_sizes)]) for i in range(len(pieces))]
    text, tags = bytearray(), []
    for piece, nonce, aad in zip(pieces, nonces, aads, strict=True):
        sealed = ChaCha20Poly1305(key).encrypt(nonce, piece, aad)
        text += sealed[:-16] + secrets.token_bytes(gap)
        tags.append(sealed[-16:])
    return Sealed(plaintext, as_tensor(bytes(text)), tags, key, nonces, aads, chunk, chunk + gap)


def as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def open_sealed(sealed: Sealed, plan: OpenPlan | None = None) -> bytes:
    out = torch.full((len(sealed.plaintext),), 0xA5, dtype=torch.uint8)
    op.open_into(
        sealed.ciphertext,
        sealed.tags,
        key=sealed.key,
        nonces=sealed.nonces,
        aads=sealed.aads,
        out=out,
        chunk_bytes=sealed.chunk_bytes if len(sealed.nonces) > 1 else None,
        stride_bytes=sealed.stride_bytes if len(sealed.nonces) > 1 else None,
        plan=plan,
    )
    return bytes(out.numpy())


def from_vector(vector: dict[str, str]) -> Sealed:
    raw = {name: bytes.fromhex(value) for name, value in vector.items()}
    plaintext = ChaCha20Poly1305(raw["key"]).decrypt(raw["nonce"], raw["ciphertext"] + raw["tag"], raw["aad"])
    text = as_tensor(raw["ciphertext"])
    return Sealed(plaintext, text, [raw["tag"]], raw["key"], [raw["nonce"]], [raw["aad"]], len(text), len(text))


@pytest.mark.parametrize("vector", [SECTION_2_8_2, APPENDIX_A_5], ids=["section 2.8.2", "appendix A.5"])
def test_published_vectors_open(vector):
    sealed = from_vector(vector)
    assert open_sealed(sealed) == sealed.plaintext
    assert sealed.plaintext == SUNSCREEN or sealed.plaintext.startswith(b"Internet-Drafts are draft documents")


def test_the_cipher_kernel_spells_the_keystream_of_section_2_4_2():
    key, nonce = bytes(range(32)), bytes.fromhex("000000000000004a00000000")
    expected = bytes.fromhex(
        "6e2e359a2568f98041ba0728dd0d6981e97e7aec1d4360c20a27afccfd9fae0bf91b65c5524733ab8f593dabcd62b3571639d624e65152ab"
        "8f530c359f0861d807ca0dbf500d6a6156a38e088a22b65e52bc514d16ccf806818ce91ab77937365af90bbf74a35be6b40b8eedf2785e42"
        "874d"
    )
    stream = bytes(reference.keystream(key, nonce, 1, 2).numpy())
    assert bytes(a ^ b for a, b in zip(SUNSCREEN, stream, strict=False)) == expected
    whole, out = torch.zeros(32, dtype=torch.int32), torch.empty(32, dtype=torch.int32)
    words = [op._to_words(data, whole.device) for data in (key, nonce)]
    chacha20.decrypt[(1,)](whole, *words, out, 8, 2, 2, LANES=16)
    assert bytes(out.view(torch.uint8).numpy()) == stream


@pytest.mark.parametrize(
    ("key", "message", "tag"),
    [
        # RFC 8439 section 2.5.2, then appendix A.3 vectors 7 to 11: sums that touch 2^128 and 2^130 - 5.
        (
            "85d6be7857556d337f4452fe42d506a80103808afb0db2fd4abff6af4149f51b",
            b"Cryptographic Forum Research Group".hex(),
            "a8061dc1305136c6c22b8baf0c0127a9",
        ),
        ("02" + "00" * 31, "ff" * 16, "03" + "00" * 15),
        ("02" + "00" * 15 + "ff" * 16, "02" + "00" * 15, "03" + "00" * 15),
        ("01" + "00" * 31, "ff" * 16 + "f0" + "ff" * 15 + "11" + "00" * 15, "05" + "00" * 15),
        ("01" + "00" * 31, "ff" * 16 + "fb" + "fe" * 15 + "01" * 16, "00" * 16),
        ("02" + "00" * 31, "fd" + "ff" * 15, "fa" + "ff" * 15),
    ],
)
def test_the_reference_mac_gives_the_published_tags(key, message, tag):
    assert reference.poly1305(bytes.fromhex(key), bytes.fromhex(message)).hex() == tag


def one_block_with_residue(residue: int) -> tuple[bytes, bytes]:
    """Find (r, 16-byte ciphertext) whose MAC, lengths included, is `residue` mod 2^130 - 5 before the pad."""
    prime, lengths = (1 << 130) - 5, (16 << 64) + (1 << 128)
    for seed in range(1, 1000):
        r = (seed * 0x1234567890ABCDEF1234567890ABCDEF) & 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF
        inverse = pow(r, -1, prime)
        block = (residue * inverse - lengths) * inverse % prime
        if block >> 128 == 1:
            return r.to_bytes(16, "little"), (block - (1 << 128)).to_bytes(16, "little")
    raise AssertionError("no such block")


@pytest.mark.parametrize("residue", [0, 1, 4, 5, (1 << 130) - 6, (1 << 128) - 1, 1 << 128])
def test_residues_at_the_modulus_reduce_exactly(residue):
    r, text = one_block_with_residue(residue)
    pad = bytes([0xFF] * 16)
    tag = ((residue + int.from_bytes(pad, "little")) & ((1 << 128) - 1)).to_bytes(16, "little")
    assert reference.poly1305(r + pad, text + bytes(8) + (16).to_bytes(8, "little")) == tag
    batch = op._Batch(as_tensor(text), 1, 16, 16, 16, SMALL_PLAN)
    one_time = op._to_words(r + pad, batch.text.device)
    assert op._check_tags(batch, op._tag_words([tag], batch.text.device), [b""], one_time).tolist() == [1]
    wrong = bytes([tag[0] ^ 1]) + tag[1:]
    assert op._check_tags(batch, op._tag_words([wrong], batch.text.device), [b""], one_time).tolist() == [0]


@pytest.mark.parametrize("seed", range(8))
def test_200_random_chunks_open_as_the_other_implementation_sealed_them(seed):
    generator = torch.Generator().manual_seed(seed)
    chunk = 64 * int(torch.randint(1, 8, (1,), generator=generator))
    last = int(torch.randint(1, chunk + 1, (1,), generator=generator))
    sizes = tuple(int(n) for n in torch.randint(0, 70, (5,), generator=generator))
    sealed = seal(24 * chunk + last, chunk_bytes=chunk, aad_sizes=sizes)
    assert len(sealed.nonces) == 25
    assert open_sealed(sealed, SMALL_PLAN) == sealed.plaintext


@pytest.mark.parametrize("num_bytes", [0, 1, 3, 7, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1001])
def test_odd_sizes_open_alone(num_bytes):
    sealed = seal(num_bytes, aad_sizes=(num_bytes % 33,))
    assert open_sealed(sealed) == sealed.plaintext
    chunk = sealed.ciphertext[:num_bytes]
    opened = reference.open_chunk(chunk, sealed.tags[0], key=sealed.key, nonce=sealed.nonces[0], aad=sealed.aads[0])
    assert bytes(opened.numpy()) == sealed.plaintext


def test_the_launch_shape_of_a_device_opens_many_segments():
    sealed = seal(32768 + 16384 + 4099, chunk_bytes=49152, aad_sizes=(200, 0))
    assert open_sealed(sealed, DEVICE_OPEN_PLAN) == sealed.plaintext


def test_a_megabyte_opens_in_place_of_a_parameter():
    sealed = seal(1 << 20)
    parameter = torch.nn.Parameter(torch.zeros(512, 1024, dtype=torch.bfloat16), requires_grad=False)
    target = parameter.data.view(-1).view(torch.uint8)
    op.open_into(
        sealed.ciphertext[: 1 << 20], sealed.tags, key=sealed.key, nonces=sealed.nonces, aads=sealed.aads, out=target
    )
    assert bytes(parameter.data.view(torch.uint8).numpy().tobytes()) == sealed.plaintext


def flip(data: bytes, bit: int) -> bytes:
    return data[: bit // 8] + bytes([data[bit // 8] ^ (1 << bit % 8)]) + data[bit // 8 + 1 :]


@pytest.mark.parametrize("field", ["ciphertext", "last byte", "tag", "tag's last bit", "key", "nonce", "aad", "no aad"])
def test_one_flipped_bit_in_any_field_leaves_no_plaintext(field):
    sealed = seal(256 + 100, chunk_bytes=256)
    text = bytes(sealed.ciphertext.numpy())
    forged = {
        "ciphertext": replace(sealed, ciphertext=as_tensor(flip(text, 8 * 17 + 3))),
        "last byte": replace(sealed, ciphertext=as_tensor(flip(text, 8 * (272 + 99)))),
        "tag": replace(sealed, tags=[flip(sealed.tags[0], 0), sealed.tags[1]]),
        "tag's last bit": replace(sealed, tags=[sealed.tags[0], flip(sealed.tags[1], 127)]),
        "key": replace(sealed, key=flip(sealed.key, 255)),
        "nonce": replace(sealed, nonces=[flip(sealed.nonces[0], 95), sealed.nonces[1]]),
        "aad": replace(sealed, aads=[sealed.aads[0], flip(sealed.aads[1], 0)]),
        "no aad": replace(sealed, aads=[sealed.aads[0], b""]),
    }[field]
    out = torch.full((len(sealed.plaintext),), 0xA5, dtype=torch.uint8)
    with pytest.raises(op.TagMismatchError) as caught:
        op.open_into(
            forged.ciphertext, forged.tags, key=forged.key, nonces=forged.nonces, aads=forged.aads, out=out,
            chunk_bytes=256, stride_bytes=272, plan=SMALL_PLAN,
        )  # fmt: skip
    first, second = field in ("ciphertext", "tag", "key", "nonce"), field in ("last byte", "tag's last bit", "key")
    assert caught.value.chunks == [i for i, bad in enumerate((first, second or field in ("aad", "no aad"))) if bad]
    assert bytes(out.numpy()) == b"\xa5" * len(sealed.plaintext)


def test_swapped_chunks_are_refused():
    sealed = seal(256, chunk_bytes=128, gap=0)
    text = bytes(sealed.ciphertext.numpy())
    with pytest.raises(op.TagMismatchError):
        open_sealed(replace(sealed, ciphertext=as_tensor(text[128:] + text[:128]), tags=sealed.tags[::-1]), SMALL_PLAN)


def test_a_shorter_text_under_the_same_tag_is_refused():
    sealed = seal(80)
    with pytest.raises(op.TagMismatchError):
        open_sealed(replace(sealed, plaintext=sealed.plaintext[:64]))


def test_the_error_names_no_secret():
    sealed = seal(64)
    with pytest.raises(op.TagMismatchError) as caught:
        open_sealed(replace(sealed, key=flip(sealed.key, 0)))
    assert sealed.key.hex() not in str(caught.value)
    assert "chunk 0" in str(caught.value)


def test_tags_may_come_as_a_tensor():
    sealed = seal(300, chunk_bytes=128)
    tags = torch.stack([as_tensor(tag) for tag in sealed.tags])
    assert open_sealed(replace(sealed, tags=tags), SMALL_PLAN) == sealed.plaintext


@pytest.mark.parametrize("offset", [1, 2, 8])
@pytest.mark.parametrize("step", [1, 2])
def test_tags_may_lie_anywhere_in_other_memory(offset, step):
    sealed = seal(300, chunk_bytes=128)
    memory = torch.zeros(offset + 3 * 16 * step, dtype=torch.uint8)
    tags = memory[offset:].view(3, 16 * step)[:, ::step]
    tags.copy_(torch.stack([as_tensor(tag) for tag in sealed.tags]))
    assert open_sealed(replace(sealed, tags=tags), SMALL_PLAN) == sealed.plaintext


@pytest.mark.parametrize("forged", [False, True])
def test_several_empty_chunks_are_verified(forged):
    key, nonces = bytes(range(32)), [bytes([n]) * 12 for n in range(3)]
    tags = [ChaCha20Poly1305(key).encrypt(nonce, b"", b"aad") for nonce in nonces]
    if forged:
        tags[2] = bytes(16)
    empty: dict[str, Any] = {"key": key, "nonces": nonces, "aads": [b"aad"] * 3, "chunk_bytes": 0}
    text, out = torch.zeros(0, dtype=torch.uint8), torch.zeros(0, dtype=torch.uint8)
    if not forged:
        op.open_into(text, tags, out=out, **empty)
        return
    with pytest.raises(op.TagMismatchError) as caught:
        op.open_into(text, tags, out=out, **empty)
    assert caught.value.chunks == [2]


def test_more_chunks_than_words_can_number_are_refused():
    with pytest.raises(ValueError, match="at most 134217728 chunks"):
        op._check_layout(0, 64, op.MAX_CHUNKS + 1, 64, 64)


def strided() -> torch.Tensor:
    return torch.zeros(256, dtype=torch.uint8)[::2]


def misaligned() -> torch.Tensor:
    return torch.zeros(256, dtype=torch.uint8)[1:129]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ciphertext": strided()}, "contiguous"),
        ({"out": strided()}, "contiguous"),
        ({"ciphertext": misaligned()}, "align it to 4"),
        ({"out": misaligned()}, "align it to 4"),
        ({"out": torch.zeros(32, dtype=torch.int32)}, "row of uint8"),
        ({"out": torch.zeros(2, 64, dtype=torch.uint8)}, "row of uint8"),
        ({"out": torch.zeros(128, dtype=torch.uint8, device="meta")}, "one device"),
        ({"key": bytes(31)}, "31 bytes"),
        ({"nonces": [bytes(11)]}, "12 bytes"),
        ({"nonces": [], "tags": [], "aads": []}, "no nonce"),
        ({"aads": []}, "0 associated data"),
        ({"aads": [bytes(op.MAX_AAD_BYTES + 1)]}, "longer than"),
        ({"tags": [bytes(15)]}, "16 bytes"),
        ({"tags": torch.zeros(1, 15, dtype=torch.uint8)}, r"\[chunks, 16\]"),
        ({"tags": torch.zeros((), dtype=torch.uint8)}, r"\[chunks, 16\]"),
        ({"chunk_bytes": 64}, "cannot fill"),
        ({"chunk_bytes": op.MAX_CHUNK_BYTES + 1}, "at most"),
        ({"ciphertext": torch.zeros(127, dtype=torch.uint8)}, "too few"),
        ({"nonces": [bytes(12)] * 2, "tags": [bytes(16)] * 2, "aads": [b""] * 2, "chunk_bytes": 96}, "multiple of 64"),
        (
            {
                "nonces": [bytes(12)] * 2,
                "tags": [bytes(16)] * 2,
                "aads": [b""] * 2,
                "chunk_bytes": 64,
                "stride_bytes": 8,
            },
            "no smaller",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_any_kernel_runs(change, message):
    arguments = {
        "ciphertext": torch.zeros(128, dtype=torch.uint8),
        "tags": [bytes(16)],
        "key": bytes(32),
        "nonces": [bytes(12)],
        "aads": [b""],
        "out": torch.zeros(128, dtype=torch.uint8),
        **change,
    }
    text, tags = arguments.pop("ciphertext"), arguments.pop("tags")
    with pytest.raises(ValueError, match=message) as caught:
        op.open_into(text, tags, **arguments)
    assert not isinstance(caught.value, op.TagMismatchError)


def test_overlapping_memory_is_refused():
    memory = torch.zeros(256, dtype=torch.uint8)
    with pytest.raises(ValueError, match="share memory"):
        op.open_into(memory[:128], [bytes(16)], key=bytes(32), nonces=[bytes(12)], aads=[b""], out=memory[64:192])


@pytest.mark.parametrize("forged", [False, True])
def test_key_material_on_the_device_is_wiped(monkeypatch, forged):
    """The key, the one-time keys, their powers and the sums made of them held something, and hold nothing after."""
    made: list[torch.Tensor] = []
    held: dict[int, bool] = {}
    empty, zero, view = torch.empty, torch.Tensor.zero_, torch.frombuffer

    def keep(tensor):
        made.append(tensor)
        return tensor

    def watch(self):
        held[self.data_ptr()] = held.get(self.data_ptr(), False) or bool(self.any())
        return zero(self)

    sealed = seal(5000)
    key_words = view(bytearray(sealed.key), dtype=torch.int32)
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: keep(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "frombuffer", lambda *args, **kwargs: keep(view(*args, **kwargs)))
    monkeypatch.setattr(torch.Tensor, "zero_", watch)
    tags = [bytes(16)] * len(sealed.tags) if forged else sealed.tags
    try:
        open_sealed(replace(sealed, tags=tags))
    except op.TagMismatchError:
        assert forged
    secret = [tensor for tensor in made if tensor.data_ptr() in held]
    assert len(secret) == 4, "key, one-time keys, powers, sums"
    assert all(held[tensor.data_ptr()] for tensor in secret), "what was wiped held nothing, so this shows nothing"
    assert not any(tensor.any() for tensor in secret)
    assert not any(tensor.dtype == torch.int32 and tensor.equal(key_words) for tensor in made)
