#!/usr/bin/env bash
# Trains on TPUs in a GKE cluster through XPK (pip install xpk; Docker and gcloud signed in).
#
#   launch/xpk.sh create  --cluster=C --zone=Z --project=P --type=v5p-32 --bucket=B [--slices=1] [--spot]
#   launch/xpk.sh run     --cluster=C --zone=Z --project=P --type=v5p-32 --workload=W [--slices=1] \
#                         -- --config=configs/qwen3_4b_long.py --workdir=/bucket/runs/one
#   launch/xpk.sh logs    --cluster=C --zone=Z --project=P --workload=W
#   launch/xpk.sh stop    --cluster=C --zone=Z --project=P --workload=W
#   launch/xpk.sh delete  --cluster=C --zone=Z --project=P
#
# create makes the cluster and mounts the bucket B at /bucket in every workload: all processes need one folder for
# checkpoints. run puts this repository into an image, without what .dockerignore names, and starts it; when a pod is
# preempted or killed GKE starts all again, up to --max_restarts times, from the newest checkpoint. An error that the
# training raises itself, as of a wrong set-up, has exit status 1 or 2 and ends the workload. stop gives pods five
# minutes to save. --dry_run prints the commands only.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
die() { echo "xpk.sh: $*" >&2; exit 2; }

[ $# -gt 0 ] || usage
action=$1; shift
cluster='' zone='' project='' type='' bucket='' workload='' slices=1 capacity=--on-demand dry_run='' max_restarts=50
while [ $# -gt 0 ]; do
  case $1 in
    --cluster=*) cluster=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --bucket=*) bucket=${1#*=} ;;
    --workload=*) workload=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --max_restarts=*) max_restarts=${1#*=} ;;
    --spot) capacity=--spot ;;
    --dry_run) dry_run=1 ;;
    --) shift; break ;;
    *) die "unknown argument $1" ;;
  esac
  shift
done
[ -n "$cluster" ] && [ -n "$zone" ] && [ -n "$project" ] || die "--cluster, --zone and --project are needed"
where=(--cluster="$cluster" --zone="$zone" --project="$project")

# Runs a command, or prints it so that a shell would read it back.
do_() {
  if [ -n "$dry_run" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}
need() { [ -n "${!1}" ] || die "$action needs --$1"; }

case $action in
  create)
    need type; need bucket
    do_ xpk cluster create "${where[@]}" --tpu-type="$type" --num-slices="$slices" "$capacity" \
      --enable-workload-identity --enable-gcsfuse-csi-driver
    do_ xpk storage attach retention-jax "${where[@]}" --type=gcsfuse --bucket="$bucket" --mount-point=/bucket \
      --readonly=false --auto-mount=true --size=1000 \
      --mount-options=implicit-dirs,metadata-cache:ttl-secs:1,metadata-cache:negative-ttl-secs:0
    ;;
  run)
    need type; need workload
    [ $# -gt 0 ] || die "run needs the training's arguments after --"
    # exec: xpk passes SIGTERM on to the shell around the command alone.
    do_ xpk workload create "${where[@]}" --workload="$workload" --tpu-type="$type" --num-slices="$slices" \
      --base-docker-image=python:3.12 --script-dir="$PWD" --max-restarts="$max_restarts" \
      --termination-grace-period-seconds=300 \
      --command="pip install --quiet --editable '.[tpu]' && exec python -m retention_jax.train$(printf ' %q' "$@")"
    ;;
  logs)
    need workload
    do_ gcloud container clusters get-credentials "$cluster" --location="${zone%-*}" --project="$project"
    do_ kubectl logs --follow --prefix --tail=100 --max-log-requests=512 \
      --selector="jobset.sigs.k8s.io/jobset-name=$workload,batch.kubernetes.io/job-completion-index=0"
    ;;
  stop) need workload; do_ xpk workload delete "${where[@]}" --workload="$workload" --force ;;
  delete) do_ xpk cluster delete "${where[@]}" --force ;;
  *) usage ;;
esac
