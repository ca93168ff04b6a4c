"""Trees that were read already: told of as who reads them does, and written."""

from collections.abc import Callable
from pathlib import Path

from sublet_contracts.tree import OnChunk, ScannedTree, TreeIndex
from sublet_contracts.tree_writer import TreeWriter


def reading(tree: ScannedTree) -> Callable[[OnChunk], ScannedTree]:
    """Return what reads this tree."""

    def read(on_chunk: OnChunk) -> ScannedTree:
        for file in tree.index.files:
            for chunk in file.chunks:
                path, offset, _ = tree.sources[chunk.digest]
                on_chunk(chunk, path, offset)
        return tree

    return read


def write_tree(index: TreeIndex, root: Path, read_chunk: Callable[[str], bytes]) -> None:
    """Write a tree below `root`, as who has compared each chunk with its digest."""
    writer = TreeWriter(index, root)
    for chunk in writer.chunks:
        writer.write(chunk, read_chunk(chunk.digest))
