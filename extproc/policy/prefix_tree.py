"""An approximate picture of the engines' prefix caches: which prompts' beginnings were sent where.

A radix tree over bytes, cut at whole blocks. Its edges are compared as byte strings, so a long prompt costs a few
comparisons and no Python object per character; the block bounds how often a path can branch. Never larger than
`max_bytes`: the longest unused leaves go first. Source of the idea: the approximate tree of SGLang's gateway
(`policies/tree.rs`), and SGLang's own radix cache (Zheng et al., "SGLang: Efficient Execution of Structured Language
Model Programs", 2024).
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple

BLOCK_BYTES = 64
"""Prefixes are known to this granularity: about 16 tokens, as the block of smg 1.13's `--block-size`. Less of a
common prefix than that is not seen, and at the end of a match up to that much is missed."""

MAX_PREFIX_BYTES = 1 << 20
"""What is looked at of a prompt, about 256,000 tokens: what is equal so far is not worth computing elsewhere."""

MAX_HOLDERS = 64
"""Holders remembered for each piece of text, the most recent. A system prompt ends up on every worker: that nobody
needs to know, as any of these is as good."""

NODE_BYTES = 600
HOLDER_BYTES = 130
"""Size of a node beside its text, and of each of its holders, on CPython 3.11 (measured; see
`test_policy_prefix_tree`)."""


class Holder(NamedTuple):
    """Who has a piece of text in its cache."""

    worker: str
    """The worker's name."""
    dp_rank: int | None = None
    """None: somewhere on the worker."""


class Match(NamedTuple):
    """A prefix and who has it."""

    matched_bytes: int
    holders: dict[Holder, None]
    """The most recent last."""


class Node:
    """A piece of text that continues its parent's. Its length is a multiple of BLOCK_BYTES; only the root has none."""

    __slots__ = ("children", "edge", "holders", "parent")

    def __init__(self, edge: bytes, parent: "Node | None") -> None:
        self.edge = edge
        self.parent = parent
        self.children: dict[bytes, Node] = {}
        """By the first block of their edge."""
        self.holders: dict[Holder, None] = {}

    @property
    def size_bytes(self) -> int:
        """What it costs, holders included."""
        return NODE_BYTES + len(self.edge) + HOLDER_BYTES * len(self.holders)


class PrefixTree:
    """Texts and their holders. The caller cuts a prompt to bytes once and passes the same to `matches` and `insert`."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.size_bytes = 0
        """Estimated size of all nodes; at most `max_bytes` after each `insert`."""
        self.held_bytes = Counter[str]()
        """Text known to be on each worker; a worker that holds nothing is absent."""
        self._root = Node(b"", None)
        # The longest unused first. A node is always used after its children, so the first is a leaf.
        self._by_use = OrderedDict[Node, None]()

    def __len__(self) -> int:
        """Number of nodes."""
        return len(self._by_use)

    def matches(self, text: bytes) -> list[Match]:
        """The longest prefix of `text` that is in the tree, with its holders, and before it ever shorter ones."""
        found = []
        node, at = self._root, 0
        while child := node.children.get(text[at : at + BLOCK_BYTES]):
            if not text.startswith(child.edge, at):
                found.append(Match(at + _common_bytes(child.edge, text, at), child.holders))
                break
            node, at = child, at + len(child.edge)
            found.append(Match(at, node.holders))
        return found

    def insert(self, text: bytes, holder: Holder) -> None:
        """Note that `holder` has `text`, or gets it now. Whatever is longer than whole blocks is left out."""
        end = len(text) - len(text) % BLOCK_BYTES
        node, at, path = self._root, 0, []
        while at < end:
            child = node.children.get(text[at : at + BLOCK_BYTES])
            if child is None:
                child = self._add(Node(text[at:end], node))
            elif not text.startswith(child.edge, at):
                child = self._split(child, _common_bytes(child.edge, text, at))
            node, at = child, at + len(child.edge)
            path.append(node)
        for node in reversed(path):
            self._by_use.move_to_end(node)
            self._hold(node, holder)
        while self.size_bytes > self.max_bytes:
            self._remove(next(iter(self._by_use)))

    def forgetting(self, gone: Callable[[Holder], bool]) -> Iterator[None]:
        """Drop holders, a node at each step, so that the caller can spread the work; and what nobody holds any more."""
        for node in list(self._by_use):
            if node in self._by_use:
                for holder in [holder for holder in node.holders if gone(holder)]:
                    self._let_go(node, holder)
                if not (node.holders or node.children):
                    self._remove(node)
            yield

    def _add(self, node: Node) -> Node:
        assert node.parent is not None  # noqa: S101 - only the root has none, and it is never added
        node.parent.children[node.edge[:BLOCK_BYTES]] = node
        self._by_use[node] = None
        self.size_bytes += node.size_bytes
        return node

    def _remove(self, leaf: Node) -> None:
        for holder in list(leaf.holders):
            self._let_go(leaf, holder)
        assert leaf.parent is not None  # noqa: S101 - as above
        del leaf.parent.children[leaf.edge[:BLOCK_BYTES]]
        del self._by_use[leaf]
        self.size_bytes -= leaf.size_bytes

    def _split(self, lower: Node, at: int) -> Node:
        """Cut a node's edge in two; the upper part is returned, and has the same holders."""
        assert lower.parent is not None  # noqa: S101 - as above
        upper = Node(lower.edge[:at], lower.parent)
        upper.holders = lower.holders.copy()
        self._add(upper)  # takes the place among the parent's children
        lower.edge, lower.parent = lower.edge[at:], upper
        upper.children[lower.edge[:BLOCK_BYTES]] = lower
        self.size_bytes -= at
        return upper

    def _hold(self, node: Node, holder: Holder) -> None:
        holders = node.holders
        if holder in holders:
            del holders[holder]
        else:
            if len(holders) == MAX_HOLDERS:
                self._let_go(node, next(iter(holders)))
            self.size_bytes += HOLDER_BYTES
            self.held_bytes[holder.worker] += len(node.edge)
        holders[holder] = None

    def _let_go(self, node: Node, holder: Holder) -> None:
        del node.holders[holder]
        self.size_bytes -= HOLDER_BYTES
        self.held_bytes[holder.worker] -= len(node.edge)
        if not self.held_bytes[holder.worker]:
            del self.held_bytes[holder.worker]


def _common_bytes(edge: bytes, text: bytes, at: int) -> int:
    """Whole blocks that `edge` and `text[at:]` have in common, in bytes. They differ somewhere in `edge`."""
    low, high = 0, len(edge) // BLOCK_BYTES  # the first `low` blocks are equal, not all of the first `high`
    while high - low > 1:
        middle = (low + high) // 2
        if text.startswith(edge[low * BLOCK_BYTES : middle * BLOCK_BYTES], at + low * BLOCK_BYTES):
            low = middle
        else:
            high = middle
    return low * BLOCK_BYTES
