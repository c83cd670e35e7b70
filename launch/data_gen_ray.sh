#!/usr/bin/env bash
# Training data on a Ray cluster, one actor a GPU.
#
#   CONFIG=configs/data_gen_fast.yaml RAY_ADDRESS=HEAD:6379 launch/data_gen_ray.sh [key=value ...]
#   CONFIG=configs/data_gen_fast.yaml sbatch -N 4 --gpus-per-node=8 launch/data_gen_ray.sh [...]
#   CONFIG=configs/data_gen_fast.yaml launch/data_gen_ray.sh [key=value ...]
#
# The first uses a cluster that is up; the second starts one on the nodes of a Slurm job and ends it;
# the third starts one on this machine. All machines share this folder and the output folder, and
# have the same environment: pip install -e '.[data-gen,data-gen-ray]'.
#SBATCH --job-name=data_gen
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=data_gen-%j.log
set -euo pipefail
: "${CONFIG:?name a configuration: CONFIG=configs/data_gen_fast.yaml $0}"

if [[ -z ${RAY_ADDRESS:-} && ${SLURM_JOB_NUM_NODES:-1} -gt 1 ]]; then
    RAY_ADDRESS="$(hostname):6379"
    # Whoever reaches an open cluster can run programs on it. The token is a file in the home folder,
    # which the nodes share.
    RAY_AUTH_MODE=token
    export RAY_ADDRESS RAY_AUTH_MODE
    ray get-auth-token --generate > /dev/null
    # The job's script runs on its first node.
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 bash -c '
        if [[ $SLURM_NODEID == 0 ]]; then
            exec ray start --block --head --port="${RAY_ADDRESS##*:}"
        fi
        sleep 10
        exec ray start --block --address="$RAY_ADDRESS"' &
    cluster=$!
    trap 'kill "$cluster" 2>/dev/null || true' EXIT
    # Actors are placed once: on the machines that are there by then.
    until [[ $(ray status 2>/dev/null | grep -c "node_[0-9a-f]") -ge $SLURM_JOB_NUM_NODES ]]; do
        kill -0 "$cluster" || { echo "error: Ray did not start on all nodes" >&2; exit 1; }
        sleep 2
    done
fi
python -m data_gen.run --config "$CONFIG" --engine ray "$@"
