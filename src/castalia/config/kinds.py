"""`Kind`: a config section whose class is chosen by name from a registry.

    optim: Annotated[OptimConfig, Kind(OPTIMIZERS, "adamw")]

The section's key `kind` (or another, see `key`) names a member of the registry, and the member's
own config class validates the section. The registry is read whenever a config is validated, so a
family, a loss or an optimizer that another package registers at run time is valid at once.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from castalia.core.errors import nearest
from castalia.core.registry import Registry


def inside(values: Any, key: str) -> Any:
    """The value of `key`, of a list that at the place `key`; None if `values` lacks it."""
    if isinstance(values, list) and key.isdecimal() and int(key) < len(values):
        return values[int(key)]
    if not isinstance(values, Mapping):
        return None
    return values.get(key)


class Kind:
    """Marks a field; `registry` maps names to config classes, or to objects with a `Config`."""

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

    def chosen(self, values: Any) -> type[BaseModel]:
        """The class that a section's `values` choose; the default's if they choose no member."""
        name = inside(values, self.key)
        if isinstance(name, str) and name in self.registry:
            return self.config_class(name)
        return self.config_class(self.default)

    def validate(self, value: Any) -> BaseModel:
        """A config of the chosen class; an object of a config class passes unchanged."""
        if isinstance(value, BaseModel):
            return value
        if not isinstance(value, dict):
            raise PydanticCustomError("section", "expected a section of keys and values")
        name = value.get(self.key, self.default)
        if not isinstance(name, str) or name not in self.registry:
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
            # The section's own class serializes it: the annotation names only the members' base,
            # whose serializer would drop the fields that a member adds.
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda config, info: config.model_dump(mode=info.mode), info_arg=True
            ),
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Any of the members' schemas, each a definition of its own."""
        schemas = [handler(member.__pydantic_core_schema__) for member in self.classes().values()]
        return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
