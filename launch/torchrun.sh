#!/usr/bin/env bash
# Trains on all devices of this machine, or of several machines, through torchrun:
#
#   launch/torchrun.sh experiment=cpt_7b parallel.tp=2
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node-a MAX_RESTARTS=3 launch/torchrun.sh experiment=cpt_7b
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=node-a MAX_RESTARTS=3 launch/torchrun.sh experiment=cpt_7b
#
# Every argument goes to launch.train as it is, after a check of them all. Variables (default):
#
#   NPROC_PER_NODE  processes on this machine (one a device; 1 on a machine without)
#   MAX_RESTARTS    how often a dead rank restarts all, from the newest checkpoint (0)
#   LOG_DIR         LOG_DIR/*/attempt_A/R/stderr.log of local rank R (RUN_DIR/logs)
#   PYTHON          interpreter (python)
#   NNODES          machines, each with this script and one run folder on a disk they share (1)
#
# and for several machines:
#
#   NODE_RANK       0 on the machine where all meet; 1, 2, ... on the others
#   MASTER_ADDR     name or address of the machine with NODE_RANK 0
#   MASTER_PORT     a free port there (29500)
#   LOCAL_ADDR      this machine's address for the others (its host name)
#   JOB_ID          a name, equal on all; keeps jobs with one meeting point apart (synfire)
#   JOIN_SECONDS    how long to wait for the others, at the start and at a restart (600)
#
# What `python -m launch.doctor` proposes (threads, allocator) is set where it is unset.
#
# SIGTERM, SIGUSR1, SIGINT (Ctrl-C) or SIGHUP to one script ask the ranks of all to stop: they end
# their step, save and write stopped.json. SIGQUIT (Ctrl-\) ends this machine's ranks unsaved.
# Exit status: 0 all steps done, or stopped and saved; 1 failed, or torchrun itself got SIGTERM (its
# ranks save); 2 the command line is wrong; above 128 ended by a signal, among others when asked to
# stop before there was a rank.
set -uo pipefail
# torchrun gets a process group of its own, so that Ctrl-C reaches this script alone.
set -m

fail() {
  echo "error: $1" >&2
  exit 2
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
  exit 0
fi
for argument; do
  [[ $argument != -* ]] ||
    fail "argument ($argument) must be key=value. Give flags to python -m launch.train."
done

python=${PYTHON:-python}
nodes=${NNODES:-1}
[[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "NNODES ($nodes) must be a number of machines, 1 or more."
meeting=(--standalone)
if ((nodes > 1)); then
  rank=${NODE_RANK:-}
  [[ $rank =~ ^(0|[1-9][0-9]*)$ && $rank -lt $nodes ]] ||
    fail "NODE_RANK ($rank) must be from 0 to NNODES - 1: got NNODES $nodes. Set it on each machine."
  [[ -n ${MASTER_ADDR:-} ]] ||
    fail "MASTER_ADDR () must name the machine with NODE_RANK 0: got NNODES $nodes. Set it."
  patience=${JOIN_SECONDS:-600}
  is_host=false
  ((rank > 0)) || is_host=true
  meeting=(
    --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}"
    --rdzv-id "${JOB_ID:-synfire}"
    --rdzv-conf "is_host=$is_host,join_timeout=$patience,read_timeout=$patience"
    ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"}
  )
fi

settings=$("$python" -m launch.environment "$@") || exit
eval "$settings"

# Ranks are asked directly: torchrun would give them a limited time, and leave with 1. One that
# still starts ignores SIGUSR1, so they are asked again until all have left.
ask_ranks() {
  local asked='' ranks
  while :; do
    mapfile -t ranks < <(grep -ls "^PPid:[[:space:]]*$job\$" /proc/[0-9]*/status | tr -dc '0-9\n')
    if ((${#ranks[@]})); then
      kill -USR1 "${ranks[@]}" 2> /dev/null
      asked=yes
    elif [[ $asked == nobody ]]; then
      kill "$job" # it still waits for other machines
    else
      asked=${asked:-nobody}
    fi
    sleep 3
  done
}

stop() {
  trap : TERM USR1 INT HUP
  echo "asked to stop: the ranks save after their step" >&2
  ask_ranks &
  asker=$!
  disown "$asker"
}

asker=''
is_asked=''
trap 'is_asked=yes' TERM USR1 INT HUP
(
  trap '' USR1 # torchrun would die of it
  exec "$python" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$NPROC_PER_NODE" \
    "${meeting[@]}" --max-restarts "${MAX_RESTARTS:-0}" \
    --log-dir "$LOG_DIR" --redirects 3 --tee 0:3 -m launch.train "$@"
) < /dev/null &
job=$!
trap stop TERM USR1 INT HUP
trap 'kill -QUIT "$job"' QUIT
echo "logs of all ranks: $LOG_DIR" >&2
[[ -z $is_asked ]] || stop

# A trapped signal interrupts wait.
while kill -0 "$job" 2> /dev/null; do wait "$job"; done
wait "$job"
status=$?
[[ -z $asker ]] || kill -- "-$asker" 2> /dev/null
exit "$status"
