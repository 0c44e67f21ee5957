"""`weft calibrate CONFIG`: measures this machine and writes a cluster file for `weft plan`."""

import json
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from weft.launch.errors import UserError
from weft.launch.overrides import write_yaml
from weft.launch.settings import Settings, build_settings, check_layout, dump_settings, load_settings, resolved
from weft.launch.world import device_type, gpus_here, world_size

_BUSY = 1.25  # wall time per CPU time, in units of the ranks that share a core
_SMALL_LLAMA = {
    "name": "calibrate",
    "model": {
        "model_type": "llama",
        "vocab_size": 2048,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "max_position_embeddings": 256,
    },
}


@click.command(epilog="Example:  weft calibrate configs/demo.yaml --output machine.yaml")
@click.argument("config", required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--output", type=click.Path(path_type=Path), default=Path("cluster.yaml"), show_default=True)
def calibrate_command(config: str | None, overrides: tuple[str, ...], output: Path) -> None:
    """Measure this machine for the planner: matrix products, memory, messages and training steps, all ranks busy.

    CONFIG is a settings file whose model and ranks are measured (a small Llama on one rank per device when left out).
    Then `cluster.device=OUTPUT` makes `weft plan` use what was measured.
    """
    from weft.launch.calibrate.fit import Machine, fit_cluster
    from weft.launch.calibrate.measure import cores_here

    settings = _replicas(load_settings(config, overrides) if config else build_settings(_SMALL_LLAMA), bool(config))
    ranks = settings.parallel.data
    assert ranks != "auto"
    _prepare(output)
    measured = _run(settings, ranks)
    cores = cores_here()
    on_cpu = device_type(settings) == "cpu"
    _warn_when_busy(measured["busy"], ranks, cores if on_cpu else ranks)
    machine = Machine(
        name=platform.node(),
        ranks=ranks,
        processors=min(cores, ranks) if on_cpu else None,
        memory=_memory(ranks, on_cpu),
    )
    try:
        cluster = fit_cluster(machine, measured, settings)
    except ValueError as error:
        raise UserError(f"{error}.") from None
    values = {key: value for key, value in cluster.model_dump(mode="json").items() if value is not None}
    _write(output, values)
    click.echo(f"{write_yaml(values)}\nwrote {output}; weft plan CONFIG cluster.device={output} plans with it")


def _replicas(settings: Settings, of_config: bool) -> Settings:
    """The settings with a replica on every rank, two microbatches each."""
    gpus = gpus_here(settings)
    ranks = world_size(settings, gpus_per_node=gpus) if of_config else gpus or os.cpu_count() or 1
    if settings.cluster.nodes > 1:
        raise UserError(f"cluster.nodes is {settings.cluster.nodes}, but one machine is measured; set it to 1.")
    parallel = {"data": ranks}
    batch = {"global_size": 2 * ranks * settings.batch.micro_size, "micro_size": settings.batch.micro_size}
    values = settings.model_dump(mode="json") | {"parallel": parallel, "batch": batch}
    settings = build_settings(values | {"cluster": {"device": settings.cluster.device}})
    check_layout(settings, ranks)
    return resolved(settings, ranks)


def _run(settings: Settings, ranks: int) -> dict[str, Any]:
    from weft.launch.calibrate.measure import RESULT, SETTINGS
    from weft.launch.launcher import Job, launch
    from weft.launch.preflight import check_devices

    check_devices(settings, ranks)
    with tempfile.TemporaryDirectory(prefix="weft-calibrate-") as folder:
        (Path(folder) / SETTINGS).write_text(dump_settings(settings), encoding="utf-8")
        launch(Job("weft.launch.calibrate.measure:main", folder, (), ranks, Path(folder) / "logs"))
        found: dict[str, Any] = json.loads((Path(folder) / RESULT).read_text(encoding="utf-8"))
    return found


def _warn_when_busy(busy: float, ranks: int, cores: int) -> None:
    expected = max(1.0, ranks / cores)
    if busy > _BUSY * expected:
        click.echo(
            f"{click.style('Warning:', fg='yellow')} the ranks waited for a core: {busy:.2f} s passed for each second "
            f"of work, where {expected:.2f} is to be expected of {ranks} ranks on {cores} cores; measure again when "
            "the machine has nothing else to do.",
            err=True,
        )


def _memory(ranks: int, on_cpu: bool) -> float:
    """GiB for each rank."""
    if on_cpu:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / ranks / 2**30, 3)
    import torch

    return round(torch.cuda.get_device_properties(0).total_memory / 2**30, 3)


def _prepare(path: Path) -> None:
    """Refuse what could not be written before a minute of measuring, not after it."""
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass


def _write(path: Path, values: dict[str, Any]) -> None:
    with _explained(path):
        part = path.with_name(f"{path.name}.part")
        part.write_text(write_yaml(values), encoding="utf-8")
        os.replace(part, path)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--output {path} cannot be written ({error.strerror}); choose another path.") from error
