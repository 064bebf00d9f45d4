"""What hooks may ask a trainer for."""

from typing import TYPE_CHECKING, Any

from castalia.train.stopping import Stop

if TYPE_CHECKING:
    from castalia.train.trainer import Trainer


def services_of(trainer: "Trainer") -> dict[str, Any]:
    """What a hook may ask for by name; see `Hook`."""
    return {
        "config": trainer.config,
        "world": trainer.world,
        "rows": trainer.rows,
        "model": trainer.model,
        "passes": trainer.passes,
        "mixture": trainer.mixture,
        "progress": trainer.progress,
        "clock": trainer.clock,
        "checkpoints": trainer.checkpoints,
        "policy": trainer.policy,
        "evaluate": trainer.evaluate,
        "watchdog": trainer.watchdog,
        "ask_stop": trainer.ask_stop,
        "agreed_stop": lambda: trainer.stop,
        "is_asked": lambda: trainer.stop_asked > Stop.NO,
        "stop_if_asked": trainer.stop_if_asked,
        "pending_metrics": trainer.pending_metrics,
    }
