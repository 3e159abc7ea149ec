"""What goes in comes out, in both suites; what was not sealed for you does not."""

from __future__ import annotations

import json
import socket
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from server.engine.vllm.weights import KeyChannel
from server.errors import ConfigError, KMSDeniedError, KMSDisabledError, KMSError, SealError, StartError
from server.sealed.agent import KEY_REQUEST, KeyAgent
from server.sealed.format import Suite
from server.sealed.kms.local import LocalKMS, create_key_file
from server.sealed.memory import HUGE_PAGE_BYTES
from server.sealed.model import open_pinned, open_sealed, verify_bytes
from server.sealed.shard import ShardReader
from server.sealed.source import MemoryShard, load_source, prepare
from tests.unit.sealed.workshop import Workshop, load, open_workshop, plaintext, small_source, tensor

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return open_workshop(tmp_path)


@pytest.mark.parametrize("suite", list(Suite))
@pytest.mark.parametrize("threads", [0, 3])
def test_tensors_survive(workshop: Workshop, suite: Suite, threads: int) -> None:
    path = workshop.seal(suite=suite)
    pool = ThreadPoolExecutor(threads) if threads else None
    assert load(path, workshop, pool=pool) == plaintext(small_source())


def test_two_threads_never_share_a_large_page(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk_bytes, pieces_a_page = 1 << 20, HUGE_PAGE_BYTES >> 20
    source = prepare([MemoryShard([tensor("large", (9_000, 512))])], {"config.json": b'{"dtype": "bfloat16"}'})
    both_began = threading.Barrier(2)
    opened: dict[int, int] = {}
    inner = ShardReader._open_chunk

    def open_chunk(self: ShardReader, chunk: int, file_offset: int, destination: memoryview) -> None:
        thread, is_first = threading.get_ident(), threading.get_ident() not in opened.values()
        if chunk > 0:  # 0 is the index
            opened[chunk] = thread
            if is_first:
                both_began.wait(60)
        inner(self, chunk, file_offset, destination)

    monkeypatch.setattr(ShardReader, "_open_chunk", open_chunk)
    with ThreadPoolExecutor(1) as pool:
        loaded = load(workshop.seal(source=source, chunk_bytes=chunk_bytes), workshop, pool=pool)
    assert loaded == plaintext(source)
    by_piece = [opened[chunk] for chunk in range(1, 10)]
    assert len(set(by_piece)) == 2
    pages = [by_piece[first : first + pieces_a_page] for first in range(0, 9, pieces_a_page)]
    assert all(len(set(page)) == 1 for page in pages)


def test_any_range_of_a_tensor_can_be_read(workshop: Workshop) -> None:
    path = workshop.seal()
    whole = plaintext(small_source())["embed"]
    agent = KeyAgent(services=[workshop.kms], trusted_signers=workshop.trusted, record=lambda _tag, **_fields: None)
    release = agent.release(path)
    shard = release.model.weights[0]
    with ShardReader(path, shard, release.model.core, release.data_key.reveal()) as reader:
        for start, end in [
            (0, 0),
            (0, 1),
            (65535, 65537),
            (1000, 150_000),
            (65536, 131072),
            (len(whole) - 3, len(whole)),
        ]:
            buffer = bytearray(end - start)
            reader.read_into("embed", memoryview(buffer), start)
            assert buffer == whole[start:end]
        with pytest.raises(ValueError, match="not inside"):
            reader.read_into("embed", memoryview(bytearray(2)), len(whole) - 1)


def test_no_name_shape_or_plaintext_is_on_disk(workshop: Workshop) -> None:
    path = workshop.seal(seal_files=True)
    on_disk = b"".join(p.read_bytes() for p in path.iterdir())
    for name, content in plaintext(small_source()).items():
        assert len(name) < 5 or name.encode() not in on_disk
        assert not content or len(content) < 16 or content[:16] not in on_disk
    assert b"model_type" not in on_disk
    assert {p.name for p in path.iterdir()} == {
        "core.json", "manifest.json", "model.sig", "recipients.json", "files.sealed",
        "model-00001-of-00002.sealed", "model-00002-of-00002.sealed",
    }  # fmt: skip


def test_two_seals_share_nothing(workshop: Workshop) -> None:
    first, second = workshop.seal("a"), workshop.seal("b")
    name = "model-00001-of-00002.sealed"
    a, b = (first / name).read_bytes(), (second / name).read_bytes()
    assert len(a) == len(b)
    assert sum(x == y for x, y in zip(a[96:], b[96:], strict=True)) < len(a) / 128


def test_verify_bytes_accepts_the_untouched(workshop: Workshop) -> None:
    seen: list[int] = []
    model = open_sealed(workshop.seal(), trusted_signers=workshop.trusted)
    verify_bytes(model, progress=seen.append)
    assert sum(seen) == sum(s.record.num_bytes for s in model.shards)


def test_foreign_signer_and_unsigned_are_refused_unless_allowed(workshop: Workshop, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    stranger = open_workshop(other)
    signed, unsigned = workshop.seal("signed"), workshop.seal("unsigned", signer=None)
    for path in (signed, unsigned):
        with pytest.raises(SealError) as refused:
            open_sealed(path, trusted_signers=stranger.trusted)
        assert refused.value.kind == "signature"
        assert str(refused.value) == "The sealed model was refused."
        assert open_sealed(path, trusted_signers=stranger.trusted, allow_unsigned=True).signer is None


def test_version_below_the_floor_is_refused(workshop: Workshop) -> None:
    path = workshop.seal(version=4)
    assert open_sealed(path, trusted_signers=workshop.trusted, floor=4).core.version == 4
    with pytest.raises(SealError) as refused:
        open_sealed(path, trusted_signers=workshop.trusted, floor=5)
    assert refused.value.kind == "version"


def test_wrong_key_and_another_models_wrapped_key_are_refused(workshop: Workshop, tmp_path: Path) -> None:
    path, other = workshop.seal("a", model_id="one"), workshop.seal("b", model_id="two")
    key = tmp_path / "second.key"
    create_key_file(key)
    events: list[tuple[str, dict[str, object]]] = []

    def release(services: list[LocalKMS]) -> None:
        events.clear()
        agent = KeyAgent(
            services=services,
            trusted_signers=workshop.trusted,
            record=lambda tag, **fields: events.append((tag, fields)),
        )
        agent.release(path)

    with pytest.raises(SealError) as refused:
        release([LocalKMS(key)])
    assert refused.value.kind == "key"
    assert [tag for tag, _ in events] == ["weights:key:requested", "weights:key:refused"]
    foreign = json.loads((other / "recipients.json").read_bytes())
    own = json.loads((path / "recipients.json").read_bytes())
    foreign["core_sha256"] = own["core_sha256"]
    (path / "recipients.json").write_text(json.dumps(foreign, sort_keys=True, separators=(",", ":")))
    with pytest.raises(KMSDeniedError, match="does not open"):
        release([workshop.kms])
    assert [tag for tag, _ in events] == ["weights:key:requested", "weights:key:refused"]


def test_the_intent_is_durable_before_the_key_service_is_asked(workshop: Workshop) -> None:
    def fail(_tag: str, /, **_fields: object) -> None:
        raise KMSError("the log cannot be written")

    class Untouchable:
        mechanism, key_id = workshop.kms.mechanism, workshop.kms.key_id

        def unwrap(self, *_: object) -> None:
            raise AssertionError("asked before the record was durable")

    path = workshop.seal()
    agent = KeyAgent(services=[Untouchable()], trusted_signers=workshop.trusted, record=fail)  # type: ignore[list-item]
    with pytest.raises(KMSError, match="log cannot"):
        agent.release(path)


def test_each_worker_gets_the_key_once(workshop: Workshop) -> None:
    events: list[str] = []
    agent = KeyAgent(
        services=[workshop.kms], trusted_signers=workshop.trusted, record=lambda tag, **_: events.append(tag)
    )
    release = agent.release(workshop.seal())
    key = bytes(release.data_key.reveal())
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    thread = agent.serve(ours, release, num_workers=2)
    with theirs:
        for _ in range(2):
            theirs.send(KEY_REQUEST)
            assert theirs.recv(100) == key
        theirs.send(KEY_REQUEST)
        assert theirs.recv(100).startswith(b"!")
        theirs.send(b"loaded")
        assert theirs.recv(100) == b"accepted"
        theirs.send(b"!model-00001-of-00002.sealed: chunk 1")
    thread.join(5)
    assert not thread.is_alive()
    assert events[-2:] == ["weights:model:loaded", "weights:model:refused"]
    assert release.data_key.reveal() == bytes(32)
    assert "redacted" in repr(release.data_key)


def test_a_load_that_cannot_be_put_on_record_is_not_accepted(workshop: Workshop) -> None:
    def fail_at_the_end(tag: str, **_: object) -> None:
        if tag == "weights:model:loaded":
            raise KMSError("the log cannot be written")

    agent = KeyAgent(services=[workshop.kms], trusted_signers=workshop.trusted, record=fail_at_the_end)
    release = agent.release(workshop.seal())
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    thread = agent.serve(ours, release)
    channel = KeyChannel(theirs)
    channel.fetch_key().close()
    with pytest.raises(StartError, match="kms_error"):
        channel.confirm_load()
    channel.close()
    thread.join(5)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.close()  # nor where nobody answers
    channel = KeyChannel(theirs)
    with pytest.raises(StartError, match="did not confirm"):
        channel.confirm_load()
    channel.close()


def test_pinned_open_refuses_another_manifest(workshop: Workshop) -> None:
    first, second = workshop.seal("a"), workshop.seal("b")
    pinned = open_sealed(first, trusted_signers=workshop.trusted).manifest_digest.hex()
    assert open_pinned(first, manifest_sha256=pinned).core.model_id == "tiny"
    with pytest.raises(SealError, match="refused"):
        open_pinned(second, manifest_sha256=pinned)


def test_a_failing_seal_leaves_nothing(workshop: Workshop) -> None:
    def stop(_num_bytes: int) -> None:
        raise KeyboardInterrupt

    before = sorted(workshop.folder.iterdir())
    with pytest.raises(KeyboardInterrupt):
        workshop.seal(progress=stop)
    assert sorted(workshop.folder.iterdir()) == before
    with pytest.raises(ConfigError, match="at least one key service"):
        workshop.seal(services=[])
    workshop.seal()
    with pytest.raises(ConfigError, match="never overwritten"):
        workshop.seal()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a.pt", "x.pkl", "modeling.py", "lib.so", "odd.xyz"])
def test_pickle_and_code_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ConfigError, match=name):
        load_source(tmp_path)


def test_a_pickle_under_another_name_and_remote_code_are_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_bytes(b"\x80\x04rest")
    with pytest.raises(ConfigError, match=r"vocab\.txt"):
        load_source(tmp_path)
    with pytest.raises(ConfigError, match="auto_map"):
        prepare([], {"config.json": b'{"auto_map": {"AutoModel": "x--y.Z"}}'})


def test_local_key_file_with_passphrase(tmp_path: Path, workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.sealed.kms.local._SCRYPT_LOG2_N", 14)
    key = tmp_path / "locked.key"
    create_key_file(key, passphrase="correct horse")
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    with pytest.raises(KMSDeniedError, match="under a passphrase"):
        LocalKMS(key)
    with pytest.raises(KMSDeniedError, match="does not open"):
        LocalKMS(key, passphrase=lambda: "wrong")
    locked = LocalKMS(key, passphrase=lambda: "correct horse")
    path = workshop.seal(services=[locked])
    assert load(path, Workshop(tmp_path, locked, workshop.signer)) == plaintext(small_source())
    key.unlink()
    with pytest.raises(KMSDisabledError, match="gone"):
        load(path, Workshop(tmp_path, locked, workshop.signer))


def test_local_key_file_must_be_private(tmp_path: Path) -> None:
    key = tmp_path / "open.key"
    create_key_file(key)
    with pytest.raises(KMSError, match="exists already"):
        create_key_file(key)
    key.chmod(0o640)
    with pytest.raises(KMSError, match="chmod 600"):
        LocalKMS(key)
    link = tmp_path / "link.key"
    key.chmod(0o600)
    link.symlink_to(key)
    with pytest.raises(KMSError, match="cannot be read"):
        LocalKMS(link)
    key.write_bytes(b"{}")
    with pytest.raises(KMSError, match="not one that"):
        LocalKMS(key)
