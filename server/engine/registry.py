"""Which engine answers for a model name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from server.errors import ConfigError, ModelNotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from server.ports import Engine


class EngineRegistry:
    """Engines by model id, with aliases; fixed once built.

    Args:
        engines: One engine a model; its `model` is the id.
        aliases: Further names, each of an existing model id.

    Raises:
        ConfigError: Two models or aliases share a name, or an alias points nowhere.
    """

    def __init__(self, engines: tuple[Engine, ...], aliases: Mapping[str, str] | None = None) -> None:
        self._engines: dict[str, Engine] = {}
        for engine in engines:
            if engine.model in self._engines:
                raise ConfigError(f"Two engines are configured for model '{engine.model}'. Give each its own id.")
            self._engines[engine.model] = engine
        self._aliases = dict(aliases or {})
        for alias, model in self._aliases.items():
            if alias in self._engines:
                raise ConfigError(f"The alias '{alias}' is a model's own id. Choose another name.")
            if model not in self._engines:
                raise ConfigError(f"The alias '{alias}' points to model '{model}', which no engine serves.")

    def resolve(self, name: str) -> str:
        """Return the model id behind a model id or an alias.

        Raises:
            ModelNotFoundError: No engine serves it.
        """
        model = self._aliases.get(name, name)
        if model not in self._engines:
            raise ModelNotFoundError("The model does not exist, or you may not use it.", param="model")
        return model

    def engine(self, name: str) -> Engine:
        """Return the engine for a model id or an alias.

        Raises:
            ModelNotFoundError: No engine serves it.
        """
        return self._engines[self.resolve(name)]

    def __iter__(self) -> Iterator[Engine]:
        return iter(self._engines.values())

    @property
    def aliases(self) -> dict[str, str]:
        """Alias to model id."""
        return dict(self._aliases)
