#!/usr/bin/env bash
# Trains on a Cloud TPU slice: TPU VMs behind a queued resource.
#
#   launch/tpu_vm.sh create  --name=N --zone=Z --type=v5p-32 --version=v2-alpha-tpuv5 [--spot]
#   launch/tpu_vm.sh install --name=N --zone=Z --bucket=B
#   launch/tpu_vm.sh run     --name=N --zone=Z -- --config=configs/qwen3_4b_long.py --workdir=bucket/runs/one
#   launch/tpu_vm.sh logs    --name=N --zone=Z
#   launch/tpu_vm.sh stop    --name=N --zone=Z
#   launch/tpu_vm.sh resume  (all of the flags above) -- (the arguments of run)
#   launch/tpu_vm.sh delete  --name=N --zone=Z
#
# create waits until the slice is there. install copies this repository to every worker, installs it and mounts the
# bucket B at ~/retention_jax/bucket: all workers need one folder for checkpoints. (Make the bucket with
# --uniform-bucket-level-access --enable-hierarchical-namespace, so that renaming a folder is atomic.) run starts the
# training on all workers and comes back; where a worker dies all end within half a minute, and each starts again, up to
# --max_restarts times, but not after two errors in a row within a minute of the start: a wrong set-up would only fail
# again. stop saves a checkpoint and ends the run. resume waits for a slice that is still in the queue and makes a
# preempted or failed one anew, installs and runs; the run goes on from its newest checkpoint. --project=P goes with
# everything; --dry_run prints the commands only, those of resume for a preempted slice.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
die() { echo "tpu_vm.sh: $*" >&2; exit 2; }

[ $# -gt 0 ] || usage
action=$1; shift
name='' zone='' type='' version='' bucket='' project='' spot='' dry_run='' max_restarts=10
while [ $# -gt 0 ]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --bucket=*) bucket=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --max_restarts=*) max_restarts=${1#*=} ;;
    --spot) spot=1 ;;
    --dry_run) dry_run=1 ;;
    --) shift; break ;;
    *) die "unknown argument $1" ;;
  esac
  shift
done
[ -n "$name" ] && [ -n "$zone" ] || die "--name and --zone are needed"
where=(--zone="$zone" ${project:+--project="$project"})

# Runs a command, or prints it so that a shell would read it back.
do_() {
  if [ -n "$dry_run" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}
tpus() { do_ gcloud compute tpus "$@" "${where[@]}"; }
on_all() { tpus tpu-vm ssh "$name" --worker=all --command="$1"; }

# Nothing where there is no such slice. A list: describe fails alike without the slice and without the network.
state() { tpus queued-resources list --filter="name~/$name\$" --format='value(state.state)'; }

# Waits until the state is one of the arguments, NONE for no slice, and sets $now to it; to the first in a dry run. What
# gcloud could not answer is asked again.
await() {
  if [ -n "$dry_run" ]; then state; now=$1; return; fi
  local wanted
  while :; do
    if now=$(state); then
      now=${now:-NONE}
      for wanted; do [ "$now" != "$wanted" ] || return 0; done
      echo "$name: $now"
    fi
    sleep 30
  done
}

create() {
  [ -n "$type" ] && [ -n "$version" ] || die "create needs --type and --version"
  tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$type" --runtime-version="$version" \
    ${spot:+--spot}
  await ACTIVE FAILED SUSPENDED NONE
  [ "$now" = ACTIVE ] || die "the queued resource $name is $now"
}

delete() { tpus queued-resources delete "$name" --force --quiet; }

# On a worker: a run is a process group, which holds the lock as long as any of it lives. Its leader starts it again.
going_on='! flock --nonblock lock true'

install() {
  [ -n "$bucket" ] || die "install needs --bucket"
  do_ git archive --format=tar.gz --output=/tmp/retention_jax.tar.gz HEAD
  tpus tpu-vm scp /tmp/retention_jax.tar.gz "$name:/tmp/retention_jax.tar.gz" --worker=all
  # gcsfuse forgets after a second what is in the bucket, and at once what is not: workers see each other's files.
  on_all "set -e
    mkdir -p ~/retention_jax/bucket && cd ~/retention_jax
    if $going_on; then echo 'a run is going on: stop it first' >&2; exit 1; fi
    tar -xzf /tmp/retention_jax.tar.gz
    command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    export PATH=\$HOME/.local/bin:\$PATH
    [ -d .venv ] || uv venv --quiet --python=3.12 .venv
    uv pip install --quiet --python=.venv/bin/python --editable '.[tpu]'
    if ! command -v gcsfuse >/dev/null; then
      curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
      echo \"deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-\$(lsb_release -cs) main\" | sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
      sudo apt-get update -q && sudo apt-get install -qy gcsfuse
    fi
    mountpoint -q bucket || gcsfuse --implicit-dirs --metadata-cache-ttl-secs=1 --metadata-cache-negative-ttl-secs=0 $(printf '%q' "$bucket") bucket"
}

run() {
  [ $# -gt 0 ] || die "run needs the training's arguments after --"
  local arguments
  arguments=$(printf '%q ' "$@")
  # A run that a signal stopped ends with 143 and stays ended. The loop runs on without the connection.
  on_all "cd ~/retention_jax || exit
    if $going_on; then echo 'a run is going on'; exit 0; fi
    nohup flock --nonblock lock setsid bash -c 'echo \$\$ >pid
      for attempt in \$(seq 0 $max_restarts); do
        began=\$SECONDS
        .venv/bin/python -m retention_jax.train \"\$@\"; status=\$?
        case \$status in 0 | 143) exit \$status;; esac
        echo \"attempt \$attempt ended with status \$status\"
        if [ \$status -lt 128 ] && [ \$((SECONDS - began)) -lt 60 ]; then soon=\$((\${soon:-0} + 1)); else soon=0; fi
        if [ \$soon = 2 ]; then echo \"failed twice within a minute of the start\"; exit \$status; fi
        sleep 10
      done' train $arguments >>train.log 2>&1 </dev/null &"
}

case $action in
  create) create ;;
  install) install ;;
  run) run "$@" ;;
  logs) tpus tpu-vm ssh "$name" --worker=0 --command='tail -n 100 -F ~/retention_jax/train.log' ;;
  stop) on_all "cd ~/retention_jax && if $going_on; then kill -TERM -- -\$(cat pid); fi" ;;
  resume)
    await SUSPENDED FAILED ACTIVE NONE
    case $now in SUSPENDED | FAILED) delete ;; esac
    [ "$now" = ACTIVE ] || create
    install
    run "$@"
    ;;
  delete) delete ;;
  *) usage ;;
esac
