"""The on-disk format of a sealed model: parse and marshal, strictly; no cryptography (docs/specs/sealed-model.md)."""

from __future__ import annotations

import base64
import binascii
import json
import re
import struct
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any, Final

from server.errors import SealError

FORMAT: Final = "strongroom.sealed-model"
FORMAT_VERSION: Final = 1
MAGIC: Final = b"SRSHARD1"
HEADER_BYTES: Final = 96
TAG_BYTES: Final = 16
DIGEST_BYTES: Final = 32

DEFAULT_CHUNK_BYTES: Final = 1 << 20
MIN_CHUNK_BYTES: Final = 1 << 16
MAX_CHUNK_BYTES: Final = 1 << 24
MAX_INDEX_BYTES: Final = 1 << 24
MAX_CHUNKS: Final = 1 << 22
MAX_PAYLOAD_BYTES: Final = 1 << 42
MAX_SHARDS: Final = 1 << 10
MAX_FILES: Final = 1 << 12
MAX_FILE_BYTES: Final = 1 << 28
MAX_JSON_BYTES: Final = 1 << 22
MAX_RECIPIENTS: Final = 16

CORE_NAME: Final = "core.json"
MANIFEST_NAME: Final = "manifest.json"
RECIPIENTS_NAME: Final = "recipients.json"
SIGNATURE_NAME: Final = "model.sig"
FILES_SHARD_NAME: Final = "files.sealed"
RECIPIENTS_TMP_NAME: Final = "recipients.json.tmp"

_HEADER = struct.Struct("<8sIIIIQQQ32s16s")
_MODEL_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}\Z")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}\Z")
_HEX32 = re.compile(r"[0-9a-f]{32}\Z")
_HEX64 = re.compile(r"[0-9a-f]{64}\Z")

# safetensors' names, with bytes an element; torch is not needed to know them.
DTYPE_BYTES: Final[dict[str, int]] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


class Suite(StrEnum):
    """AEADs of format version 1."""

    AES_256_GCM = "aes-256-gcm"
    CHACHA20_POLY1305 = "chacha20-poly1305"


class Kind(IntEnum):
    """What a shard holds."""

    WEIGHTS = 1
    FILES = 2


@dataclass(frozen=True, slots=True)
class Core:
    """What never changes once sealed; its digest is bound into every chunk."""

    model_id: str
    version: int
    seal_id: str
    suite: Suite
    chunk_bytes: int
    dtype: str
    quantization: str


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """The first 96 bytes of a shard. Offsets of what follows derive from it."""

    kind: Kind
    shard: int
    num_shards: int
    chunk_bytes: int
    num_chunks: int
    index_bytes: int
    payload_bytes: int
    core_digest: bytes

    @property
    def payload_offset(self) -> int:
        """Where chunk 1 begins in the file."""
        return HEADER_BYTES + self.index_bytes

    @property
    def tags_offset(self) -> int:
        """Where the tag table begins in the file."""
        return self.payload_offset + self.payload_bytes

    @property
    def file_bytes(self) -> int:
        """The only size that the file may have."""
        return self.tags_offset + TAG_BYTES * self.num_chunks


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One tensor of a shard, or one file in a shard of files."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Index:
    """The encrypted table of contents of one shard."""

    entries: tuple[IndexEntry, ...]
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """What the manifest says of one shard; digests are lowercase hex."""

    name: str
    num_bytes: int
    sha256: str
    tags_sha256: str


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What the manifest says of one plain file."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything in the folder, by digest; this is what the signature covers."""

    core_sha256: str
    key_check: str
    shards: tuple[ShardRecord, ...]
    files: tuple[FileRecord, ...]
    lineage: dict[str, str]
    licence: str


@dataclass(frozen=True, slots=True)
class Recipient:
    """The data key, wrapped under one key of one key service. Holds no address on purpose: it is not signed."""

    kms: str
    key_id: str
    wrapped: bytes
    params: dict[str, str] = field(default_factory=dict)


def shard_name(shard: int, num_shards: int) -> str:
    """Return the file name of a weights shard, counted from 0."""
    return f"model-{shard + 1:05d}-of-{num_shards:05d}.sealed"


def canonical_json(value: dict[str, Any]) -> bytes:
    """Return the one encoding of `value` that the format accepts."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def parse_canonical(data: bytes, what: str, *, limit_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Parse canonical JSON; `what` names the file in the error.

    Raises:
        SealError: Not JSON, not an object, not canonical, or over the limit; kind `header`.
    """
    if len(data) > limit_bytes:
        raise SealError(f"{what}: {len(data)} bytes, at most {limit_bytes} are accepted", kind="header")
    try:
        value = json.loads(data.decode(), parse_float=_refuse_number, parse_constant=_refuse_number)
        canonical = canonical_json(value) if isinstance(value, dict) else b""
    except (ValueError, RecursionError) as err:
        raise SealError(f"{what}: not valid JSON", kind="header") from err
    # A repeated key, a blank or another order all fail here: they do not survive the round trip.
    if not isinstance(value, dict) or canonical != data:
        raise SealError(f"{what}: not one JSON object in canonical form", kind="header")
    return value


def marshal_core(core: Core) -> bytes:
    """Return `core.json`."""
    return canonical_json(
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "model_id": core.model_id,
            "version": core.version,
            "seal_id": core.seal_id,
            "suite": core.suite.value,
            "chunk_bytes": core.chunk_bytes,
            "dtype": core.dtype,
            "quantization": core.quantization,
        }
    )


def parse_core(data: bytes) -> Core:
    """Parse `core.json`.

    Raises:
        SealError: Kind `header`.
    """
    fields = _Fields(CORE_NAME, parse_canonical(data, CORE_NAME))
    if fields.text("format") != FORMAT:
        raise fields.error("format", f"expected {FORMAT!r}")
    fields.format_version()
    suite = fields.text("suite")
    if suite not in set(Suite):
        raise fields.error("suite", f"{suite!r} is not one of {', '.join(Suite)}")
    core = Core(
        model_id=fields.matching("model_id", _MODEL_ID),
        version=fields.integer("version", minimum=1),
        seal_id=fields.matching("seal_id", _HEX32),
        suite=Suite(suite),
        chunk_bytes=fields.integer("chunk_bytes", minimum=MIN_CHUNK_BYTES, maximum=MAX_CHUNK_BYTES),
        dtype=fields.text("dtype"),
        quantization=fields.text("quantization"),
    )
    if core.chunk_bytes & (core.chunk_bytes - 1):
        raise fields.error("chunk_bytes", "not a power of two")
    fields.end()
    return core


def marshal_header(header: ShardHeader) -> bytes:
    """Return the 96 bytes that open a shard."""
    return _HEADER.pack(
        MAGIC,
        header.kind,
        header.shard,
        header.num_shards,
        header.chunk_bytes,
        header.num_chunks,
        header.index_bytes,
        header.payload_bytes,
        header.core_digest,
        bytes(16),
    )


def parse_header(data: bytes, name: str) -> ShardHeader:
    """Parse the 96 bytes that open a shard; `name` is the file's, for errors.

    Raises:
        SealError: Kind `header`.
    """
    if len(data) != HEADER_BYTES:
        raise SealError(f"{name}: {len(data)} bytes of header, expected {HEADER_BYTES}", kind="header")
    magic, kind, shard, num_shards, chunk_bytes, num_chunks, index_bytes, payload_bytes, digest, zero = _HEADER.unpack(
        data
    )
    checks = (
        ("magic", magic == MAGIC),
        ("kind", kind in set(Kind)),
        ("number of shards", 1 <= num_shards <= MAX_SHARDS),
        ("shard number", shard < num_shards),
        ("chunk size", MIN_CHUNK_BYTES <= chunk_bytes <= MAX_CHUNK_BYTES),
        ("number of chunks", 1 <= num_chunks <= MAX_CHUNKS),
        ("index size", 1 <= index_bytes <= MAX_INDEX_BYTES),
        ("payload size", payload_bytes <= MAX_PAYLOAD_BYTES),
        ("reserved bytes", zero == bytes(16)),
    )
    for what, good in checks:
        if not good:
            raise SealError(f"{name}: header: {what} is not acceptable", kind="header")
    return ShardHeader(Kind(kind), shard, num_shards, chunk_bytes, num_chunks, index_bytes, payload_bytes, digest)


def marshal_index(index: Index) -> bytes:
    """Return the plaintext of chunk 0."""
    return canonical_json(
        {
            "metadata": index.metadata,
            "tensors": [
                {"name": e.name, "dtype": e.dtype, "shape": list(e.shape), "bytes": e.num_bytes} for e in index.entries
            ],
        }
    )


def parse_index(data: bytes, header: ShardHeader, name: str) -> Index:
    """Parse the plaintext of chunk 0 and hold it against the shard's header.

    Raises:
        SealError: Kind `header`.
    """
    what = f"{name}: index"
    fields = _Fields(what, parse_canonical(data, what, limit_bytes=MAX_INDEX_BYTES))
    metadata = fields.texts("metadata")
    entries = []
    for position, item in enumerate(fields.items("tensors")):
        entry = _Fields(f"{what}: tensor {position}", item)
        shape = entry.integers("shape")
        dtype = entry.text("dtype")
        if dtype not in DTYPE_BYTES:
            raise entry.error("dtype", "not known")
        entries.append(IndexEntry(entry.text("name"), dtype, shape, entry.integer("bytes")))
        entry.end()
        num_elements = 1
        for size in shape:
            num_elements *= size
        if num_elements * DTYPE_BYTES[dtype] != entries[-1].num_bytes:
            raise entry.error("bytes", "does not fit shape and dtype")
    fields.end()
    if header.kind is Kind.FILES and any(not _FILE_NAME.match(e.name) for e in entries):
        raise SealError(f"{what}: a file's name is not acceptable", kind="header")
    if len({e.name for e in entries}) != len(entries):
        raise SealError(f"{what}: a name appears twice", kind="header")
    if sum(e.num_bytes for e in entries) != header.payload_bytes:
        raise SealError(f"{what}: tensors do not add up to the payload", kind="header")
    if 1 + sum(num_pieces(e.num_bytes, header.chunk_bytes) for e in entries) != header.num_chunks:
        raise SealError(f"{what}: tensors do not add up to the number of chunks", kind="header")
    return Index(tuple(entries), metadata)


def num_pieces(num_bytes: int, chunk_bytes: int) -> int:
    """Return how many chunks a tensor of `num_bytes` takes; an empty one takes none."""
    return -(-num_bytes // chunk_bytes)


def marshal_manifest(manifest: Manifest) -> bytes:
    """Return `manifest.json`."""
    return canonical_json(
        {
            "format_version": FORMAT_VERSION,
            "core_sha256": manifest.core_sha256,
            "key_check": manifest.key_check,
            "shards": [
                {"name": s.name, "bytes": s.num_bytes, "sha256": s.sha256, "tags_sha256": s.tags_sha256}
                for s in manifest.shards
            ],
            "files": [{"name": f.name, "bytes": f.num_bytes, "sha256": f.sha256} for f in manifest.files],
            "lineage": manifest.lineage,
            "licence": manifest.licence,
        }
    )


def parse_manifest(data: bytes) -> Manifest:
    """Parse `manifest.json`.

    Raises:
        SealError: Kind `header`.
    """
    fields = _Fields(MANIFEST_NAME, parse_canonical(data, MANIFEST_NAME))
    fields.format_version()
    shards = []
    for position, item in enumerate(fields.items("shards", maximum=MAX_SHARDS + 1)):
        entry = _Fields(f"{MANIFEST_NAME}: shard {position}", item)
        shards.append(
            ShardRecord(
                name=entry.matching("name", _FILE_NAME),
                num_bytes=entry.integer("bytes"),
                sha256=entry.matching("sha256", _HEX64),
                tags_sha256=entry.matching("tags_sha256", _HEX64),
            )
        )
        entry.end()
    files = []
    for position, item in enumerate(fields.items("files", maximum=MAX_FILES)):
        entry = _Fields(f"{MANIFEST_NAME}: file {position}", item)
        files.append(
            FileRecord(
                name=entry.matching("name", _FILE_NAME),
                num_bytes=entry.integer("bytes", maximum=MAX_FILE_BYTES),
                sha256=entry.matching("sha256", _HEX64),
            )
        )
        entry.end()
    manifest = Manifest(
        core_sha256=fields.matching("core_sha256", _HEX64),
        key_check=fields.matching("key_check", _HEX64),
        shards=tuple(shards),
        files=tuple(files),
        lineage=fields.texts("lineage"),
        licence=fields.text("licence"),
    )
    fields.end()
    _check_shard_names(manifest)
    return manifest


def _check_shard_names(manifest: Manifest) -> None:
    """Names are fixed by position, so that a manifest can't point two shards at one file or outside the folder."""
    weights = [s.name for s in manifest.shards if s.name != FILES_SHARD_NAME]
    expected = [shard_name(i, len(weights)) for i in range(len(weights))]
    if not weights or [s.name for s in manifest.shards] not in (expected, [*expected, FILES_SHARD_NAME]):
        raise SealError(f"{MANIFEST_NAME}: shards are not named and ordered as the format says", kind="header")
    names = [f.name for f in manifest.files]
    if names != sorted(set(names)):
        raise SealError(f"{MANIFEST_NAME}: files are not sorted by name, or one appears twice", kind="header")
    reserved = {CORE_NAME, MANIFEST_NAME, RECIPIENTS_NAME, SIGNATURE_NAME, RECIPIENTS_TMP_NAME}
    if reserved.intersection(names) or any(n.endswith(".sealed") for n in names):
        raise SealError(f"{MANIFEST_NAME}: a plain file has a reserved name", kind="header")


def marshal_recipients(core_sha256: str, recipients: tuple[Recipient, ...]) -> bytes:
    """Return `recipients.json`."""
    return canonical_json(
        {
            "format_version": FORMAT_VERSION,
            "core_sha256": core_sha256,
            "recipients": [
                {
                    "kms": r.kms,
                    "key_id": r.key_id,
                    "params": r.params,
                    "wrapped": base64.b64encode(r.wrapped).decode(),
                }
                for r in recipients
            ],
        }
    )


def parse_recipients(data: bytes) -> tuple[str, tuple[Recipient, ...]]:
    """Parse `recipients.json` into the core digest it names (hex) and the recipients.

    Raises:
        SealError: Kind `header`.
    """
    fields = _Fields(RECIPIENTS_NAME, parse_canonical(data, RECIPIENTS_NAME))
    fields.format_version()
    core_sha256 = fields.matching("core_sha256", _HEX64)
    recipients = []
    for position, item in enumerate(fields.items("recipients", maximum=MAX_RECIPIENTS)):
        entry = _Fields(f"{RECIPIENTS_NAME}: recipient {position}", item)
        try:
            encoded = entry.text("wrapped")
            wrapped = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError) as err:
            raise entry.error("wrapped", "not base64") from err
        if base64.b64encode(wrapped).decode() != encoded:
            raise entry.error("wrapped", "not canonical base64")
        recipients.append(Recipient(entry.text("kms"), entry.text("key_id"), wrapped, entry.texts("params")))
        entry.end()
    fields.end()
    if not recipients:
        raise SealError(f"{RECIPIENTS_NAME}: no recipient, so nobody can open this model", kind="header")
    return core_sha256, tuple(recipients)


def _refuse_number(text: str) -> None:
    raise ValueError(f"only integers are accepted, not {text[:20]!r}")


class _Fields:
    """Takes an object apart key by key; `end` refuses what is left over."""

    def __init__(self, what: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise SealError(f"{what}: not an object", kind="header")
        self._what = what
        self._left = dict(value)

    def error(self, key: str, problem: str) -> SealError:
        return SealError(f"{self._what}: {key}: {problem}", kind="header")

    def _take(self, key: str) -> Any:
        if key not in self._left:
            raise self.error(key, "missing")
        return self._left.pop(key)

    def text(self, key: str) -> str:
        value = self._take(key)
        if not isinstance(value, str):
            raise self.error(key, "not a string")
        return value

    def matching(self, key: str, pattern: re.Pattern[str]) -> str:
        value = self.text(key)
        if not pattern.match(value):
            raise self.error(key, f"does not match {pattern.pattern}")
        return value

    def integer(self, key: str, *, minimum: int = 0, maximum: int = (1 << 53) - 1) -> int:
        value = self._take(key)
        if type(value) is not int or not minimum <= value <= maximum:
            raise self.error(key, f"not an integer in [{minimum}, {maximum}]")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        values = self._take(key)
        if not isinstance(values, list) or any(type(v) is not int or not 0 <= v < 1 << 53 for v in values):
            raise self.error(key, "not a list of sizes")
        return tuple(values)

    def texts(self, key: str) -> dict[str, str]:
        value = self._take(key)
        if not isinstance(value, dict) or any(not isinstance(v, str) for v in value.values()):
            raise self.error(key, "not an object of strings")
        return value

    def items(self, key: str, *, maximum: int = MAX_CHUNKS) -> list[Any]:
        value = self._take(key)
        if not isinstance(value, list) or len(value) > maximum:
            raise self.error(key, f"not a list of at most {maximum}")
        return value

    def format_version(self) -> None:
        version = self._take("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise self.error("format_version", f"this reader knows {FORMAT_VERSION} only")

    def end(self) -> None:
        if self._left:
            raise SealError(f"{self._what}: unknown keys {sorted(self._left)[:5]}", kind="header")
