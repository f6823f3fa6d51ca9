# What the job files share: where the machines meet, and what happens when the time is up.
#
# In: SLURM's variables, and `train CONFIGURATION [accelerate's options] -- SCRIPT [its arguments]`.
# Out: a training on all machines of the job. USR1, which `#SBATCH --signal` sends before the end,
# makes it save; the job is then put back into the queue and goes on where it stopped.
# shellcheck shell=bash
set -euo pipefail
export PATH="$PWD/.venv/bin:$PATH"

machines=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${machines%%$'\n'*} # the first
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # two jobs on one machine must not meet
# Seconds in which processes may save before their launcher kills them; less than --signal leaves.
: "${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:=150}"
export MASTER_ADDR MASTER_PORT TORCH_ELASTIC_SHUTDOWN_TIMEOUT

stopping=
step=

stop() {
    stopping=1
    # srun hands USR1 on to its tasks. SIGTERM would make it kill them.
    [[ -z $step ]] || kill -USR1 "$step" || true
}
trap stop USR1

train() {
    local status
    srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
        --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
        recipes/slurm/on_node.sh "$@" &
    step=$!
    while :; do # a signal ends `wait` as well
        wait "$step" && status=0 || status=$?
        kill -0 "$step" 2>/dev/null || break
    done
    if [[ -n $stopping ]]; then
        echo "Job $SLURM_JOB_ID goes back into the queue."
        exec scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$status"
}
