"""Licence families: licences of one owner or one name are near copies, so they must not be split.

A family is a connected component over "same first part of the key" (``gpl-2.0``, ``gpl-3.0``) and "same owner".
"""

from collections import Counter
from collections.abc import Iterable, Mapping

from trainer.data.legal.reading import License

_NO_OWNER = frozenset({"unspecified", "unknown", ""})


class _Components:
    """Union-find whose components keep the name of their root, since the frozen splits are a hash of that name."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def root(self, node: str) -> str:
        self._parent.setdefault(node, node)
        while self._parent[node] != node:
            self._parent[node] = self._parent[self._parent[node]]
            node = self._parent[node]
        return node

    def join(self, node: str, other: str) -> None:
        """Put ``node``'s component under the root of ``other``'s."""
        self._parent[self.root(node)] = self.root(other)


def family_of_licenses(licenses: Iterable[License]) -> dict[str, str]:
    """Licence key -> name of its family: ``o:OWNER`` or ``p:PREFIX`` of whichever was joined last.

    The names depend on the order of ``licenses``, which is that of their file names.
    """
    components = _Components()
    keys: list[str] = []
    for license in licenses:
        keys.append(license.key)
        prefix = license.key.replace("_", "-").split("-", 1)[0]
        components.join(f"k:{license.key}", f"p:{prefix}")
        owner = license.owner.lower()
        if owner not in _NO_OWNER:
            components.join(f"k:{license.key}", f"o:{owner}")
    return {key: components.root(f"k:{key}") for key in keys}


def largest(families: Mapping[str, str], count: int) -> frozenset[str]:
    """Names of the ``count`` families with the most licences."""
    return frozenset(name for name, _ in Counter(families.values()).most_common(count))
