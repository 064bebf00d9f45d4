"""Build a model from a Hugging Face folder on 4 ranks in several layouts; report what is not the
folder's."""

import sys
from typing import Any

from tests.seams.ranks import report

from castalia.checkpoint.tensors import FileTensor
from castalia.distributed import World
from castalia.formats.saved_model import open_model
from castalia.models.init import init_parameter
from castalia.optim import Rules
from castalia.runs.config import RunConfig
from castalia.train.build import build_model
from castalia.train.start import VOCABULARY, open_start

read: list[int] = []
"""Elements of each part that this rank read from the folder."""


def count_reads() -> None:
    """Let every stored tensor note how much of it is read."""
    original = FileTensor.__getitem__

    def counted(self: FileTensor, part: tuple[slice, ...], /) -> Any:
        out = original(self, part)
        read.append(out.numel())
        return out

    FileTensor.__getitem__ = counted  # type: ignore[method-assign]


def differences(folder: str, output: str, layout: dict[str, int], **model: Any) -> dict[str, Any]:
    """Names of weights that differ from the folder's, or from a draw where the folder has no row,
    and counts."""
    saved = open_model(folder)
    sizes = saved.config.model_dump() | {"start": folder} | model
    config = RunConfig(
        output=output, model=sizes, device="cpu", parallel=layout, data={"seq_length": 16}
    )
    world = World.start(config.parallel, "cpu")
    start = open_start(config, world)
    assert start is not None
    read.clear()
    laid_out = build_model(config, world, Rules(config.optim), start)
    own = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in laid_out.parameters())
    elements = sum(read)
    wrong = []
    parameters = dict(laid_out.named_parameters())
    for name, parameter in parameters.items():
        expected = init_parameter(name, parameter.shape, config.model, config.seed)
        rows = start.rows if name in VOCABULARY else None
        expected[:rows] = saved.tensors[name][:rows]
        if not parameter.full_tensor().equal(expected):
            wrong.append(name)
    return {"wrong": wrong, "names": sorted(parameters), "read": elements, "held": own}


if __name__ == "__main__":
    count_reads()
    arguments = sys.argv[1:3]
    report(
        {
            "tp x fsdp": differences(*arguments, {"tp": 2}),
            "pp x fsdp": differences(*arguments, {"pp": 2}),
            "cp x tp": differences(*arguments, {"cp": 2, "tp": 2}),
            "padded": differences(*arguments, {"tp": 2}, vocab_size=500, start_vocab="pad"),
        }
    )
