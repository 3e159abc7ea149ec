"""Merkle trees and proofs against the definitions of RFC 6962, written out."""

from __future__ import annotations

from hashlib import sha256

import pytest

from server.audit.merkle import (
    EMPTY_ROOT,
    ProofError,
    Tree,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    verify_consistency,
    verify_inclusion,
)

LEAVES = [leaf_hash(b"entry %d" % number) for number in range(600)]


def mth(leaves: list[bytes]) -> bytes:
    """RFC 6962, section 2.1, as it is written there."""
    if not leaves:
        return sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return sha256(b"\x01" + mth(leaves[:split]) + mth(leaves[split:])).digest()


def range_hash(low: int, high: int) -> bytes:
    return mth(LEAVES[low:high])


def test_the_vectors_of_the_rfc() -> None:
    inputs = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
    roots = [
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
        "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
        "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
        "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
        "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
    ]
    tree = Tree()
    assert tree.root() == EMPTY_ROOT
    for data, root in zip(inputs, roots, strict=True):
        tree.append(leaf_hash(bytes.fromhex(data)))
        assert tree.root().hex() == root


def test_roots_of_all_sizes() -> None:
    tree = Tree()
    for size in range(1, 601):
        tree.append(LEAVES[size - 1])
        if size < 80 or size % 37 == 0 or size in (255, 256, 257, 511, 512, 513):
            assert tree.root() == mth(LEAVES[:size])


@pytest.mark.parametrize("size", [*range(1, 40), 255, 256, 257, 600])
def test_inclusion_of_every_leaf(size: int) -> None:
    root = mth(LEAVES[:size])
    for index in range(0, size, 1 if size < 40 else 31):
        proof = inclusion_proof(index, size, range_hash)
        verify_inclusion(LEAVES[index], index, size, proof, root)
        for at in range(len(proof)):
            wrong = [*proof[:at], LEAVES[599], *proof[at + 1 :]]
            with pytest.raises(ProofError):
                verify_inclusion(LEAVES[index], index, size, wrong, root)
        for other in ((index + 1) % size, size):
            if other != index:
                with pytest.raises(ProofError):
                    verify_inclusion(LEAVES[index], other, size, proof, root)
        for bent in (proof[:-1], [*proof, root]):
            if bent != proof:
                with pytest.raises(ProofError):
                    verify_inclusion(LEAVES[index], index, size, bent, root)


@pytest.mark.parametrize("new", [*range(1, 24), 255, 256, 257, 600])
def test_consistency_of_every_pair(new: int) -> None:
    for old in range(0, new + 1, 1 if new < 24 else 29):
        proof = consistency_proof(old, new, range_hash)
        verify_consistency(old, new, proof, mth(LEAVES[:old]), mth(LEAVES[:new]))
        if old:
            with pytest.raises(ProofError):
                verify_consistency(old, new, proof, LEAVES[0] if old > 1 else LEAVES[1], mth(LEAVES[:new]))
        if 0 < old < new:
            with pytest.raises(ProofError):
                verify_consistency(old, new, proof[:-1], mth(LEAVES[:old]), mth(LEAVES[:new]))
            with pytest.raises(ProofError):
                verify_consistency(old, new, [*proof, LEAVES[0]], mth(LEAVES[:old]), mth(LEAVES[:new]))


def test_proofs_outside_the_tree_are_refused() -> None:
    with pytest.raises(ProofError):
        inclusion_proof(5, 5, range_hash)
    with pytest.raises(ProofError):
        consistency_proof(6, 5, range_hash)
    with pytest.raises(ProofError):
        verify_consistency(6, 5, [], EMPTY_ROOT, EMPTY_ROOT)
    with pytest.raises(ProofError):
        verify_consistency(0, 5, [], LEAVES[0], mth(LEAVES[:5]))


def test_a_reset_tree_is_the_tree_before() -> None:
    tree = Tree()
    for leaf in LEAVES[:300]:
        tree.append(leaf)
    mark, root = tree.mark(), tree.root()
    for leaf in LEAVES[300:599]:
        tree.append(leaf)
    tree.reset(mark)
    assert (tree.size, tree.root()) == (300, root)
    for leaf in LEAVES[300:600]:
        tree.append(leaf)
    assert tree.root() == mth(LEAVES)
    assert sum(len(hashes) for _, _, hashes in tree.take_full_tiles()) == 512
