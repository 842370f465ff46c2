"""The prefix tree against a brute-force list of what was inserted."""

import random
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.policy.prefix_tree import (
    BLOCK_BYTES,
    CHILDREN_BYTES,
    HOLDER_BYTES,
    MAX_HOLDERS,
    NODE_BYTES,
    SLACK,
    Holder,
    Node,
    PrefixTree,
)

ROOMY = 1 << 30

ONE_BLOCK_BYTES = NODE_BYTES + BLOCK_BYTES + BLOCK_BYTES // SLACK + HOLDER_BYTES
"""A node of one block with one holder."""

# Two kinds of block and a ragged end: texts that share many beginnings, and differ inside of blocks, too.
texts = st.builds(
    lambda blocks, rest: b"".join(block * BLOCK_BYTES for block in blocks) + rest,
    st.lists(st.sampled_from([b"a", b"b"]), max_size=6),
    st.binary(max_size=BLOCK_BYTES - 1),
)
holders = st.builds(Holder, st.sampled_from(["w0", "w1", "w2"]), st.sampled_from([None, 0, 1]))
inserts = st.lists(st.tuples(texts, holders), max_size=20)


def whole_blocks(length: int) -> int:
    return length - length % BLOCK_BYTES


def common(first: bytes, second: bytes) -> int:
    """Whole blocks that two texts begin with, in bytes."""
    length = min(whole_blocks(len(first)), whole_blocks(len(second)))
    while first[:length] != second[:length]:
        length -= BLOCK_BYTES
    return length


def by_use(tree: PrefixTree) -> list[Node]:
    """The nodes, the longest unused first."""
    nodes, node = [], tree._root.newer
    while node is not tree._root:
        assert node.newer.older is node
        nodes.append(node)
        node = node.newer
    return nodes


def check(tree: PrefixTree) -> None:
    """What must hold of every tree, by walking it."""
    nodes, pending = [], [node for shelf in tree._shelves for node in shelf.values()]
    held: dict[str, int] = {}
    while pending:
        node = pending.pop()
        nodes.append(node)
        assert node.edge
        assert len(node.edge) % BLOCK_BYTES == 0
        assert len(node.holders) <= MAX_HOLDERS
        assert node.children is None or node.children
        for first_block, child in (node.children or {}).items():
            assert child.parent is node
            assert child.edge.startswith(first_block)
            pending.append(child)
        for holder in node.holders:
            held[holder.worker] = held.get(holder.worker, 0) + len(node.edge)
    assert tree.size_bytes == sum(node.size_bytes for node in nodes) <= tree.max_bytes
    assert tree.held_bytes == held
    used = by_use(tree)
    assert set(nodes) == set(used)
    assert len(nodes) == len(used) == len(tree)
    order = {node: number for number, node in enumerate(used)}
    assert all(order[node] < order[node.parent] for node in nodes if node.parent in order)  # leaves go first


@given(inserts, texts)
def test_the_longest_prefix_of_each_holder_is_what_brute_force_finds(inserted, text):
    tree = PrefixTree(ROOMY)
    expected: dict[Holder, int] = {}
    for each, holder in inserted:
        tree.insert(each, holder)
        expected[holder] = max(expected.get(holder, 0), common(each, text))
    check(tree)
    found: dict[Holder, int] = {}
    matches = tree.matches(text)
    assert [match.matched_bytes for match in matches] == sorted({match.matched_bytes for match in matches})
    for matched_bytes, at in matches:
        found.update(dict.fromkeys(at, matched_bytes))  # ascending, so the last is the longest
    assert found == {holder: length for holder, length in expected.items() if length}


@given(inserts, st.integers(NODE_BYTES, 4 * NODE_BYTES))
def test_the_size_holds_after_each_insert(inserted, max_bytes):
    tree = PrefixTree(max_bytes)
    for each, holder in inserted:
        tree.insert(each, holder)
        check(tree)


@given(inserts)
def test_forgetting_leaves_what_others_hold(inserted):
    tree, without = PrefixTree(ROOMY), PrefixTree(ROOMY)
    for each, holder in inserted:
        tree.insert(each, holder)
        if holder.worker != "w0":
            without.insert(each, holder)
    for _ in tree.forgetting(lambda holder: holder.worker == "w0"):
        pass
    check(tree)
    assert tree.held_bytes == without.held_bytes
    assert all(node.holders for node in by_use(tree))


def test_the_longest_unused_text_goes_first():
    texts = [bytes([number]) * BLOCK_BYTES for number in range(4)]
    tree = PrefixTree(3 * ONE_BLOCK_BYTES)
    for text in (*texts[:3], texts[0], texts[3]):  # the first is used again
        tree.insert(text, Holder("w0"))
    assert [bool(tree.matches(text)) for text in texts] == [True, False, True, True]


def test_a_common_beginning_outlives_what_follows_it():
    beginning = b"s" * BLOCK_BYTES
    tree = PrefixTree(3 * ONE_BLOCK_BYTES + CHILDREN_BYTES)
    for number in range(10):
        tree.insert(beginning + bytes([number]) * BLOCK_BYTES, Holder("w0"))
    assert len(tree) == 3
    assert [match.matched_bytes for match in tree.matches(beginning + b"\x09" * BLOCK_BYTES)] == [64, 128]


def test_only_the_most_recent_holders_are_remembered():
    tree, text = PrefixTree(ROOMY), b"t" * BLOCK_BYTES
    for number in range(MAX_HOLDERS + 10):
        tree.insert(text, Holder(f"w{number}"))
    (match,) = tree.matches(text)
    assert list(match.holders) == [Holder(f"w{number}") for number in range(10, MAX_HOLDERS + 10)]
    check(tree)


@pytest.mark.parametrize(("size", "shared", "copies"), [(2048, 0, 1), (2048, 1024, 1), (64, 0, 1), (256, 0, 30)])
def test_the_size_is_honest(size, shared, copies):
    """The estimate is at least what Python allocates, and at most twice that."""
    rng = random.Random(1)
    beginnings = [rng.randbytes(shared) for _ in range(20)]
    names = [f"10.0.0.{number}:30000" for number in range(100)]  # belong to the load table
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tree = PrefixTree(ROOMY)
        for _ in range(500):
            text = rng.choice(beginnings) + rng.randbytes(size - shared)
            for _ in range(copies):
                tree.insert(text, Holder(rng.choice(names)))
        allocated = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert allocated <= tree.size_bytes <= 2 * allocated
