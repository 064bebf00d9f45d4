"""The suites that are known by name, as their files would read."""

from typing import Any

from castalia.recipes.mini import MINI_EARLY

PYTHIA_SIZES = ("14m", "31m", "70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")
BUILTIN: dict[str, dict[str, Any]] = {
    # Biderman et al. 2023, arXiv:2304.01373. The further seeds are those of PolyPythias, van der
    # Wal et al. 2025, arXiv:2503.09543, which has them of the five smallest sizes.
    "pythia": {
        "name": "pythia",
        "sizes": {size: f"pythia-{size}" for size in PYTHIA_SIZES},
        "data": {"standard": {}, "deduped": {"preset": "{preset}-deduped"}},
        "seeds": [1234],
        "extra_seeds": list(range(10)),
        "unnamed_seed": 1234,
    },
    "mini": {
        "name": "mini",
        "base": "mini",
        "sizes": {
            "tiny": {"model.num_layers": 2, "model.hidden_size": 64},
            "small": {"model.num_layers": 3, "model.hidden_size": 96},
            "medium": {"model.num_layers": 4, "model.hidden_size": 160},
        },
        "seeds": [0, 1],
        "checkpoints": {"steps": MINI_EARLY, "every": 100},
    },
}
