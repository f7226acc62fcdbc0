#!/usr/bin/env bash
# What tpu_pod.sh has every host of a slice do. The repository's copy there is
# ~/personmae/code; packages, data, log and exit code of the run lie beside it.
#
#   tpu_worker.sh setup [gs://DATA]   install the pinned packages, copy the data
#   tpu_worker.sh run ID WORDS...     train, or wait for a training that goes on
#
# A training outlives the connection that started it. `run` leaves with 0 or 75 as
# pretrain.py did and with 3 where that failed, after the end of its log; so it cannot
# be taken for a failure of ssh (255) or gcloud (1). The same ID starts once only,
# because gcloud repeats a command whose connection broke.
set -euo pipefail

home=~/personmae
code=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

setup() {
  local data=${1:-}
  # The images bring Python 3.10; uv gets the one that the pins are for.
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --allow-existing --python 3.11 "$home/venv"
  python3 -m uv pip install --quiet --python "$home/venv/bin/python" \
    -r "$code/requirements-tpu.txt" -r "$code/requirements-gcs.txt" \
    -c "$code/constraints-py311.txt"
  if [[ -n $data ]]; then
    mkdir -p "$home/data"
    gcloud storage rsync --recursive "$data" "$home/data"  # only what is not there
  fi
}

run() {
  local id=$1 left=137  # as if killed, where nobody could write it down
  # Whoever holds descriptor 9 holds the lock: this shell for a moment, then the
  # training, to its end.
  exec 9>>"$home/lock"
  if flock --nonblock 9 && [[ $(cat "$home/id" 2>/dev/null) != "$id" ]]; then
    rm -f "$home/exit"
    echo "$id" >"$home/id"
    setsid "${BASH_SOURCE[0]}" train "${@:2}" </dev/null >>"$home/train.log" 2>&1 &
  fi
  exec 9>&-
  flock "$home/lock" true  # waits for the end
  if [[ -f $home/exit ]]; then left=$(<"$home/exit"); fi
  if [[ $left == 0 || $left == 75 ]]; then exit "$left"; fi
  tail -n 20 "$home/train.log" >&2
  echo "error: pretrain.py left with exit code $left on $(hostname)" >&2
  exit 3
}

train() {
  local left=0
  cd "$code"
  if [[ -d $home/data ]]; then set -- "--config.data.path=$home/data" "$@"; fi
  "$home/venv/bin/python" launch/pretrain.py "$@" 9>&- || left=$?
  echo "$left" >"$home/exit"
}

"$@"
