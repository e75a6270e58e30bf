# shellcheck shell=bash
# What run_pa.sh and cut_model_and_run.sh share. Sourced, never run. A launcher
#   1. resolves its paths                           require_dir
#   2. reads and checks the caller's environment    read_launch_settings PORT
#   3. sources scripts/env.sh
#   4. hands over to main.py                        exec_main ARGUMENT…
# Whatever the user exported wins. Exit status: 1 something is missing, 2 wrong usage, else main.py's.

LAUNCH_ROOT=$(realpath -- "$(dirname -- "${BASH_SOURCE[0]}")/..")

# shellcheck source=scripts/lock.sh disable=SC1091
source "$LAUNCH_ROOT/scripts/lock.sh"

# die STATUS MESSAGE
die() {
  printf '%s: %s\n' "${0##*/}" "$2" >&2
  exit "$1"
}

# require_dir PATH WHAT REMEDY: prints the absolute path of a folder, or ends the launcher. Use it
# as dir=$(require_dir …) on a line of its own, so that set -e sees the failure.
require_dir() {
  [[ -d $1 ]] || die 1 "$2 '$1' is not a folder that exists (seen from $PWD); $3"
  realpath -- "$1"
}

# Prints how many devices ASCEND_RT_VISIBLE_DEVICES lists.
count_devices() {
  local list=$ASCEND_RT_VISIBLE_DEVICES devices=()
  [[ $list =~ ^(0|[1-9][0-9]*)(,(0|[1-9][0-9]*))*$ ]] ||
    die 2 "ASCEND_RT_VISIBLE_DEVICES='$list' is not a list of device numbers; write it like 0,1"
  IFS=, read -ra devices <<<"$list"
  [[ -z $(printf '%s\n' "${devices[@]}" | sort | uniq -d) ]] ||
    die 2 "ASCEND_RT_VISIBLE_DEVICES='$list' names a device twice; name each one once"
  printf '%s\n' "${#devices[@]}"
}

# Sets NUM_PROCESSES, the ranks on this host: TP_WORLD_SIZE, else one per device listed, else 1.
read_world_size() {
  local num_devices=""
  if [[ -n ${ASCEND_RT_VISIBLE_DEVICES+set} ]]; then
    num_devices=$(count_devices)
  fi
  NUM_PROCESSES=${TP_WORLD_SIZE-${num_devices:-1}}
  [[ $NUM_PROCESSES =~ ^[1-9][0-9]{0,3}$ ]] ||
    die 2 "TP_WORLD_SIZE='$NUM_PROCESSES' is not a whole number from 1 on; unset it or set 1, 2, 4 or 8"
  if ((NUM_PROCESSES > 1)) && [[ -n $num_devices && $num_devices != "$NUM_PROCESSES" ]]; then
    die 2 "TP_WORLD_SIZE=$NUM_PROCESSES, but ASCEND_RT_VISIBLE_DEVICES=$ASCEND_RT_VISIBLE_DEVICES \
lists $num_devices; unset TP_WORLD_SIZE, or make the two agree"
  fi
}

# Sets NODE_ARGUMENTS, torchrun's share of a run over several hosts; empty on one host.
read_nodes() {
  NODE_ARGUMENTS=()
  [[ ${NNODES-1} =~ ^[1-9][0-9]{0,3}$ ]] || die 2 "NNODES='$NNODES' is not a whole number from 1 on"
  ((${NNODES-1} > 1)) || return 0
  [[ -n ${MASTER_ADDR:-} ]] || die 2 "NNODES=$NNODES needs MASTER_ADDR, the address of host 0"
  if [[ ! ${NODE_RANK:-} =~ ^(0|[1-9][0-9]{0,3})$ ]] || ((NODE_RANK >= NNODES)); then
    die 2 "NNODES=$NNODES needs NODE_RANK, this host's number from 0 to $((NNODES - 1)), \
got '${NODE_RANK:-}'"
  fi
  NODE_ARGUMENTS=(--nnodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR")
}

# take_port NUMBER: true when nobody listens there and no other launcher has taken it. The lock is
# held, through exec, until the job ends: two jobs started at once get two ports.
take_port() {
  local locks="${TMPDIR:-/tmp}/gptneox-ascend-$UID" lock_fd
  if (: <"/dev/tcp/127.0.0.1/$1") 2>/dev/null; then
    return 1
  fi
  # Without a lock folder of our own (or without locks) the look at the port has to do.
  mkdir -m 700 -- "$locks" 2>/dev/null || [[ -d $locks && -O $locks && ! -L $locks ]] || return 0
  { exec {lock_fd}>>"$locks/port-$1"; } 2>/dev/null || return 0
  lock_fd "$lock_fd" "$locks" && return 0
  exec {lock_fd}>&-
  return 1
}

# set_port DEFAULT: exports MASTER_PORT. The user's stays; several hosts have to agree, so they get
# the default; else it is the first free one from there to 20050.
set_port() {
  local port=$1
  if [[ -n ${MASTER_PORT+set} ]]; then
    if [[ ! $MASTER_PORT =~ ^[1-9][0-9]{0,4}$ ]] || ((MASTER_PORT > 65535)); then
      die 2 "MASTER_PORT='$MASTER_PORT' is not a port number from 1 to 65535"
    fi
    port=$MASTER_PORT
  elif ((NUM_PROCESSES > 1 && ${#NODE_ARGUMENTS[@]} == 0)); then
    until take_port "$port"; do
      ((++port <= 20050)) || die 1 "no free port from $1 to 20050; set MASTER_PORT to one"
    done
  fi
  export MASTER_PORT=$port
}

# busy_port FIRST: prints the first of 16 ports from there on that somebody listens on, if any. The
# kernel's table knows every address; HCCL listens on that of a network card, not on 127.0.0.1.
busy_port() {
  local table local_address state port
  for table in /proc/net/tcp /proc/net/tcp6; do
    [[ -r $table ]] || continue
    while read -r _ local_address _ state _; do
      [[ $state == 0A ]] || continue
      port=$((16#${local_address##*:}))
      if ((port >= $1 && port < $1 + 16)); then
        printf '%s\n' "$port"
        return 0
      fi
    done <"$table"
  done
}

# set_hccl_ports: on NPUs several ranks meet on 16 host ports from HCCL_IF_BASE_PORT (60000) on. The
# user's are checked; else the next free 16 are taken, unless several hosts have to agree on them.
# HCCL_HOST_SOCKET_PORT_RANGE goes before HCCL_IF_BASE_PORT and lets HCCL choose by itself.
set_hccl_ports() {
  local base=${HCCL_IF_BASE_PORT:-60000} busy free
  ((NUM_PROCESSES > 1 || ${#NODE_ARGUMENTS[@]} > 0)) || return 0
  [[ -n ${ASCEND_RT_VISIBLE_DEVICES:-} ]] || command -v npu-smi >/dev/null || return 0
  [[ -z ${HCCL_HOST_SOCKET_PORT_RANGE:-} ]] || return 0
  if [[ ! $base =~ ^[1-9][0-9]{3,4}$ ]] || ((base < 1024 || base > 65520)); then
    die 2 "HCCL_IF_BASE_PORT='$base' is not a port number from 1024 to 65520"
  fi
  free=$base busy=$(busy_port "$base")
  if [[ -z $busy && -n ${HCCL_IF_BASE_PORT:-} ]]; then
    return 0
  fi
  while [[ -n $(busy_port "$free") ]] || ! take_port "$free"; do
    ((free += 16, free <= 65520)) ||
      die 1 "no 16 free ports for HCCL from $base on; set HCCL_IF_BASE_PORT to the first of 16"
  done
  ((free != base)) || return 0
  if [[ -n ${HCCL_IF_BASE_PORT:-} || ${#NODE_ARGUMENTS[@]} -gt 0 ]]; then
    die 1 "port ${busy:-$base}, one of HCCL's 16 from $base on, is taken; type: export HCCL_IF_BASE_PORT=$free"
  fi
  export HCCL_IF_BASE_PORT=$free
}

# INF_NAN_MODE_ENABLE=0 (fp16 overflow saturates) belongs to the 310P; on Atlas A2 a current
# torch_npu refuses it, so elsewhere the device's own default stays.
set_overflow_mode() {
  [[ -z ${INF_NAN_MODE_ENABLE+set} ]] && command -v npu-smi >/dev/null || return 0
  if [[ $(npu-smi info 2>/dev/null || true) == *310P* ]]; then
    export INF_NAN_MODE_ENABLE=0
  fi
}

# drop_foreign_ranks: unsets what a cluster's operator, an earlier run or another launcher says of
# ranks and hosts (torchrun takes options from PET_…). The ranks are those that this launcher starts.
drop_foreign_ranks() {
  local name found=""
  for name in RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE PET_NNODES PET_NODE_RANK \
    PET_NPROC_PER_NODE PET_MASTER_ADDR PET_MASTER_PORT PET_LOCAL_ADDR PET_STANDALONE \
    "${!PET_RDZV_@}" PET_MODULE PET_NO_PYTHON PET_RUN_PATH PET_VIRTUAL_LOCAL_RANK; do
    [[ -z ${!name:-} ]] || found+=" $name=${!name}"
    unset "$name"
  done
  [[ -z $found ]] || printf '%s: not used:%s; %s\n' "${0##*/}" "$found" \
    "here TP_WORLD_SIZE or the devices listed, NNODES, NODE_RANK and MASTER_ADDR count" >&2
}

# read_launch_settings PORT: everything that can be wrong is found here, before the environment is
# set up or a process starts.
read_launch_settings() {
  read_world_size
  read_nodes
  set_port "$1"
  set_hccl_ports
  set_overflow_mode
  drop_foreign_ranks
}

# preload_libgomp: on aarch64 a libgomp that is loaded late finds no room in static TLS ("cannot
# allocate memory in static TLS block"), so torch's own is loaded first.
preload_libgomp() {
  local library
  [[ $(uname -m) == aarch64 && ${LD_PRELOAD:-} != *libgomp* ]] || return 0
  library=$("$PYTHON" -c '
import glob, importlib.util, os
root = os.path.dirname(importlib.util.find_spec("torch").origin)
found = glob.glob(root + ".libs/libgomp*") + glob.glob(root + "/lib/libgomp*")
print(sorted(found)[0] if found else "")' 2>/dev/null) || return 0
  [[ -n $library ]] || library=$(ldconfig -p 2>/dev/null | sed -n 's/.*libgomp\.so\.1 .*=> //p' | head -n 1)
  [[ -z $library ]] || export LD_PRELOAD="$library${LD_PRELOAD:+:$LD_PRELOAD}"
}

# Sets OMP_NUM_THREADS, where it is unset and several ranks share the cores: torchrun alone would
# set 1.
set_threads() {
  ((NUM_PROCESSES > 1)) && [[ -z ${OMP_NUM_THREADS:-} ]] || return 0
  OMP_NUM_THREADS=$("$PYTHON" -c '
import sys
sys.path.insert(0, sys.argv[1])
from gptneox.devices.binding import threads_per_rank
print(threads_per_rank(int(sys.argv[2])))' "$LAUNCH_ROOT" "$NUM_PROCESSES")
  export OMP_NUM_THREADS
}

# exec_main ARGUMENT…: becomes main.py, under torchrun when there is more than one rank. The current
# folder stays the caller's, so that relative paths among the options mean what they say.
exec_main() {
  preload_libgomp
  set_threads
  if ((NUM_PROCESSES == 1 && ${#NODE_ARGUMENTS[@]} == 0)); then
    exec "$PYTHON" "$LAUNCH_ROOT/main.py" "$@"
  fi
  exec "${TORCHRUN_COMMAND[@]}" --nproc_per_node "$NUM_PROCESSES" "${NODE_ARGUMENTS[@]}" \
    --master_port "$MASTER_PORT" "$LAUNCH_ROOT/main.py" "$@"
}

# set_npu_switches: what the flash path wants of CANN and ATB. Nothing here matters off an NPU.
#   Atlas 300I DUO (310P): tiling copies on a stream of their own; no lccl
#   Atlas 800I A2 (910B):  tiling copies stay where they are
#   in a container:        operators are launched synchronously, which is safe there
set_npu_switches() {
  local chips="" queue=1
  if command -v npu-smi >/dev/null; then
    chips=$(npu-smi info 2>/dev/null || true)
  fi
  [[ ! -e /.dockerenv && ! -e /run/.containerenv ]] || queue=0
  export PYTORCH_NPU_ALLOC_CONF="${PYTORCH_NPU_ALLOC_CONF-max_split_size_mb:2048}"
  export ATB_LAUNCH_KERNEL_WITH_TILING="${ATB_LAUNCH_KERNEL_WITH_TILING-1}"
  export ATB_LAYER_INTERNAL_TENSOR_REUSE="${ATB_LAYER_INTERNAL_TENSOR_REUSE-1}"
  export ATB_OPERATION_EXECUTE_ASYNC="${ATB_OPERATION_EXECUTE_ASYNC-$queue}"
  export TASK_QUEUE_ENABLE="${TASK_QUEUE_ENABLE-$queue}"
  export HCCL_OP_BASE_FFTS_MODE_ENABLE="${HCCL_OP_BASE_FFTS_MODE_ENABLE-1}"
  export HCCL_BUFFSIZE="${HCCL_BUFFSIZE-110}"
  if [[ $chips == *310P* ]]; then
    export ATB_USE_TILING_COPY_STREAM="${ATB_USE_TILING_COPY_STREAM-1}"
    [[ ${BACKEND:-} != lccl ]] || die 2 "BACKEND=lccl does not work on 300I DUO; unset BACKEND"
  else
    export ATB_USE_TILING_COPY_STREAM="${ATB_USE_TILING_COPY_STREAM-0}"
  fi
}
