"""`weft memory CONFIG`: what a rank of each pipeline stage holds, by formula and as the engine counts it."""

import tempfile
from pathlib import Path

import click

from weft.launch.ledger import beside_formula, fit_text, ledger_text, shown_pipeline_ranks
from weft.launch.settings import Settings, check_layout, load_settings, resolved
from weft.launch.world import gpus_here, world_size


@click.command(epilog="Example:  weft memory configs/demo.yaml parallel.recompute=full")
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--measure", is_flag=True, help="Also train a step on this machine and measure it on every rank.")
def memory_command(config: str, overrides: tuple[str, ...], measure: bool) -> None:
    """Show the memory of a rank of each pipeline stage: parameters, gradients, optimiser and activations.

    CONFIG is a settings file; each KEY=VALUE replaces one of its settings. `formula` is that of docs/memory.md,
    `counted` what the engine itself allocates for one step on the meta device, of this or any other cluster.
    """
    settings = load_settings(config, overrides)
    ranks = world_size(settings, gpus_per_node=gpus_here(settings))
    check_layout(settings, ranks)
    if measure:
        _measure(settings, ranks, config, overrides)
    else:
        click.echo(_tables(resolved(settings, ranks), ranks))


def _tables(settings: Settings, ranks: int) -> str:
    from weft.launch.dry_run import dry_run

    parts, most = [], 0.0
    for pipeline_rank in shown_pipeline_ranks(settings.parallel.pipeline):
        run = dry_run(settings, ranks, pipeline_rank * ranks // settings.parallel.pipeline)
        title = f"pipeline rank {pipeline_rank} of {settings.parallel.pipeline}, {'; '.join(run.stages)}"
        parts.append(f"{title}\n{ledger_text(beside_formula(settings, pipeline_rank, 'counted', run.memory))}")
        most = max(most, run.memory.total)
    fit = fit_text(settings.cluster.device, most)
    return "\n\n".join([*parts, fit] if fit else parts)


def _measure(settings: Settings, ranks: int, config: str, overrides: tuple[str, ...]) -> None:
    from weft.launch.launcher import Job, launch
    from weft.launch.preflight import check_devices

    check_devices(settings, ranks)
    with tempfile.TemporaryDirectory(prefix="weft-memory-") as logs:
        launch(Job("weft.launch.measured_ranks:main", config, overrides, ranks // settings.cluster.nodes, Path(logs)))
