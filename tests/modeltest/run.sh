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
# Environment besides, whatever is exported wins: see run_pa.sh,
# gptneox/devices/switches.py and
#   MODELTEST_DATA_DIR, MODELTEST_OUTPUT_DIR   instead of data/ and outputs/ beside this file
#   MODELTEST_LOG_TO_FILE=1                    also log into outputs/logs
# Exit status: 0 every case ran; 1 one failed, the others ran; 2 wrong usage, or not served.
# A POSIX shell has to be able to read these four lines, and an old bash too.
case ${BASH_VERSION:-none} in
  none | [123].* | 4.[0-3].*) echo "$0 needs bash, 4.4 or later; type: bash $0" >&2 && exit 2 ;;
esac
set -euo pipefail +o posix

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
  sed -n '2,/^# Exit/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit $(($# ? 0 : 2))
fi
repo=$(realpath -- "$(dirname -- "${BASH_SOURCE[0]}")/../..")
launch=("$repo/gptneox/launch.py" modeltest "$0" "$@")
# shellcheck source=scripts/env.sh disable=SC1091
source "$repo/scripts/env.sh" runtime
exec "$PYTHON" "${launch[@]}"
