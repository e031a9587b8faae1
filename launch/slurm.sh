#!/usr/bin/env bash
# Trains on GPU nodes of a SLURM cluster, from the root of this repository, with .venv holding '.[gpu]':
#
#   sbatch --nodes=2 launch/slurm.sh --config=configs/qwen3_4b_long.py --workdir=/shared/runs/one
#   bash launch/slurm.sh --dry_run --config=... --workdir=...     prints the commands only
#
# Before the time limit and on preemption every process gets SIGTERM, saves and ends; the job is queued again and goes on
# from there. A crash ends all processes and queues the job again too, up to three times.
#
# One process for each GPU, which is how jax reads a SLURM step; each sees all GPUs of its node and takes its own.
#SBATCH --job-name=retention_jax
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

dry_run=''
if [ "${1:-}" = --dry_run ]; then dry_run=1; shift; fi
[ $# -gt 0 ] || { echo "slurm.sh: the training's arguments are needed" >&2; exit 2; }

do_() {
  if [ -n "$dry_run" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}

do_ srun --kill-on-bad-exit=1 --label .venv/bin/python -m retention_jax.train "$@"
status=$?
# 143: stopped by SIGTERM, saved.
if [ -n "$dry_run" ] || [ $status -eq 143 ] || { [ $status -ne 0 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ]; }; then
  do_ scontrol requeue "${SLURM_JOB_ID:-JOB}"
fi
exit $status
