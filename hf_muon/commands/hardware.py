"""Rates of devices and links: datasheet figures, and the share of them that a step reaches.

In: the name of a device. Out: its rates. They are datasheet figures times a typical share; measured
rates can be given instead (docs/gpu.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from hf_muon.values import require_one_of

PRODUCTS_SHARE = 0.7
"""Share of the peak rate that large matrix products reach: cuBLAS at 8192³ reaches 0.65 to 0.8."""
MEMORY_SHARE = 0.9
"""Share of the memory bandwidth that an elementwise kernel reaches."""
LINK_SHARE = 0.8
"""Share of a link's bandwidth that collectives of many megabytes reach."""
IB_GBPS = 50.0
"""GB/s that a rank sends to other nodes, with one port of 400 Gb/s (InfiniBand NDR) per rank."""
RANKS_PER_NODE = 8


@dataclass(frozen=True)
class Device:
    """An accelerator, or a CPU.

    Attributes:
        title: Its name.
        tflops: Peak rate of dense bfloat16 products, 10¹² operations per second.
        float32_tflops: Peak rate of float32 products without TF32, 10¹² operations per second.
        memory_tbps: Memory bandwidth, 10¹² bytes per second.
        memory_gb: Size of its memory, 10⁹ bytes; None if unknown.
        link_gbps: Bandwidth to others of its node in one direction, 10⁹ bytes per second.
        shares: Shares of the rates of products, memory and link that are reached.
    """

    title: str
    tflops: float
    float32_tflops: float
    memory_tbps: float
    memory_gb: float | None
    link_gbps: float
    shares: tuple[float, float, float] = (PRODUCTS_SHARE, MEMORY_SHARE, LINK_SHARE)

    def operations_per_second(self, *, in_half: bool) -> float:
        """Return the rate that matrix products reach."""
        return 1e12 * self.shares[0] * (self.tflops if in_half else self.float32_tflops)

    def with_tflops(self, reached: float) -> Device:
        """Return a copy with the rate that bfloat16 products reach, 10¹² operations per second."""
        require_rate("tflops", reached)
        return replace(self, tflops=reached / self.shares[0])

    @property
    def bytes_per_second(self) -> float:
        """The memory bandwidth that is reached."""
        return 1e12 * self.shares[1] * self.memory_tbps


_AS_THEY_ARE = (1.0, 1.0, 1.0)

# Datasheets give the bandwidth of NVLink and PCIe for both directions together; here is half of it.
# A PCIe 4.0 slot of 16 lanes has 32 GB/s. Rates with sparsity are twice those here.
DEVICES = {
    # NVIDIA H100 Tensor Core GPU datasheet, SXM5
    "h100": Device("H100 SXM", 989, 67, 3.35, 80, 450),
    # NVIDIA H200 Tensor Core GPU datasheet, SXM
    "h200": Device("H200 SXM", 989, 67, 4.8, 141, 450),
    # NVIDIA HGX B200 datasheet, an eighth of the board's figures
    "b200": Device("B200 (HGX)", 2250, 75, 7.7, 180, 900),
    # NVIDIA A100 Tensor Core GPU datasheet, SXM4
    "a100": Device("A100 SXM 80 GB", 312, 19.5, 2.039, 80, 300),
    # NVIDIA L40S datasheet; PCIe 4.0
    "l40s": Device("L40S", 362, 91.6, 0.864, 48, 32),
    # NVIDIA L4 datasheet; PCIe 4.0
    "l4": Device("L4", 121, 30.3, 0.3, 24, 32),
    # NVIDIA Ada GPU architecture, appendix A: accumulation in float32; PCIe 4.0
    "4090": Device("RTX 4090", 165, 82.6, 1.008, 24, 32),
    # No particular device: round numbers for the rates that are reached.
    "cuda": Device("a GPU with bfloat16", 400, 40, 2.0, None, 50, _AS_THEY_ARE),
    "cpu": Device("a CPU core", 0.1, 0.1, 0.01, None, 1, _AS_THEY_ARE),
}


def device_of(name: str) -> Device:
    """Return a device by its name.

    Raises:
        ValueError: No device has that name.
    """
    advice = " Take cuda with --tflops and --gbps for another one."
    require_one_of("device", name, DEVICES, advice)
    return DEVICES[name]


class Links(NamedTuple):
    """Rates at which a rank sends inside its node and to other nodes, 10⁹ bytes per second.

    Each message goes to all peers in equal parts. Parts for peers on the same node go over NVLink,
    then the others over InfiniBand. No rank shares either link with another rank.
    """

    inside: float
    between: float
    ranks_per_node: int = RANKS_PER_NODE

    def milliseconds(self, nbytes: int, rank: int, peers: range) -> float:
        """Return how many milliseconds a rank takes to send a message.

        Args:
            nbytes: Bytes to all peers together.
            rank: The rank that sends; the ranks of a node have consecutive numbers.
            peers: The ranks of the group, including the sender.
        """
        others = len(peers) - 1
        if not others:
            return 0.0
        node = rank // self.ranks_per_node
        near_by = sum(peer // self.ranks_per_node == node for peer in peers) - 1
        share = near_by / others
        return nbytes / 1e6 * (share / self.inside + (1 - share) / self.between)

    def __str__(self) -> str:
        """Return the rates as part of a sentence."""
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
    """Return the links of a rank; all rates in 10⁹ bytes per second.

    Args:
        device: Provides the rates that are not given.
        gbps: Rate of all messages.
        nvlink_gbps: Rate that is reached inside a node.
        ib_gbps: Rate that is reached between nodes.
        ranks_per_node: Number of ranks on a node.

    Raises:
        ValueError: A rate or a number is not above 0, or ``gbps`` is given with another rate.
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
    """Raise if a rate is not above 0."""
    if not rate > 0:
        raise ValueError(f"{name}={rate}: a number above 0 is expected.")
