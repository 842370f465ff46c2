"""An approximate picture of the engines' prefix caches: which prompts' beginnings were sent where.

A radix tree over bytes, cut at whole blocks. Its edges are compared as byte strings, so a long prompt costs a few
comparisons and no Python object per character; the block bounds how often a path can branch. Never larger than
`max_bytes`: the longest unused leaves go first. Source of the idea: the approximate tree of SGLang's gateway
(`policies/tree.rs`), and SGLang's own radix cache (Zheng et al., "SGLang: Efficient Execution of Structured Language
Model Programs", 2024).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

BLOCK_BYTES: Final = 64
"""Prefixes are known to this granularity: about 16 tokens, as the block of smg 1.13's `--block-size`. Less of a
common prefix than that is not seen, and at the end of a match up to that much is missed."""

MAX_PREFIX_BYTES: Final = 1 << 20
"""What is looked at of a prompt, about 256,000 tokens: what is equal so far is not worth computing elsewhere."""

MAX_HOLDERS: Final = 64
"""Holders remembered for each piece of text, the most recent. A system prompt ends up on every worker: that nobody
needs to know, as any of these is as good."""

NODE_BYTES: Final = 350
HOLDER_BYTES: Final = 88
CHILDREN_BYTES: Final = 300
"""What a node takes beside its text, each of its holders, and the dict of a node that has children, on CPython 3.11
(measured; see `test_policy_prefix_tree`)."""

SLACK: Final = 8
"""An eighth of the text comes on top: texts of all lengths come and go, and leave gaps that nothing fits. Measured as
RSS over what is in use: 1.00 with texts of one length, 1.09 with lengths spread by a factor of 3."""


SHELVES: Final = 256
"""Dicts that share the root's children, by the hash of their first block: one for all 135,000 would take 5 ms each
time it is rebuilt, and leave gaps of megabytes."""


class Holder(NamedTuple):
    """Who has a piece of text in its cache."""

    worker: str
    """The worker's name."""
    dp_rank: int | None = None
    """None: somewhere on the worker."""


class Match(NamedTuple):
    """A prefix and who has it."""

    matched_bytes: int
    holders: tuple[Holder, ...]
    """The most recent last."""


class Node:
    """A piece of text that continues its parent's. Its length is a multiple of BLOCK_BYTES; only the root has none."""

    __slots__ = ("children", "edge", "holders", "newer", "older", "parent")

    def __init__(self, edge: bytes, parent: "Node | None") -> None:
        self.edge = edge
        self.parent = parent
        self.children: dict[bytes, Node] | None = None
        """By the first block of their edge; None: no children, as most nodes have. The root's are on shelves."""
        self.holders: tuple[Holder, ...] = ()
        """The most recent last. There are few, so a tuple is smaller than a dict and not slower."""
        # Neighbours in the order of use, a ring that the root closes.
        self.older = self.newer = self

    @property
    def size_bytes(self) -> int:
        """What it costs, holders included."""
        size_bytes = NODE_BYTES + _with_slack(len(self.edge)) + HOLDER_BYTES * len(self.holders)
        return size_bytes if self.children is None else size_bytes + CHILDREN_BYTES

    def move_before(self, newer: "Node") -> None:
        """Take the place before another one in the order of use."""
        self.unlink()
        older = newer.older
        self.older, self.newer = older, newer
        older.newer = newer.older = self

    def unlink(self) -> None:
        """Leave the order of use."""
        older, newer = self.older, self.newer
        older.newer, newer.older = newer, older


class PrefixTree:
    """Texts and their holders. The caller cuts a prompt to bytes once and passes the same to `matches` and `insert`.

    No step takes longer with a larger tree.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.size_bytes = 0
        """Of all nodes; at most `max_bytes` after each `insert`."""
        self.held_bytes = Counter[str]()
        """Text known to be on each worker; a worker that holds nothing is absent."""
        # The longest unused is `newer` than the root. A node is always used after its children, so that one is a leaf.
        self._root = Node(b"", None)
        self._shelves: list[dict[bytes, Node]] = [{} for _ in range(SHELVES)]
        self._nodes = 0

    def __len__(self) -> int:
        """Number of nodes."""
        return self._nodes

    def matches(self, text: bytes) -> list[Match]:
        """The longest prefix of `text` that is in the tree, with its holders, and before it ever shorter ones."""
        found: list[Match] = []
        block, at = text[:BLOCK_BYTES], 0
        child = self._shelves[hash(block) % SHELVES].get(block)
        while child:
            if not text.startswith(child.edge, at):
                found.append(Match(at + _common_bytes(child.edge, text, at), child.holders))
                break
            at += len(child.edge)
            found.append(Match(at, child.holders))
            child = child.children.get(text[at : at + BLOCK_BYTES]) if child.children else None
        return found

    def insert(self, text: bytes, holder: Holder) -> None:
        """Note that `holder` has `text`, or gets it now. Whatever is longer than whole blocks is left out."""
        end = len(text) - len(text) % BLOCK_BYTES
        root = self._root
        node, at, path = root, 0, []
        while at < end:
            block = text[at : at + BLOCK_BYTES]
            children = self._shelves[hash(block) % SHELVES] if node is root else node.children
            child = children.get(block) if children else None
            if child is None:
                child = self._add(Node(text[at:end], node))
            elif not text.startswith(child.edge, at):
                child = self._split(child, _common_bytes(child.edge, text, at))
            node, at = child, at + len(child.edge)
            path.append(node)
        for node in reversed(path):
            node.move_before(root)
            if not node.holders or node.holders[-1] != holder:
                self._hold(node, holder)
        while self.size_bytes > self.max_bytes:
            oldest = root.newer
            while not oldest.edge:  # the mark of a sweep
                oldest = oldest.newer
            self._remove(oldest)

    def forgetting(self, gone: Callable[[Holder], bool]) -> Iterator[None]:
        """Drop holders, a node at each step, so that the caller can spread the work; and what nobody holds any more."""
        # A mark goes through the order of use, from the oldest on: nodes come and go around it, or move to the end.
        mark = Node(b"", None)
        mark.move_before(self._root.newer)
        while (node := mark.newer) is not self._root:
            mark.move_before(node.newer)
            for holder in node.holders:
                if gone(holder):
                    self._let_go(node, holder)
            if not (node.holders or node.children):
                self._remove(node)
            yield
        mark.unlink()

    def _add(self, node: Node) -> Node:
        """Enter a node as its parent's child; it is to be used next."""
        assert node.parent is not None  # noqa: S101 - only the root has none, and it is never added
        block = node.edge[:BLOCK_BYTES]
        if node.parent is self._root:
            self._shelves[hash(block) % SHELVES][block] = node
        elif node.parent.children is None:
            node.parent.children = {block: node}
            self.size_bytes += CHILDREN_BYTES
        else:
            node.parent.children[block] = node
        self._nodes += 1
        self.size_bytes += node.size_bytes
        return node

    def _remove(self, leaf: Node) -> None:
        for holder in leaf.holders:
            self._count_held(holder, -len(leaf.edge))
        parent, block = leaf.parent, leaf.edge[:BLOCK_BYTES]
        assert parent is not None  # noqa: S101 - as above
        if parent is self._root:
            del self._shelves[hash(block) % SHELVES][block]
        elif parent.children is not None:
            del parent.children[block]
            if not parent.children:
                parent.children = None
                self.size_bytes -= CHILDREN_BYTES
        leaf.unlink()
        self._nodes -= 1
        self.size_bytes -= leaf.size_bytes

    def _split(self, lower: Node, at: int) -> Node:
        """Cut a node's edge in two; the upper part is returned, and has the same holders."""
        upper = Node(lower.edge[:at], lower.parent)
        upper.holders = lower.holders
        lower.edge, lower.parent = lower.edge[at:], upper
        upper.children = {lower.edge[:BLOCK_BYTES]: lower}
        self._add(upper)  # takes the lower part's place among the parent's children
        self.size_bytes -= _with_slack(at)
        return upper

    def _hold(self, node: Node, holder: Holder) -> None:
        """Make it the most recent of a node's holders."""
        holders = node.holders
        if holder in holders:
            index = holders.index(holder)
            node.holders = (*holders[:index], *holders[index + 1 :], holder)
            return
        if len(holders) == MAX_HOLDERS:
            self._let_go(node, holders[0])
        node.holders = (*node.holders, holder)
        self.size_bytes += HOLDER_BYTES
        self._count_held(holder, len(node.edge))

    def _let_go(self, node: Node, holder: Holder) -> None:
        node.holders = tuple(other for other in node.holders if other != holder)
        self.size_bytes -= HOLDER_BYTES
        self._count_held(holder, -len(node.edge))

    def _count_held(self, holder: Holder, more_bytes: int) -> None:
        held_bytes = self.held_bytes[holder.worker] + more_bytes
        if held_bytes:
            self.held_bytes[holder.worker] = held_bytes
        else:
            del self.held_bytes[holder.worker]


def _with_slack(text_bytes: int) -> int:
    """What so much text takes. Exact for whole blocks, so that parts make up the whole."""
    return text_bytes + text_bytes // SLACK


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
