"""GPT-NeoX's and DeepSpeed's names of options about what is measured."""

from castalia.config.neox_option import Honoured

TELEMETRY_OPTIONS = {
    "log_grad_norm": Honoured("monitor.gradient_norms_every", "bool", False),
    "log_param_norm": Honoured("monitor.weight_norms_every", "bool", False),
    "log_grad_pct_zeros": Honoured("monitor.zero_gradients_every", "bool", False),
    "log_optimizer_states": Honoured("monitor.state_norms_every", "bool", False),
    "log_gradient_noise_scale": Honoured("monitor.noise_scale_every", "bool", False),
    "gradient_noise_scale_n_batches": Honoured("monitor.noise_scale_every", "int", 5),
    "peak_theoretical_tflops": Honoured("monitor.peak_tflops", "number", plain=True),
    # DeepSpeed's.
    "wall_clock_breakdown": Honoured("monitor.times_every", "bool", False),
    "comms_logger": Honoured("monitor.collectives_every", "dict"),
    "steps_per_print": Honoured("monitor.times_every", "int", 10),
}
"""The options that set a statistic."""

TELEMETRY_KEYS = {"comms_logger": "enabled"}
"""Honoured keys of DeepSpeed's dictionaries."""
TELEMETRY_IGNORED = {"comms_logger": "verbose prof_all debug prof_ops"}
"""Keys of them without an effect: all kinds of collectives are counted, and nothing is printed."""
