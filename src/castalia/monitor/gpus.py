"""What GPUs can do, as data: peak rate, memory and links, from NVIDIA's data sheets. Needs no torch."""

from typing import NamedTuple


class Gpu(NamedTuple):
    """One kind of GPU in the machines that it is usually sold in."""

    part: str
    """A part of the name that the driver gives it."""
    tflops: float
    """Dense bf16 (V100: fp16) tensor-core peak in TFLOP/s."""
    memory_gib: float
    """Memory that a process can see, GiB: somewhat less than what is on the label."""
    node_gb: float
    """Bandwidth to the other GPUs of the node, GB/s in each direction: NVLink or PCIe."""
    network_gb: float
    """Bandwidth to other nodes, GB/s in each direction: the network card that its usual machine has for each GPU."""
    reach: float = 0.5
    """Share of the peak that a large model's step reaches without waiting for communication."""


GPUS = {
    "h200": Gpu("H200", 989.5, 139.8, 450, 50, 0.47),
    "h100-pcie": Gpu("H100 PCIe", 756, 79.2, 64, 25),
    "h100": Gpu("H100", 989.5, 79.2, 450, 50, 0.47),
    "a100-80": Gpu("A100", 312, 79.3, 300, 25, 0.65),
    "a100-40": Gpu("A100", 312, 39.4, 300, 25, 0.65),
    "b200": Gpu("B200", 2250, 178.4, 900, 50),
    "l40s": Gpu("L40S", 362, 44.4, 32, 12.5),
    "a10g": Gpu("A10G", 70, 22.1, 32, 6.25),
    "v100-32": Gpu("V100", 125, 31.7, 150, 12.5),
}
"""Name for --gpu -> numbers; a longer name of a device stands before the shorter one that it holds.

Sources, all NVIDIA: data sheets of each GPU (rates, memory, NVLink both ways halved, PCIe 4 x16 32 GB/s, PCIe 5 x16
64 GB/s); network: DGX H100, H200 and B200 have a 400 Gb/s card a GPU, DGX A100 a 200 Gb/s card a GPU; the others are
taken with 100 Gb/s a GPU, A10G with half of that and H100 PCIe with 200 Gb/s. `reach` is from no data sheet but
measured: MosaicML's MPT-7B in bf16, 46.4% on 8 H100 and 64.2% on 8 A100 (llm-foundry, benchmarking README),
rounded up for what its communication costs; kinds of which we know no such run have 0.5.
"""

PEAK_TFLOPS = {gpu.part: gpu.tflops for gpu in GPUS.values()}
"""Peak by a part of the device name."""
