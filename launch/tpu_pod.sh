#!/usr/bin/env bash
# Pretrains on a Cloud TPU slice of spot capacity, and goes on after preemptions.
#
#   export POD_ZONE=us-west4-a POD_TYPE=v5litepod-16 POD_DATA=gs://BUCKET/luperson
#   launch/tpu_pod.sh create
#   launch/tpu_pod.sh setup
#   launch/tpu_pod.sh run --config=configs/vitb.py --workdir=gs://BUCKET/runs/vitb
#
# create          request the slice (a queued resource) and wait until it is there
# setup           on all hosts: this commit of the repository, its packages, the data
# run WORDS...    train with these flags of pretrain.py until it is finished; a
#                 preempted slice is deleted, created and set up again
# logs [HOST]     follow the log of one host, 0 by default; Ctrl-C ends only that
# status          the states of the queued resource and of its node
# delete          end the training and give the slice back
# --dry-run       before any of these: show every command, execute none
#
# Settings, in the environment:
#   POD_ZONE, POD_TYPE   zone and accelerator type
#   POD_NAME             of queued resource and node; personmae
#   POD_DATA             gs:// folder of a tfds data set, copied to every host's disk
#   POD_RUNTIME          TPU software; by default the one for POD_TYPE
#   POD_CREATE_FLAGS     more words for `queued-resources create`; --spot
#   POD_POLL             seconds between two looks at a state; 20
#
# `run` only watches: Ctrl-C or a closed lid leaves the slice training, and the same
# command watches on. It starts again on exit code 75 and on preemption only; 0 ends it,
# anything else stops it and says so.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
worker=personmae/code/launch/tpu_worker.sh
name=${POD_NAME:-personmae}
poll=${POD_POLL:-20}
dry_run=""
is_new=""  # the slice has yet to be set up

fail() {
  echo "error: $1" >&2
  exit "${2:-1}"
}

say() { echo "[$(date +%T)] $name: $1" >&2; }

# Prints words as a shell reads them.
quoted() {
  local word words="" quote="'\\''"
  for word; do
    case $word in
      *[!A-Za-z0-9_./:=@%,+-]* | "") word="'${word//\'/$quote}'" ;;
    esac
    words+=" $word"
  done
  echo "${words:1}"
}

# Shows a command and executes it, or with --dry-run only shows it.
do_it() {
  echo "+ $(quoted "$@")"
  [[ -n $dry_run ]] || "$@"
}

tpus() {
  do_it gcloud compute tpus "$@" "--zone=$POD_ZONE" --quiet
}

# ssh_to HOST WORDS...: on one host or all. The flags end the connection to a host that
# has vanished, which would otherwise wait for ever.
ssh_to() {
  tpus tpu-vm ssh "$name" --worker="$1" --command="$(quoted "${@:2}")" \
    --ssh-flag="-o ServerAliveInterval=30 -o ConnectTimeout=20"
}

# ask KIND FIELD: prints the field of our queued resource or node; nothing if there is
# none, which `describe` could not tell from a failure.
ask() {
  local command=(gcloud compute tpus "$1" list "--zone=$POD_ZONE"
    "--filter=name~/$name\$" "--format=value($2)")
  if [[ -n $dry_run ]]; then
    do_it "${command[@]}"
    return
  fi
  for _ in 1 2 3 4 5; do
    "${command[@]}" && return
    sleep "$poll"
  done
  fail "gcloud cannot tell the state of $name; it says why above"
}

# Prints READY, WAITING, PREEMPTED, FAILED or MISSING.
state() {
  local queued node
  queued=$(ask queued-resources state.state) || exit
  case $queued in
    ACTIVE)
      node=$(ask tpu-vm state) || exit
      case $node in
        READY) echo READY ;;
        PREEMPTED | TERMINATED | "") echo PREEMPTED ;;
        *) echo WAITING ;;
      esac
      ;;
    SUSPENDED) echo PREEMPTED ;;
    FAILED) echo FAILED ;;
    "") echo MISSING ;;
    *) echo WAITING ;;
  esac
}

status() {
  echo "queued resource:" && ask queued-resources state.state
  echo "node:" && ask tpu-vm state
}

request() {
  local flags
  read -r -a flags <<<"${POD_CREATE_FLAGS---spot}"
  tpus queued-resources create "$name" --node-id="$name" \
    --accelerator-type="$POD_TYPE" --runtime-version="$(runtime)" \
    ${flags[@]+"${flags[@]}"} ||
    fail "the slice cannot be requested; gcloud says why above"
}

runtime() {
  case $POD_TYPE in
    v6e-*) echo "${POD_RUNTIME:-v2-alpha-tpuv6e}" ;;
    v5p-*) echo "${POD_RUNTIME:-v2-alpha-tpuv5}" ;;
    v5litepod-*) echo "${POD_RUNTIME:-v2-alpha-tpuv5-lite}" ;;
    *) echo "${POD_RUNTIME:-tpu-ubuntu2204-base}" ;;
  esac
}

delete() {
  tpus queued-resources delete "$name" --force ||
    fail "$name cannot be deleted, and may go on costing; gcloud says why above"
}

# A slice that is preempted, before or meanwhile, is deleted and requested again.
wait_until_ready() {
  local now="" before
  if [[ -n $dry_run ]]; then
    status
    return
  fi
  while [[ $now != READY ]]; do
    before=$now
    now=$(state) || exit
    [[ $now == "$before" ]] || say "$now"
    case $now in
      WAITING) sleep "$poll" ;;
      PREEMPTED)
        delete
        request
        is_new=yes
        ;;
      FAILED) fail "the request has failed; see: gcloud compute tpus queued-resources \
describe $name --zone=$POD_ZONE; then: $0 delete" ;;
      MISSING) fail "there is no slice $name; make it: $0 create" ;;
    esac
  done
}

create() {
  local now=MISSING
  [[ -n $dry_run ]] || now=$(state) || exit
  if [[ $now == MISSING ]]; then request; fi
  wait_until_ready
  say "ready; it costs until: $0 delete"
}

setup() {
  local archive=ARCHIVE code=personmae/code
  [[ -n $dry_run ]] || archive=$(mktemp)
  # The commit that this command began with, whatever is checked out meanwhile.
  do_it git -C "$repository" archive --format=tar.gz --output="$archive" "$commit" &&
    tpus tpu-vm scp "$archive" "$name:personmae.tar.gz" --worker=all &&
    ssh_to all bash -c \
      "rm -rf $code && mkdir -p $code && tar -xzf personmae.tar.gz -C $code" &&
    ssh_to all "$worker" setup ${POD_DATA:+"$POD_DATA"} || return
  rm -f "$archive"
  is_new=""
}

# Whether the slice is being taken away; that may show only after a minute or two.
is_preempted() {
  local now
  for _ in 1 2 3 4 5 6; do
    now=$(state) || exit
    [[ $now == READY ]] || return 0
    sleep "$poll"
  done
  return 1
}

train() {
  if [[ -n $is_new ]]; then setup || return; fi
  ssh_to all "$worker" run "$@"
}

run() {
  local id="" left lost=0
  if [[ -n $dry_run ]]; then
    wait_until_ready
    train ID "$@"
    echo "# after a preemption, and then from the start"
    delete
    request
    setup
    return
  fi
  trap 'say "the slice trains on; watch it again: the same command"; exit 130' INT
  while :; do
    wait_until_ready
    left=0
    : "${id:=$(date +%s)-$RANDOM}"
    train "$id" "$@" || left=$?
    case $left in
      0) break ;;
      75) say "interrupted and saved; starting again" ;;
      127) fail "the hosts are not set up: $0 setup" ;;
      *)
        if is_preempted; then
          say "preempted; going on when there is a slice again"
        elif [[ $left == 3 ]]; then
          fail "pretrain.py failed, as said above; the slice costs until: $0 delete"
        else  # of ssh or gcloud: the training may well go on
          lost=$((lost + 1))
          [[ $lost -lt 5 ]] || fail "the hosts cannot be reached; see: $0 status"
          say "lost the connection; trying again"
          continue
        fi
        ;;
    esac
    id="" lost=0
  done
  say "finished; the slice costs until: $0 delete"
}

if [[ ${1:-} == --dry-run ]]; then
  dry_run=yes
  shift
fi
verb=${1:-}
case $verb in
  --help | -h | help)
    sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
  create | setup | run | logs | status | delete) shift ;;
  *) fail "'$verb' is none of create, setup, run, logs, status, delete; see $0 --help" 2 ;;
esac
[[ -n ${POD_ZONE:-} ]] || fail "no zone: export POD_ZONE=us-west4-a, for instance" 2
[[ -n ${POD_TYPE:-} ]] || fail "no slice: export POD_TYPE=v5litepod-16, for instance" 2
commit=$(git -C "$repository" rev-parse HEAD) ||
  fail "$repository is no git repository, but setup sends a commit; clone it" 2

case $verb in
  run)
    [[ " $*" == *" --workdir=gs://"* ]] ||
      fail "run needs --workdir=gs://BUCKET/FOLDER: a preempted slice keeps nothing" 2
    run "$@"
    ;;
  logs) ssh_to "${1:-0}" tail -n 100 -F personmae/train.log ;;
  *) "$verb" ;;
esac
