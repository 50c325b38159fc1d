#!/usr/bin/env bash
# Evaluate under Slurm: tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [arguments of test.py]
#
# GPUS (8) in all, GPUS_PER_NODE (8) and CPUS_PER_TASK (5) come from the environment, and SRUN_ARGS
# adds arguments of srun. PYTHON names another interpreter.
set -euo pipefail

if [ $# -lt 4 ]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG CHECKPOINT [arguments of tools/test.py]" >&2
    exit 2
fi
partition=$1
job_name=$2
config=$3
checkpoint=$4
shift 4
gpus=${GPUS:-8}
gpus_per_node=${GPUS_PER_NODE:-8}
# A job smaller than a node asks for no more than it has tasks.
per_node=$((gpus < gpus_per_node ? gpus : gpus_per_node))

# SRUN_ARGS is split on purpose: it holds several arguments.
# shellcheck disable=SC2086
exec srun --partition "$partition" --job-name "$job_name" \
    --ntasks "$gpus" --ntasks-per-node "$per_node" --gres "gpu:$per_node" \
    --cpus-per-task "${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    "${PYTHON:-python3}" -u "$(dirname "$0")/test.py" \
    "$config" "$checkpoint" --launcher slurm "$@"
