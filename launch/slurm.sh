#!/usr/bin/env bash
# Trains on GPU nodes of a SLURM cluster, from the root of this repository, with .venv holding '.[gpu]':
#
#   sbatch --nodes=2 launch/slurm.sh --config=configs/qwen3_4b_long.py --workdir=/shared/runs/one
#   bash launch/slurm.sh --dry_run --config=... --workdir=...     prints the commands only
#
# Before the time limit and on preemption every process gets SIGTERM, saves and ends; the job is queued again, to go on
# from there. After a crash all processes end within half a minute; the job is queued again too, up to three times (see
# slurm-JOB.crashes). scancel ends the job for good.
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

job=${SLURM_JOB_ID:-JOB}
# The processes notice a dead one themselves; were SLURM to end them, it would look like SIGTERM at the time limit. srun
# does not take the CPUs of a task from sbatch.
do_ srun --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" --label \
  .venv/bin/python -m retention_jax.train "$@"
status=$?
[ -z "$dry_run" ] || status=143
case $status in
  0) ;;
  143) do_ scontrol requeue "$job" ;;  # stopped by SIGTERM, saved
  *)
    # Not SLURM_RESTART_COUNT: it counts the requeues at the time limit too.
    echo "$(date) status $status" >>"slurm-$job.crashes"
    if [ "$(wc -l <"slurm-$job.crashes")" -le 3 ]; then do_ scontrol requeue "$job"; fi
    ;;
esac
[ -n "$dry_run" ] || exit "$status"
