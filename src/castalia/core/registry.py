"""Names to things, where a wrong name gets the menu."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from castalia.core.errors import ConfigError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of named things of one kind, for instance presets or schedules.

    Raises  ConfigError on an unknown name, listing the right ones and the nearest.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that stores what it decorates under `name`; a name is taken once."""

        def store(item: T) -> T:
            assert name not in self.items, f"{self.kind} {name!r} is registered twice"
            self.items[name] = item
            return item

        return store

    def __getitem__(self, name: str) -> T:
        if name not in self.items:
            have = ", ".join(sorted(self.items))
            raise ConfigError(f"no {self.kind} {name!r}; have: {have}{nearest(name, self.items)}")
        return self.items[name]

    def __contains__(self, name: object) -> bool:
        return name in self.items

    def __iter__(self) -> Iterator[str]:
        return iter(self.items)
