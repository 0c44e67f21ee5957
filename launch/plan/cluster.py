"""Devices, links and the calibrated constants of a cluster: `clusters.yaml` by name, or a file of the user's.

A file has the fields of `Cluster`, in the units written beside them; `like: h100-sxm` takes what it leaves out from a
cluster by name.
"""

from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from weft.launch.errors import UserError
from weft.launch.overrides import read_yaml_file
from weft.launch.problems import nearest, sentences
from weft.launch.sections import AtLeastOne, Section, Text

Above0 = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
NotBelow0 = Annotated[float, Field(ge=0)]

TABLE = Path(__file__).parent / "clusters.yaml"


class Link(Section):
    """The way between devices, for each of them and in one direction."""

    bandwidth: Above0 = Field(description="GB/s of one device in one direction, as the vendor states it")
    efficiency: Share = Field(
        default=0.8, description="share of the bandwidth that collectives of large messages reach"
    )
    latency: NotBelow0 = Field(default=5.0, description="microseconds of one message, whatever its size")

    @property
    def rate(self) -> float:
        """Bytes per second that large messages reach."""
        return self.bandwidth * self.efficiency * 1e9

    @property
    def seconds(self) -> float:
        """Latency of one message."""
        return self.latency * 1e-6


class Origin(Section):
    """Where one figure comes from."""

    source: Text
    date: Text


class Cluster(Section):
    """Equal nodes of equal devices: the vendor's figures, and what is reached of them."""

    source: Text = Field(description="where the figures come from")
    date: Text = Field(description="when they were read or measured")
    sources: dict[str, Origin] | None = Field(
        default=None, description="where single figures come from, by the names of these fields"
    )
    peak_tflops: Annotated[dict[str, Above0], Field(min_length=1)] = Field(
        description="dense TFLOP/s of one device by number format: fp32, bf16, fp16, fp8, fp4"
    )
    memory: Above0 = Field(description="GiB of one device")
    memory_bandwidth: Above0 = Field(description="GB/s of one device's memory")
    devices_per_node: AtLeastOne = Field(default=8, description="devices that the fast links of `node` join")
    multiprocessors: AtLeastOne | None = Field(
        default=None,
        description="units of one device that each compute a tile of a matrix product; left out where products are "
        "measured at the model's own shapes",
    )
    node: Link = Field(description="the way to devices of the same node")
    network: Link = Field(description="the way to devices of other nodes")
    gemm_efficiency: Share = Field(default=0.7, description="share of the peak that large matrix products reach")
    attention_efficiency: Share = Field(default=0.5, description="share of the peak that fused attention reaches")
    memory_efficiency: Share = Field(default=0.8, description="share of the memory bandwidth that plain kernels reach")
    kernel_latency: NotBelow0 = Field(default=5.0, description="microseconds that each kernel takes beside its work")
    microbatch_overhead: NotBelow0 = Field(
        default=300.0, description="microseconds per stage, microbatch and direction beside the kernels"
    )
    collective_latency: NotBelow0 = Field(
        default=0.0,
        description="microseconds of each collective beside its messages; on shared cores its ranks lose their caches",
    )
    overlaps: bool = Field(
        default=True, description="whether devices compute while they communicate; CPU cores do both"
    )
    processors: AtLeastOne | None = Field(
        default=None, description="CPU cores that the devices of a node are processes on, where these share them"
    )
    reserved: NotBelow0 = Field(default=1.5, description="GiB of a device that drivers and libraries hold")

    def peak(self, precision: str) -> float:
        """FLOP/s of one device; a format that has no rate of its own computes as bf16, or as the slowest given."""
        rates = self.peak_tflops
        return 1e12 * (rates.get(precision) or rates.get("bf16") or rates.get("fp16") or min(rates.values()))

    @property
    def collective_seconds(self) -> float:
        """What each collective takes beside its messages."""
        return self.collective_latency * 1e-6

    @property
    def memory_rate(self) -> float:
        """Bytes per second that plain kernels read and write."""
        return self.memory_bandwidth * self.memory_efficiency * 1e9

    @property
    def memory_bytes(self) -> float:
        """What a rank may allocate of a device."""
        return (self.memory - self.reserved) * 2**30


def load_cluster(name: str) -> Cluster:
    """The cluster of that name, or of the YAML file at that path.

    Raises:
        UserError: there is no such name or file, or the file does not say what it must; one sentence for each problem.
    """
    if not name.endswith((".yaml", ".yml")):
        return _checked(_named(name), f"cluster {name}")
    values = read_yaml_file(Path(name))
    if "like" in values:
        own = {key: value for key, value in values.items() if key != "like"}
        values = _merged(_without_sources(_named(str(values["like"])), own), own)
    return _checked(values, name)


def cluster_names() -> list[str]:
    """The clusters that `clusters.yaml` knows."""
    return list(_table())


def _named(name: str) -> dict[str, Any]:
    table = _table()
    if name not in table:
        near = nearest(name, list(table))
        hint = f"did you mean {near}?" if near else f"choose one of {', '.join(table)}, or a YAML file."
        raise UserError(f"cluster.device is {name}, whose rates and memory are not known; {hint}")
    values: dict[str, Any] = table[name]
    return values


@cache
def _table() -> dict[str, Any]:
    return read_yaml_file(TABLE)


def _without_sources(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`base` without the sources of figures that `own` has."""
    return base | {"sources": {name: origin for name, origin in base["sources"].items() if name not in own}}


def _merged(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """`base` with `values` in place of its own, mappings field by field."""
    merged = dict(base)
    for key, value in values.items():
        own = base.get(key)
        merged[key] = own | value if isinstance(own, dict) and isinstance(value, dict) else value
    return merged


def _checked(values: dict[str, Any], source: str) -> Cluster:
    try:
        return Cluster.model_validate(values)
    except ValidationError as error:
        problems = sentences(error, Cluster, values)
        raise UserError("\n".join(f"{source}: {problem}" for problem in problems)) from None
