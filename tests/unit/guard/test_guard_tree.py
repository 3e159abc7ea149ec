"""What the tree takes for granted of the grammars holds for all labelled programs."""

from __future__ import annotations

from benchmarks.guard.rates import CASES, load_pairs
from server.guard import tree


def test_leaves_have_nothing_below_them() -> None:
    folders = [CASES, *(path for path in (CASES / "held-out").iterdir() if path.is_dir())]
    programs = {
        (pair.language, text)
        for folder in folders
        for pair in load_pairs(folder)
        if tree.has_grammar(pair.language)
        for text in (pair.insecure, pair.safe)
    }
    assert len(programs) > 1000
    seen = set()
    for language, text in programs:
        stack = [tree.parsed(text, language)]
        while stack:
            node = stack.pop()
            if node.kind() in tree._LEAVES:
                seen.add(node.kind())
                assert not node.named_children(), (language, node.kind(), node.text())
            stack += node.named_children()
    assert len(seen) > 20
