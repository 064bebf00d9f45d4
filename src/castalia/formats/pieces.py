"""A tensor of ours that lies in several tensors of another program, and where each part lies.

One table serves both ways: `gathered` reads ours from theirs in parts, `scatter` writes ours into
theirs. Formats that split matrices over ranks, fuse queries with keys, or order the rows of a head
otherwise are lists of pieces.
"""

import re
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from castalia.checkpoint.keymap import matches, shown
from castalia.checkpoint.tensors import StoredTensor, StoredTensors, box_of
from castalia.core.errors import CheckpointError, nearest
from castalia.distributed.boxes import Box

Table = Mapping[Any, Tensor]
"""The tensors of one of their ranks by name, mapped from files and not read yet."""


class Piece(NamedTuple):
    """A part of one of our tensors inside one of theirs."""

    rank: int
    """Which of their files holds it."""
    box: Box
    """Its place in ours."""
    start: tuple[int, ...]
    """Its first index in theirs, a number a dimension."""
    step: int = 1
    """Rows of theirs from one row of ours to the next; 2 where two sequences alternate."""

    def slices(self, part: Box) -> tuple[slice, ...]:
        """The slices in theirs of `part` of ours, which lies in this piece."""
        firsts = zip(part.offset, self.box.offset, self.start, part.shape, strict=True)
        (row, own, first, rows), *others = firsts
        begin = first + (row - own) * self.step
        out = [slice(begin, begin + (rows - 1) * self.step + 1, self.step)]
        for index, base, origin, size in others:
            out.append(slice(origin + index - base, origin + index - base + size))
        return tuple(out)

    def end(self) -> tuple[int, ...]:
        """The index in theirs after its last element, a number a dimension."""
        return tuple(item.stop for item in self.slices(self.box))


@dataclass(frozen=True)
class Placed:
    """Where one of our tensors lies in theirs."""

    key: Hashable
    """Their name."""
    shape: tuple[int, ...]
    """Of ours."""
    how: Literal["split", "copied", "first", "summed"] = "copied"
    """split: in pieces. copied: whole on every rank. first: the same, and only that of the first
    rank counts. summed: ours is the sum over the ranks."""
    pieces: tuple[Piece, ...] = ()


Layout = dict[str, Placed]
"""The place of each of our tensors, by our name."""


@dataclass(frozen=True, eq=False)
class PiecedTensor:
    """One of our tensors, gathered from pieces as it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]
    sources: Sequence[Tensor]
    """Their tensor of each rank, mapped from its file."""

    def __getitem__(self, part: tuple[slice, ...], /) -> Tensor:
        box = box_of(part, self.shape)
        out = torch.empty(box.shape, dtype=self.dtype)
        for piece in self.pieces:
            common = box.intersection(piece.box)
            if common.volume:
                out[common.slices_from(box.offset)] = self.sources[piece.rank][piece.slices(common)]
        return out


@dataclass(frozen=True, eq=False)
class MergedTensor:
    """One of our tensors, computed from copies that every rank of theirs holds; these are small."""

    sources: Sequence[Tensor]
    merge: Callable[[Sequence[Tensor]], Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of the whole tensor."""
        return tuple(self.sources[0].shape)

    @property
    def dtype(self) -> torch.dtype:
        """Type of its elements."""
        return self.sources[0].dtype

    def __getitem__(self, part: tuple[slice, ...], /) -> Tensor:
        return self.merge(self.sources)[part].clone()


@dataclass(frozen=True)
class ZeroTensor:
    """Zeros in the place of a tensor that another program lacks or leaves out."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __getitem__(self, part: tuple[slice, ...], /) -> Tensor:
        return torch.zeros(box_of(part, self.shape).shape, dtype=self.dtype)


def total(copies: Sequence[Tensor]) -> Tensor:
    """The sum over ranks."""
    if len(copies) == 1:
        return copies[0]
    return torch.stack([copy.float() for copy in copies]).sum(0).to(copies[0].dtype)


def mean(copies: Sequence[Tensor]) -> Tensor:
    """The mean over ranks, exactly the first copy where all are equal."""
    first = copies[0]
    if all(torch.equal(first, copy) for copy in copies[1:]):
        return first
    return torch.stack([copy.float() for copy in copies]).mean(0).to(first.dtype)


def first_copy(copies: Sequence[Tensor]) -> Tensor:
    """That of the first rank."""
    return copies[0]


def scatter(ours: Tensor, pieces: Sequence[Piece], theirs: Sequence[Tensor]) -> None:
    """Write one of our tensors into those of their ranks, in place."""
    for piece in pieces:
        theirs[piece.rank][piece.slices(piece.box)] = ours[piece.box.slices]


def runs(
    shape: Sequence[int], spans: Sequence[tuple[int, int, int, int]], step: int = 1
) -> Iterator[Piece]:
    """Pieces of whole rows: (rank, first row of ours, rows, first row of theirs)."""
    rest = tuple(shape[1:])
    zeros = (0,) * len(rest)
    for rank, row, rows, first in spans:
        yield Piece(rank, Box((row, *zeros), (rows, *rest)), (first, *zeros), step)


def columns(shape: tuple[int, int], ranks: int) -> list[Piece]:
    """Pieces of a matrix whose columns the ranks split evenly."""
    rows, width = shape
    share = width // ranks
    return [Piece(r, Box((0, r * share), (rows, share)), (0, 0)) for r in range(ranks)]


def even(rows: int, ranks: int, first: int = 0) -> list[tuple[int, int, int, int]]:
    """The spans of rows that the ranks split evenly, each from row `first` of theirs."""
    share = rows // ranks
    return [(rank, rank * share, share, first) for rank in range(ranks)]


def whole_heads(heads: int, width: int, ranks: int) -> list[tuple[int, int, int, int]]:
    """The spans of heads over ranks, each head whole on one of them.

    Heads that are fewer than the ranks are repeated there; the first copy of each is taken.
    """
    out = []
    for head in range(heads):
        rank = head * ranks // heads
        # The first head of a rank is the least whose share begins there.
        local = head - -(-rank * heads // ranks)
        out.append((rank, head * width, width, local * width))
    return out


def rotary(heads: int, width: int, ranks: int) -> list[tuple[int, int, int, int]]:
    """The spans of heads whose rotated pairs are neighbouring rows in theirs (2j, 2j + 1) and half
    a head apart in ours (j, j + width/2). To be read with a step of 2."""
    half = width // 2
    return [
        (rank, row + part * half, half, first + part)
        for rank, row, _, first in whole_heads(heads, width, ranks)
        for part in (0, 1)
    ]


def rank_shapes(layout: Layout) -> dict[Hashable, tuple[int, ...]]:
    """The shape of each of their tensors on one rank; all ranks have the same."""
    shapes: dict[Hashable, tuple[int, ...]] = {}
    for placed in layout.values():
        ends = [piece.end() for piece in placed.pieces] or [placed.shape]
        known = shapes.get(placed.key)
        if known is not None:
            ends.append(known)
        shapes[placed.key] = tuple(max(sizes) for sizes in zip(*ends, strict=True))
    return shapes


def gathered(
    where: str,
    layout: Layout,
    tables: Sequence[Table],
    unused: Sequence[str] = (),
    optional: Collection[str] = (),
) -> StoredTensors:
    """Our tensors over the files of all their ranks.

    where     names the model in errors.
    unused    regular expressions, matched whole, for names of theirs that hold nothing to keep.
    optional  patterns of our names that may be missing.
    Raises    CheckpointError naming tensors of theirs without a place, missing ones, and shapes
              that differ.
    """
    require_known(where, layout, tables, unused)
    ours: dict[str, StoredTensor] = {}
    for name, placed in layout.items():
        if all(placed.key in table for table in tables):
            ours[name] = stored(placed, [table[placed.key] for table in tables])
    missing = [
        str(placed.key)
        for name, placed in layout.items()
        if name not in ours and not matches(name, optional)
    ]
    if missing:
        raise CheckpointError(
            f"{where} lacks {shown(missing)}: its config describes another model than the weights,"
            " or a file is not whole"
        )
    require_shapes(where, layout, tables)
    return StoredTensors(ours)


def stored(placed: Placed, sources: Sequence[Tensor]) -> StoredTensor:
    """One of our tensors over theirs of all ranks."""
    if placed.how == "split":
        return PiecedTensor(placed.shape, sources[0].dtype, placed.pieces, sources)
    merge = {"copied": mean, "first": first_copy, "summed": total}[placed.how]
    return MergedTensor(sources, merge)


def require_known(
    where: str, layout: Layout, tables: Sequence[Table], unused: Sequence[str]
) -> None:
    """Raises  CheckpointError naming the tensors that the model has no place for."""
    known = {placed.key for placed in layout.values()}
    patterns = [re.compile(pattern) for pattern in unused]
    names = {str(key) for table in tables for key in table if key not in known}
    extra = sorted(name for name in names if not any(p.fullmatch(name) for p in patterns))
    if extra:
        raise CheckpointError(
            f"{where} has tensors without a place in its model: {shown(extra)}"
            f"{nearest(extra[0], map(str, known))}; its config describes another model than the"
            " weights"
        )


def require_matrices(where: str, tables: Sequence[Table], keys: Collection[Hashable]) -> None:
    """Raises  CheckpointError naming one of `keys` that has no rows and columns."""
    for key, shape in [(key, list(t[key].shape)) for t in tables for key in keys if key in t]:
        if len(shape) != 2:
            raise CheckpointError(f"{where}: {key} is {shape}, expected a matrix; copy it again")


def require_shapes(where: str, layout: Layout, tables: Sequence[Table]) -> None:
    """Raises  CheckpointError naming a tensor of another shape than the config gives it."""
    for key, wanted in rank_shapes(layout).items():
        for rank, table in enumerate(tables):
            tensor = table.get(key)
            if tensor is not None and tuple(tensor.shape) != wanted:
                shard = ""
                if len(tables) > 1:
                    shard = f" of shard {rank} of {len(tables)}"
                raise CheckpointError(
                    f"{where}: {key}{shard} is {list(tensor.shape)}, expected {list(wanted)}; its"
                    " config describes another model than the weights"
                )
