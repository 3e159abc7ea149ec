"""Chunked AEAD over one shard (STREAM construction); knows no file and no key service."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from server.errors import SealError
from server.sealed.format import ShardHeader, Suite, marshal_header

if TYPE_CHECKING:
    from server.sealed.format import Kind

Bytes = bytes | bytearray | memoryview
_SHARD_LABEL: Final = b"strongroom/v1/shard"


def derive_shard_key(data_key: Bytes, *, core_digest: bytes, kind: Kind, shard: int) -> bytes:
    """Return the 32-byte key of one shard; each chunk number is sealed once under it."""
    info = _SHARD_LABEL + int(kind).to_bytes(4, "little") + shard.to_bytes(4, "little")
    return HKDF(algorithm=SHA256(), length=32, salt=core_digest, info=info).derive(bytes(data_key))


class ShardCipher:
    """Seals and opens the chunks of one shard. Thread-safe: holds no state between chunks.

    Args:
        suite: Which AEAD.
        data_key: The model's 32-byte data key.
        header: The shard's header; all of it is bound into every chunk.
        name: The shard's file name, for errors.
    """

    def __init__(self, suite: Suite, data_key: Bytes, header: ShardHeader, name: str) -> None:
        key = derive_shard_key(data_key, core_digest=header.core_digest, kind=header.kind, shard=header.shard)
        self._aead: AESGCM | ChaCha20Poly1305 = AESGCM(key) if suite is Suite.AES_256_GCM else ChaCha20Poly1305(key)
        # A device opens the second suite only; for the first no second copy of the key is kept.
        self.device_key = key if suite is Suite.CHACHA20_POLY1305 else None
        self._header = marshal_header(header)
        self._num_chunks = header.num_chunks
        self._name = name

    def nonce_and_aad(self, chunk: int) -> tuple[bytes, bytes]:
        """Return what chunk number `chunk` is sealed with besides the key."""
        # The nonce is a counter: the key is fresh for every shard of every seal and used for one pass.
        final = bytes([chunk == self._num_chunks - 1])
        return chunk.to_bytes(11, "big") + final, self._header + chunk.to_bytes(8, "little") + final

    def seal_into(self, chunk: int, plaintext: Bytes, ciphertext_and_tag: Bytes) -> None:
        """Seal chunk number `chunk`; the output is 16 bytes longer than `plaintext`."""
        nonce, aad = self.nonce_and_aad(chunk)
        self._aead.encrypt_into(nonce, plaintext, aad, ciphertext_and_tag)

    def open_into(self, chunk: int, ciphertext_and_tag: Bytes, destination: memoryview) -> None:
        """Open chunk number `chunk` into `destination`, which is exactly 16 bytes shorter.

        Raises:
            SealError: The tag is wrong; `destination` has been zeroed. Kind `payload`.
        """
        nonce, aad = self.nonce_and_aad(chunk)
        try:
            self._aead.decrypt_into(nonce, ciphertext_and_tag, aad, destination)
        except InvalidTag as err:
            # The library leaves the unauthenticated plaintext behind.
            destination[:] = bytes(len(destination))
            raise SealError(
                f"{self._name}: chunk {chunk} of {self._num_chunks}: authentication failed", kind="payload"
            ) from err
