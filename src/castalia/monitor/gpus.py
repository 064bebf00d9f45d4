"""GPUs as data: peak rate, memory and links, from NVIDIA's data sheets. Needs no torch."""

from typing import NamedTuple


class Gpu(NamedTuple):
    """One kind of GPU, in the machine it is usually sold in."""

    part: str
    """A part of the name that the driver reports."""
    tflops: float
    """Dense bf16 (V100: fp16) tensor-core peak in TFLOP/s."""
    memory_gib: float
    """Memory that a process can use, GiB: somewhat less than on the label."""
    node_gb: float
    """Bandwidth to the other GPUs of the node, GB/s in each direction: NVLink or PCIe."""
    network_gb: float
    """Bandwidth to other nodes, GB/s in each direction, of the network card of each GPU in its
    usual machine."""
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
"""Name for --gpu -> numbers. A device name stands before any shorter name that it contains.

Sources, all NVIDIA: the data sheet of each GPU (rates, memory, NVLink both ways halved, PCIe 4 x16
32 GB/s, PCIe 5 x16 64 GB/s). Network: DGX H100, H200 and B200 have a 400 Gb/s card a GPU, DGX A100
a 200 Gb/s card a GPU; the others are assumed to have 100 Gb/s a GPU, A10G half of that and H100
PCIe 200 Gb/s. `reach` is measured: MosaicML's MPT-7B in bf16, 46.4% on 8 H100 and 64.2% on 8 A100
(llm-foundry, benchmarking README), rounded up by the cost of its communication; kinds without a
known run have 0.5.
"""

PEAK_TFLOPS = {gpu.part: gpu.tflops for gpu in GPUS.values()}
"""Peak by a part of the device name."""
