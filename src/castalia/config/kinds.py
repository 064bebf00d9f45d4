"""`Kind`: a config section whose class is chosen by name from a registry.

    optim: Annotated[OptimConfig, Kind(OPTIMIZERS, "adamw")]

The section's key `kind` (or another, see `key`) names a member of the registry; the member's own config class then
validates the section. The registry is read when a config is validated, so a member registered later is a member like
any other: that is how a family, a loss or an optimizer of another package enters.
"""

from typing import Any

from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from castalia.core.errors import nearest
from castalia.core.registry import Registry


class Kind:
    """Marks a field of a config: `registry` maps each name to a config class, or to a thing with a `Config`."""

    def __init__(self, registry: Registry[Any], default: str, *, key: str = "kind") -> None:
        self.registry = registry
        self.default = default
        self.key = key

    def config_class(self, name: str) -> type[BaseModel]:
        """The config class of the member `name`.

        Raises  ConfigError for an unknown name, with the menu.
        """
        member = self.registry[name]
        chosen: type[BaseModel] = getattr(member, "Config", member)
        return chosen

    def classes(self) -> dict[str, type[BaseModel]]:
        """The config class of each member, by name."""
        return {name: self.config_class(name) for name in self.registry}

    def validate(self, value: Any) -> BaseModel:
        """A config of the chosen class; a config that is one already passes as it is."""
        if isinstance(value, BaseModel):
            return value
        if not isinstance(value, dict):
            raise PydanticCustomError("section", "expected a section of keys and values")
        name = value.get(self.key, self.default)
        if name not in self.registry:
            menu = ", ".join(sorted(self.registry))
            raise PydanticCustomError(
                "unknown_kind",
                "{text}",
                {
                    "text": f"unknown {self.registry.kind} {name!r}; choose one of {menu}"
                    f"{nearest(str(name), self.registry)}",
                    "key": self.key,
                },
            )
        return self.config_class(name).model_validate(value)

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Validation and serialization of the field."""
        return core_schema.no_info_plain_validator_function(
            self.validate,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda config, info: config.model_dump(mode=info.mode), info_arg=True
            ),
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Any of the members' schemas."""
        return {"anyOf": [member.model_json_schema() for member in self.classes().values()]}
