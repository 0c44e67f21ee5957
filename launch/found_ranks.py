"""The ranks that torchrun, srun or Kubernetes have started already."""

import re
from collections.abc import Mapping


def found_rank(environment: Mapping[str, str]) -> dict[str, str] | None:
    """The variables RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of this process's rank.

    None where nobody has started the ranks yet. Slurm's own variables are translated; the first host of the step is
    where the ranks meet, at a port that follows from the job's number unless MASTER_PORT is set.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return {"RANK": environment["RANK"], "WORLD_SIZE": environment["WORLD_SIZE"]}
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
    if "SLURM_PROCID" not in environment or tasks == "1":
        return None
    hosts = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", "localhost"))
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": environment.get("MASTER_ADDR", _first_host(hosts)),
        "MASTER_PORT": environment.get("MASTER_PORT", str(20000 + int(environment.get("SLURM_JOB_ID", "0")) % 20000)),
    }


def _first_host(hosts: str) -> str:
    """The first of Slurm's hosts: `node[003-007,9],other` begins with `node003`."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", hosts)
    return "".join(part or "" for part in match.groups()) if match else hosts
