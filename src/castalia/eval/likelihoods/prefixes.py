"""What lines have in common, and so what is read once.

A plan has three levels. A *header*, such as few-shot examples, is read alone and copied to all rows
of a state. A *stem*, such as the context of several choices, follows it in one row. Its *branches*,
the choices, are read one after the other in the stem's row, which is cut back in between.

    header [Q: ... A: ... ] -> stem [Q: the sky is] -> branches [blue], [very green], [a cat]

Where to cut is a minimum over the tree of common beginnings, in tokens that have to be read.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ids = tuple[int, ...]

BRANCH_TOKENS = 4
"""What a branch costs beside its tokens: a pass over fewer tokens, and a mask."""
HEADER_TOKENS = 32
"""What a header costs beside its tokens: a pass over one row, and batches of its own. Also the
least distance between places where a header may end, which bounds the search."""
COPIED = 4
"""Copying a header's state to all rows costs as much as reading one of so many of its tokens."""


class Span(NamedTuple):
    """Tokens start..end - 1 of the inputs `lines`, which are equal up to `end`."""

    start: int
    end: int
    lines: tuple[int, ...]


class Group(NamedTuple):
    """A stem and the branches that continue it."""

    stem: Span
    branches: list[Span]


class Section(NamedTuple):
    """Groups that begin with the same header, which may be empty."""

    header: Span
    groups: list[Group]


class Node:
    """A place where inputs part or one ends, in the tree of their common beginnings."""

    def __init__(self, depth: int, lines: tuple[int, ...] = ()) -> None:
        self.depth = depth
        """Tokens that all inputs below share."""
        self.lines = lines
        """Lines whose input ends here."""
        self.children: list[Node] = []
        self.inputs = 0
        """Distinct inputs that end here or below."""
        self.tokens = 0
        """Sum of their lengths."""

    @property
    def branches(self) -> int:
        """Inputs that end below."""
        return self.inputs - bool(self.lines)

    def ends(self) -> list["Node"]:
        """The nodes here and below where inputs end."""
        return [node for node in nodes_of(self) if node.lines]

    def all_lines(self) -> tuple[int, ...]:
        """The lines of all inputs that end here or below."""
        return tuple(line for node in self.ends() for line in node.lines)


def nodes_of(top: Node) -> list[Node]:
    """A node and all below it, parents first."""
    # Without recursion: inputs that are prefixes of one another make a chain of any length.
    nodes: list[Node] = []
    left = [top]
    while left:
        node = left.pop()
        nodes.append(node)
        left += node.children
    return nodes


def tree_of(inputs: Sequence[Ids]) -> Node:
    """The tree of the inputs' common beginnings."""
    lines: dict[bytes, list[int]] = {}
    for number, given in enumerate(inputs):
        # As bytes in the order of their numbers, so that long equal beginnings compare quickly.
        lines.setdefault(np.array(given, ">u4").tobytes(), []).append(number)
    root = Node(0)
    # The path to the last input.
    path = [root]
    before = np.array((), np.dtype(">u4"))
    for key in sorted(lines):
        ids = np.frombuffer(key, np.dtype(">u4"))
        common = shared(before, ids)
        while path[-1].depth > common:
            node = path.pop()
            if path[-1].depth < common:
                path.append(Node(common))
            path[-1].children.append(node)
        path.append(Node(len(ids), tuple(lines[key])))
        before = ids
    while len(path) > 1:
        node = path.pop()
        path[-1].children.append(node)
    for node in reversed(nodes_of(root)):
        node.inputs = bool(node.lines) + sum(child.inputs for child in node.children)
        own = 0
        if node.lines:
            own = node.depth
        node.tokens = own + sum(child.tokens for child in node.children)
    return root


def shared(a: NDArray[np.uint32], b: NDArray[np.uint32]) -> int:
    """Length of the common beginning."""
    size = min(len(a), len(b))
    different = a[:size] != b[:size]
    if different.any():
        return int(different.argmax())
    return size


class Cover:
    """The cheapest stems under each node below `top`, after a header of `start` tokens.

    Takes   most: branches that a stem may have.
    """

    def __init__(self, top: Node, start: int, most: int) -> None:
        self.start = start
        self.most = most
        self.cost: dict[Node, int] = {}
        self.whole: set[Node] = set()
        """Nodes that are the end of a stem, if none above is."""
        for node in reversed(nodes_of(top)):
            apart = sum(self.cost[child] for child in node.children)
            if node.lines:
                apart += node.depth - start
            together = self.as_stem(node)
            if together is not None and together <= apart:
                self.whole.add(node)
                self.cost[node] = together
            else:
                self.cost[node] = apart

    def as_stem(self, node: Node) -> int | None:
        """Tokens to read if one stem ends at a node; None if none can."""
        if node.depth <= self.start or node.branches > self.most:
            return None
        below = node.tokens - node.inputs * node.depth
        return node.depth - self.start + below + BRANCH_TOKENS * node.branches

    def groups(self, top: Node) -> list[Group]:
        """The stems under a node."""
        groups = []
        left = [top]
        while left:
            node = left.pop()
            if node in self.whole:
                groups.append(self.group(node))
                continue
            left += node.children
            # An input that ends with the header needs no stem.
            if node.lines and node.depth > self.start:
                groups.append(Group(Span(self.start, node.depth, node.lines), []))
        return groups

    def group(self, node: Node) -> Group:
        """The stem that ends at a node."""
        branches = []
        for end in node.ends():
            if end is not node:
                branches.append(Span(node.depth, end.depth, end.lines))
        # Long ones first, so that the branches which several rows read together are alike.
        branches.sort(key=lambda branch: branch.start - branch.end)
        return Group(Span(self.start, node.depth, node.all_lines()), branches)


def sections_of(inputs: Sequence[Ids], most: int) -> list[Section]:
    """The plan that reads the fewest tokens, for a state that can be copied and cut back.

    Takes   most: rows of a batch, and branches of a stem.
    """
    root = tree_of(inputs)
    plain = Cover(root, 0, most)
    headed = header_covers(root, most)
    cost: dict[Node, float] = {}
    for node in reversed(nodes_of(root)):
        apart = sum(cost[child] for child in node.children)
        if node.lines:
            apart += node.depth
        cost[node] = min(apart, plain.cost[node])
        if node in headed:
            with_header = headed[node].cost[node] + HEADER_TOKENS + node.depth * (1 + 1 / COPIED)
            if with_header < cost[node]:
                cost[node] = with_header
            else:
                del headed[node]
    sections = []
    rest: list[Group] = []
    left = [root]
    while left:
        node = left.pop()
        if node in headed:
            header = Span(0, node.depth, node.all_lines())
            sections.append(Section(header, headed[node].groups(node)))
        elif plain.cost[node] <= cost[node]:
            rest += plain.groups(node)
        else:
            left += node.children
            if node.lines:
                rest.append(Group(Span(0, node.depth, node.lines), []))
    return [*sections, Section(Span(0, 0, ()), rest)]


def header_covers(root: Node, most: int) -> dict[Node, Cover]:
    """The stems below each node where a header might end."""
    covers = {}
    left = [(root, 0)]
    while left:
        node, last = left.pop()
        if node.depth >= last + HEADER_TOKENS and node.branches > 1:
            covers[node] = Cover(node, node.depth, most)
            last = node.depth
        left += [(child, last) for child in node.children]
    return covers


def separate(inputs: Sequence[Ids]) -> list[Section]:
    """The plan for a state that cannot be cut back: equal inputs are read once."""
    lines: dict[Ids, list[int]] = {}
    for number, ids in enumerate(inputs):
        lines.setdefault(ids, []).append(number)
    groups = [Group(Span(0, len(ids), tuple(these)), []) for ids, these in lines.items()]
    return [Section(Span(0, 0, ()), groups)]
