"""Links in a tree: of a renter's own folder of code, and of nothing else.

A link leads to something in its own tree, and so it does on any machine. It may go up first and
then down, never up again: "d/../x" means another place where d is a link itself. Nothing lies below
a link, so whoever writes a tree passes through none.
"""

from collections.abc import Collection
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sublet_contracts.paths import MAX_PATH_BYTES, check_relative_path

MAX_LINKS = 20_000


class TreeLink(BaseModel):
    """A symbolic link."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    path: str = Field(description="where it lies in the tree")
    target: str = Field(description="where it leads, from its own folder: ../ first, then down")

    @model_validator(mode="after")
    def _stays_inside(self) -> Self:
        check_relative_path(self.path)
        check_target(self.path, self.target)
        return self


def check_target(path: str, target: str) -> None:
    """Raises ValueError where a link at `path` may lead out of its tree, and says how."""
    parts = target.split("/")
    up = next((n for n, part in enumerate(parts) if part != ".."), len(parts))
    below = parts[up:]
    if up > path.count("/"):
        raise ValueError(
            f"{path}: the link leads out of the folder, to {target[:MAX_PATH_BYTES]!a}"
        )
    if below not in ([], ["."]):
        try:
            check_relative_path("/".join(below))
        except ValueError as error:
            raise ValueError(f"{path}: the link's target: {error}") from error


def check_links(links: Collection[TreeLink], files: Collection[str]) -> None:
    """Raises ValueError where links aren't sorted, stand in the way of files or of each other."""
    paths = [link.path for link in links]
    if paths != sorted(set(paths)):
        raise ValueError("links: paths must be sorted and stand once each")
    taken = set(paths)
    for path in (*files, *paths):
        if path in taken and path in files:
            raise ValueError(f"links: {path} is a file already")
        parents = path.split("/")[:-1]
        for depth in range(1, len(parents) + 1):
            if "/".join(parents[:depth]) in taken:
                raise ValueError(f"links: {path} lies below something that is a link")
    for link in links:
        above = link.path.split("/")[:-1]
        if any("/".join(above[: n + 1]) in files for n in range(len(above))):
            raise ValueError(f"links: {link.path} lies below something that is a file")
