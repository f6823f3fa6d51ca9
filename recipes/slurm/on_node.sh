#!/usr/bin/env bash
# Start accelerate on one machine of a job, once per machine, and hand signals on to it.
#
# In: CONFIGURATION [accelerate's options] -- SCRIPT [its arguments], and the variables of SLURM and
# of job.sh. Out: the launcher's exit status; 0 when it was stopped by a signal.
set -euo pipefail

configuration=$1
shift
options=()
while [[ $1 != -- ]]; do
    options+=("$1")
    shift
done
shift

command=(accelerate launch --config_file "recipes/accelerate/$configuration.yaml"
    --num_machines "$SLURM_JOB_NUM_NODES" --machine_rank "$SLURM_NODEID"
    --num_processes "$((SLURM_JOB_NUM_NODES * SLURM_GPUS_ON_NODE))"
    --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" "${options[@]}" "$@")
if [[ -n ${DRY_RUN:-} ]]; then
    echo "${command[*]}"
    exit
fi

stopping=
launcher=
# shellcheck disable=SC2329 # these two are called by traps
on_usr1() {
    stopping=1
    [[ -z $launcher ]] || kill -TERM "$launcher" || true
}
# shellcheck disable=SC2329
on_term() {
    stopping=1 # SLURM sends SIGTERM to all processes of a step: the launcher has got it too
}
trap on_usr1 USR1
trap on_term TERM

# SLURM may send USR1 to all processes of a step as well. The launcher would die of it and leave its
# processes behind; that it ignores the signal does not keep those from listening to it.
(
    trap '' USR1
    exec "${command[@]}"
) &
launcher=$!
while :; do # a signal ends `wait` as well
    wait "$launcher" && status=0 || status=$?
    kill -0 "$launcher" 2>/dev/null || break
done
[[ -z $stopping ]] || status=0 # the launcher's own says that it was stopped
exit "$status"
