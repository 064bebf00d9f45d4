"""A table of named things; a wrong name is an error that lists the right ones."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from castalia.core.errors import ConfigError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """Named members of one kind, for instance presets, losses or optimizers.

    Raises  ConfigError on an unknown name, with the known names and the closest one.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds a member under `name`. Each name can be used once."""

        def store(item: T) -> T:
            assert name not in self.items, f"{self.kind} {name!r} is registered twice"
            self.items[name] = item
            return item

        return store

    def __getitem__(self, name: str) -> T:
        if name not in self.items:
            choices = ", ".join(sorted(self.items))
            raise ConfigError(
                f"unknown {self.kind} {name!r}; choose one of {choices}{nearest(name, self.items)}"
            )
        return self.items[name]

    def __contains__(self, name: object) -> bool:
        return name in self.items

    def __iter__(self) -> Iterator[str]:
        return iter(self.items)
