"""Trees that were read already, told of as who reads them does."""

from collections.abc import Callable

from sublet_contracts.tree import OnChunk, ScannedTree


def reading(tree: ScannedTree) -> Callable[[OnChunk], ScannedTree]:
    """Return what reads this tree."""

    def read(on_chunk: OnChunk) -> ScannedTree:
        for file in tree.index.files:
            for chunk in file.chunks:
                path, offset, _ = tree.sources[chunk.digest]
                on_chunk(chunk, path, offset)
        return tree

    return read
