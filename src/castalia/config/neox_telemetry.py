"""GPT-NeoX's options about what is measured: norms, noise scale, times, collectives.

Source  GPT-NeoX, megatron/logging.py:350-440 and megatron/gradient_noise_scale; DeepSpeed's
        `steps_per_print`, `wall_clock_breakdown` and `comms_logger`.
"""

from castalia.config.neox_reading import NeoxOptions, NeoxReading, OptionRule, note
from castalia.config.neox_telemetry_keys import TELEMETRY_OPTIONS

AT_LOG = ("log_grad_norm", "log_param_norm", "log_grad_pct_zeros", "log_optimizer_states")
"""Options whose numbers GPT-NeoX writes at every line of its log."""


def statistics(o: NeoxOptions, out: NeoxReading) -> None:
    """Each at the interval at which GPT-NeoX or DeepSpeed writes it."""
    for name in AT_LOG:
        if o[name]:
            o.put(out, TELEMETRY_OPTIONS[name].path, o["log_interval"], name, "log_interval")
    asked = [name for name in AT_LOG if o[name]]
    if asked:
        note(
            out,
            f"{', '.join(asked)}: numbers of each layer, not of each parameter;"
            " monitor.norm_groups=parts has those of attention, MLP and norms",
            "monitor.norm_groups",
        )
    if o["log_gradient_noise_scale"]:
        every = o["gradient_noise_scale_n_batches"]
        o.put(out, "monitor.noise_scale_every", every, "gradient_noise_scale_n_batches")
        note(
            out,
            "log_gradient_noise_scale: from a part and all of the rows of one step in"
            f" {every}, at the same weights; GPT-NeoX's own code for it does not run",
            "monitor.noise_scale_every",
        )
    if o["wall_clock_breakdown"]:
        o.put(out, "monitor.times_every", o["steps_per_print"], "wall_clock_breakdown")
    if (o["comms_logger"] or {}).get("enabled"):
        o.put(out, "monitor.collectives_every", o["steps_per_print"], "comms_logger")


TELEMETRY_RULES: list[tuple[tuple[str, ...], OptionRule]] = [
    (tuple(name for name, option in TELEMETRY_OPTIONS.items() if not option.plain), statistics)
]
"""The options that the rule reads, and the rule."""
