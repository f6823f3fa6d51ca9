"""What devices and links can do, by their makers' figures, and what of it a step reaches.

In: the name of a device. Out: its rates. They are figures of datasheets times a share, until
somebody has measured one (docs/gpu.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from hf_muon.values import near

PRODUCTS_SHARE = 0.7
"""Of the peak rate that large matrix products reach: cuBLAS at 8192³ comes to 0.65 to 0.8."""
MEMORY_SHARE = 0.9
"""Of the memory's bandwidth that an elementwise kernel reaches."""
LINK_SHARE = 0.8
"""Of a link's bandwidth that collectives of many megabytes reach."""
IB_GBPS = 50.0
"""GB/s that a rank sends to other nodes: a port of 400 Gb/s (InfiniBand NDR) for each."""
RANKS_PER_NODE = 8


@dataclass(frozen=True)
class Device:
    """An accelerator, or a CPU.

    Attributes:
        title: Its name.
        tflops: Dense products in bfloat16, 10¹² operations per second.
        float32_tflops: Products in float32, without TF32.
        memory_tbps: Bandwidth of its memory, 10¹² bytes per second.
        memory_gb: Its memory, 10⁹ bytes; None where it is not known.
        link_gbps: What it sends to others of its node, 10⁹ bytes per second in one direction.
        shares: What of the rates of products, memory and link is reached.
    """

    title: str
    tflops: float
    float32_tflops: float
    memory_tbps: float
    memory_gb: float | None
    link_gbps: float
    shares: tuple[float, float, float] = (PRODUCTS_SHARE, MEMORY_SHARE, LINK_SHARE)

    def operations_per_second(self, *, in_half: bool) -> float:
        """What products reach."""
        return 1e12 * self.shares[0] * (self.tflops if in_half else self.float32_tflops)

    def with_tflops(self, reached: float) -> Device:
        """The same, with what products in bfloat16 reach, 10¹² operations per second."""
        require_rate("tflops", reached)
        return replace(self, tflops=reached / self.shares[0])

    @property
    def bytes_per_second(self) -> float:
        """What its memory reaches."""
        return 1e12 * self.shares[1] * self.memory_tbps


_AS_THEY_ARE = (1.0, 1.0, 1.0)

# Makers give the bandwidth of NVLink and PCIe for both directions together: half of it is here. A
# PCIe 4.0 slot of 16 lanes has 32 GB/s. Rates with sparsity are twice those here.
DEVICES = {
    # NVIDIA H100 Tensor Core GPU datasheet, SXM5
    "h100": Device("H100 SXM", 989, 67, 3.35, 80, 450),
    # NVIDIA H200 Tensor Core GPU datasheet, SXM
    "h200": Device("H200 SXM", 989, 67, 4.8, 141, 450),
    # NVIDIA HGX B200 datasheet, an eighth of it
    "b200": Device("B200 (HGX)", 2250, 75, 7.7, 180, 900),
    # NVIDIA A100 Tensor Core GPU datasheet, SXM4
    "a100": Device("A100 SXM 80 GB", 312, 19.5, 2.039, 80, 300),
    # NVIDIA L40S datasheet; PCIe 4.0
    "l40s": Device("L40S", 362, 91.6, 0.864, 48, 32),
    # NVIDIA L4 datasheet; PCIe 4.0
    "l4": Device("L4", 121, 30.3, 0.3, 24, 32),
    # NVIDIA Ada GPU architecture, appendix A: sums in float32; PCIe 4.0
    "4090": Device("RTX 4090", 165, 82.6, 1.008, 24, 32),
    # No particular one: rates that are reached, as round numbers.
    "cuda": Device("a GPU with bfloat16", 400, 40, 2.0, None, 50, _AS_THEY_ARE),
    "cpu": Device("a CPU core", 0.1, 0.1, 0.01, None, 1, _AS_THEY_ARE),
}


def device_of(name: str) -> Device:
    """A device by its name.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in DEVICES:
        raise ValueError(
            f"device={name!r} is not one of {', '.join(DEVICES)}.{near(name, tuple(DEVICES))} "
            "Take cuda with --tflops and --gbps for another one."
        )
    return DEVICES[name]


class Links(NamedTuple):
    """What a rank sends per second, 10⁹ bytes: inside its node, and to other nodes.

    Each message goes to every peer in equal parts. Those for peers on the same node take NVLink,
    the others InfiniBand, one after the other; every rank has both to itself.
    """

    inside: float
    between: float
    ranks_per_node: int = RANKS_PER_NODE

    def milliseconds(self, nbytes: int, rank: int, peers: range) -> float:
        """How long a rank sends.

        Args:
            nbytes: How much, to all peers together.
            rank: Who sends; ranks of a node follow each other.
            peers: The ranks of the group, that rank among them.
        """
        others = len(peers) - 1
        if not others:
            return 0.0
        node = rank // self.ranks_per_node
        near_by = sum(peer // self.ranks_per_node == node for peer in peers) - 1
        share = near_by / others
        return nbytes / 1e6 * (share / self.inside + (1 - share) / self.between)

    def __str__(self) -> str:
        """As a part of a sentence."""
        if self.inside == self.between:
            return f"{self.inside:g} GB/s"
        return (
            f"{self.inside:g} GB/s inside a node of {self.ranks_per_node} and {self.between:g} "
            "GB/s between nodes"
        )


def links_of(
    device: Device,
    gbps: float | None = None,
    nvlink_gbps: float | None = None,
    ib_gbps: float | None = None,
    ranks_per_node: int = RANKS_PER_NODE,
) -> Links:
    """The links of a rank.

    Args:
        device: Gives what is not given.
        gbps: All messages at this rate.
        nvlink_gbps: What is reached inside a node.
        ib_gbps: What is reached between nodes.
        ranks_per_node: How many ranks a node has.

    Raises:
        ValueError: A rate or a number that is not above 0, or ``gbps`` beside another rate.
    """
    rates = {"gbps": gbps, "nvlink_gbps": nvlink_gbps, "ib_gbps": ib_gbps}
    given = {name: rate for name, rate in rates.items() if rate is not None}
    for name, rate in {**given, "ranks_per_node": ranks_per_node}.items():
        require_rate(name, rate)
    if gbps is not None:
        if len(given) > 1:
            raise ValueError(
                f"{', '.join(given)} are given together: gbps is the rate of all messages; leave "
                "it out, or the others."
            )
        return Links(gbps, gbps, ranks_per_node)
    inside = nvlink_gbps or device.shares[2] * device.link_gbps
    between = ib_gbps or device.shares[2] * min(IB_GBPS, device.link_gbps)
    return Links(inside, between, ranks_per_node)


def require_rate(name: str, rate: float) -> None:
    """Raise for a rate that nothing can have."""
    if not rate > 0:
        raise ValueError(f"{name}={rate}: a number above 0 is expected.")
