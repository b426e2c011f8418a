"""Devices that need not be here: what they offer, and meshes of them that programs are compiled for."""

from __future__ import annotations

import dataclasses
import importlib.util

import jax
from jax.sharding import Mesh

from nqf.config import MeshConfig
from nqf.training.mesh import make_mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """Devices of one kind that are connected.

    Attributes:
      kind: What they are.
      count: How many of them jax sees.
      memory: Bytes of memory of each that a program may use.
      flops: Operations per second of each in bfloat16 products.
      bandwidth: Bytes per second from its memory.
      link: Bytes per second that each sends to the others.
      topology: What libtpu calls them; empty for other platforms.
    """

    kind: str
    count: int
    memory: int
    flops: float
    bandwidth: float
    link: float
    topology: str = ""


def _tpu(kind: str, topology: str, count: int, gib: float, flops: float, bandwidth: float, link: float) -> Target:
    return Target(
        kind=f"TPU {kind}", topology=topology, count=count, memory=int(gib * 2**30), flops=flops, bandwidth=bandwidth,
        link=link,
    )  # fmt: skip


# Of "System architecture" in Google Cloud's documentation of v5e, v6e and v5p (a v5p-8 is four chips of two cores; the
# links are half of the interconnect's bandwidth in both directions), of NVIDIA's data sheets of the H200 SXM and the L4
# (which gives its products with sparsity: twice these), and of the RTX 4090 in NVIDIA's white paper on the Ada
# architecture, version 2.01; the links of the last two are PCIe 4.0 x16. The compiler keeps .25 GiB of a TPU's memory
# for itself.
TARGETS = {
    "v5e-8": _tpu("v5e", "v5e:2x4", 8, 15.75, 197e12, 819e9, 100e9),
    "v6e-8": _tpu("v6e", "v6e:2x4", 8, 31.25, 918e12, 1_640e9, 224e9),
    "v5p-8": _tpu("v5p", "v5p:2x2x1", 4, 94.75, 459e12, 2_765e9, 300e9),
    "l4": Target(kind="L4", count=1, memory=int(24e9), flops=121e12, bandwidth=300e9, link=32e9),
    "rtx4090": Target(kind="RTX 4090", count=1, memory=int(24e9), flops=165.2e12, bandwidth=1_008e9, link=32e9),
    "h200": Target(kind="H200", count=1, memory=int(141e9), flops=989e12, bandwidth=4_800e9, link=450e9),
    "8xh200": Target(kind="H200", count=8, memory=int(141e9), flops=989e12, bandwidth=4_800e9, link=450e9),
}


def mesh_of(target: Target, config: MeshConfig) -> tuple[Mesh, str]:
    """A mesh of a target's devices, and why it is one of simulated CPUs, if it is; to be called before jax has begun.

    With libtpu, programs for TPUs are compiled where there is none. No plugin of GPUs compiles without one.

    Raises:
      ValueError: The mesh of the configuration does not have as many devices.
    """
    if target.topology and importlib.util.find_spec("libtpu"):
        from jax.experimental.topologies import get_topology_desc

        described = get_topology_desc(platform="tpu", topology_name=target.topology)
        return make_mesh(config, described.devices), ""
    why = "libtpu is not installed" if target.topology else "no plugin of GPUs compiles without one"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", target.count)
    return make_mesh(config, jax.devices()[: target.count]), why
