#!/usr/bin/env bash
# Training on a Cloud TPU slice: starts the same program on all of its hosts, which find each other.
#
#   TPU=NAME ZONE=us-east5-a CONFIG=configs/paper.yaml launch/train_tpu.sh [key=value ...]
#
# On every host, this project lies in ~/bootpig_jax with its environment in .venv
# (pip install -e '.[tpu]'), and the paths of the configuration lead to a shared disk.
# Ending this command does not end the training; run it again with --stop to save and stop.
set -euo pipefail
: "${TPU:?name the TPU: TPU=NAME ZONE=... CONFIG=... $0}" "${ZONE:?name its zone}"

on_all_hosts() {
    exec gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "$1"
}

if [[ ${1:-} == --stop ]]; then
    on_all_hosts "pkill -TERM -f 'python -m bootpig_jax.train'"
fi
: "${CONFIG:?name a configuration: CONFIG=configs/paper.yaml $0}"
arguments=$(printf ' %q' --config "$CONFIG" "$@")
on_all_hosts "cd ~/bootpig_jax && JAX_COMPILATION_CACHE_DIR=~/.cache/bootpig_jax \
exec .venv/bin/python -m bootpig_jax.train$arguments"
