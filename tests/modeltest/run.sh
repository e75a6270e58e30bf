#!/usr/bin/env bash
# Speed and accuracy of a checkpoint, by position. Everything is explained in README.md beside this.
#
# Usage, from any folder:
#   bash run.sh TYPE MODE … MODEL_NAME WEIGHT_DIR CHIP_NUM
#   bash run.sh pa_fp16 full_BoolQ 1 gptneox_20b WEIGHT_DIR 8
#   bash run.sh pa_fp16 performance [[256,256],[512,512]] 1,4 gptneox_20b WEIGHT_DIR 8
#
# CHIP_NUM is the number of ranks, one on each chip; on a CPU the number of processes. Over several
# hosts its place is taken by RANK_TABLE WORLD_SIZE NODE_NUM RANK_ID_START MASTER_ADDR.
#
# Environment besides, whatever is exported wins: see run_pa.sh, set_npu_switches and
#   MODELTEST_DATA_DIR, MODELTEST_OUTPUT_DIR   instead of data/ and outputs/ beside this file
#   MODELTEST_LOG_TO_FILE=1                    also log into outputs/logs
# Exit status: 0 every case ran; 1 one failed, the others ran; 2 wrong usage, or not served.
# A POSIX shell has to be able to read these four lines, and an old bash too.
case ${BASH_VERSION:-none} in
  none | [123].* | 4.[0-3].*) echo "$0 needs bash, 4.4 or later; type: bash $0" >&2 && exit 2 ;;
esac
set -euo pipefail +o posix

repo=$(realpath -- "$(dirname -- "${BASH_SOURCE[0]}")/../..")
# shellcheck source=scripts/launch.sh disable=SC1091
source "$repo/scripts/launch.sh"

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
  sed -n '2,/^# Exit/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit $(($# ? 0 : 2))
fi

# shellcheck source=scripts/env.sh disable=SC1091
source "$repo/scripts/env.sh" runtime

# The grammar is read by Python; what is wrong is said there, in one line.
plan=$(PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}" \
  "$PYTHON" -m gptneox.evaluation.modeltest_plan "$@")
mapfile -t plan <<<"$plan"
num_ranks=${plan[2]}
if ((plan[3] > 1)); then
  export NNODES=${plan[3]} NODE_RANK=${plan[4]} MASTER_ADDR=${plan[5]} RANK_TABLE_FILE=${plan[6]}
  export MASTER_PORT="${MASTER_PORT-12345}"
fi
if [[ -z ${ASCEND_RT_VISIBLE_DEVICES+set} ]] && command -v npu-smi >/dev/null; then
  ASCEND_RT_VISIBLE_DEVICES=$(seq -s , 0 $((num_ranks - 1)))
  export ASCEND_RT_VISIBLE_DEVICES
fi
export TP_WORLD_SIZE=$num_ranks
if [[ $2 != performance* ]]; then # the same answers every time
  export LCCL_DETERMINISTIC="${LCCL_DETERMINISTIC-1}" HCCL_DETERMINISTIC="${HCCL_DETERMINISTIC-true}"
  export ATB_MATMUL_SHUFFLE_K_ENABLE="${ATB_MATMUL_SHUFFLE_K_ENABLE-0}"
  export ATB_LLM_LCOC_ENABLE="${ATB_LLM_LCOC_ENABLE-1}"
fi
read_launch_settings 20020
set_npu_switches
exec_main --task modeltest --auto_attention "${plan[0]}" --model_path "${plan[1]}" \
  --modeltest_arguments "$@"
