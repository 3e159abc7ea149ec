"""Whatever the sizes and the launch shape, the kernels open what the reference opens."""

from __future__ import annotations

import torch
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import given, settings
from hypothesis import strategies as st

from serving_kernels import chacha20_poly1305 as op
from serving_kernels.launch import OpenPlan


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    plaintext=st.binary(max_size=1500),
    aad=st.binary(max_size=80),
    key=st.binary(min_size=32, max_size=32),
    nonce=st.binary(min_size=12, max_size=12),
    lanes=st.sampled_from([1, 2, 16, 64]),
    steps=st.sampled_from([1, 2, 8]),
)
def test_any_chunk_opens_under_any_launch_shape(plaintext, aad, key, nonce, lanes, steps):
    sealed = ChaCha20Poly1305(key).encrypt(nonce, plaintext, aad)
    text = torch.frombuffer(bytearray(sealed), dtype=torch.uint8)
    out = torch.empty(len(plaintext), dtype=torch.uint8)
    plan = OpenPlan(cipher_lanes=lanes, mac_lanes=lanes, mac_steps=steps)
    op.open_into(text, [sealed[-16:]], key=key, nonces=[nonce], aads=[aad], out=out, plan=plan)
    assert bytes(out.numpy()) == plaintext
