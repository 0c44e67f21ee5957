#!/bin/bash
# Trains on two nodes with eight GPUs each, from a clone in a folder that all nodes share:
#   ./run demo train.steps=1                                     # once, on a node with a GPU: makes .venv
#   sbatch examples/slurm.sh my.yaml [key=value ...]
# One task a node: srun starts torchrun, and torchrun starts one process a GPU.

#SBATCH --job-name=weft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=weft-%j.log
#SBATCH --signal=TERM@120

# --signal: 2 minutes before the time is up weft is told to end and writes a checkpoint; the next job resumes from it.

set -euo pipefail
cd -- "$SLURM_SUBMIT_DIR"

first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000)) # two jobs that share a node must not share a port

srun --kill-on-bad-exit=1 .venv/bin/torchrun \
    --nnodes="$SLURM_NNODES" \
    --nproc-per-node="$SLURM_GPUS_ON_NODE" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$first_node:$port" \
    --rdzv-id="$SLURM_JOB_ID" \
    --module weft.launch.train "$@" \
    cluster.nodes="$SLURM_NNODES" cluster.devices_per_node="$SLURM_GPUS_ON_NODE"
