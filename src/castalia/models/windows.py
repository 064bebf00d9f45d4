"""Sliding windows as engines see them: whether one hides anything, and for how many tokens."""

from castalia.models.config import TransformerConfig


def window(config: TransformerConfig) -> int | None:
    """Tokens that the sliding layers see of a text of max_position_embeddings; None for all."""
    if "sliding" not in config.layer_kinds or config.sliding_window is None:
        return None
    if config.sliding_window >= config.max_position_embeddings:
        return None
    return config.sliding_window


def without_idle_window(config: TransformerConfig) -> TransformerConfig:
    """The same model without a window that hides nothing."""
    if window(config) is not None:
        return config
    kinds = config.attention_config
    if kinds is not None and set(config.layer_kinds) <= {"global", "sliding"}:
        kinds = None
    return config.model_copy(update={"sliding_window": None, "attention_config": kinds})


def within_window(config: TransformerConfig) -> TransformerConfig:
    """The model for texts that its window holds whole, where the window hides nothing."""
    width = window(config)
    if width is None:
        return without_idle_window(config)
    update: dict[str, object] = {"max_position_embeddings": width}
    scaling = config.rope_scaling
    if scaling is not None and scaling.original_max_position_embeddings is None:
        # Null means max_position_embeddings, which is about to change.
        trained = {"original_max_position_embeddings": config.max_position_embeddings}
        update["rope_scaling"] = scaling.model_copy(update=trained)
    return without_idle_window(config.model_copy(update=update))
