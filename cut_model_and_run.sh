#!/usr/bin/env bash
# Flash-attention path on several devices: cut the weights once, then run a task on the parts.
#
# Usage, from any folder:
#   bash cut_model_and_run.sh                     cut, when there is no complete cut yet, and stop
#   bash cut_model_and_run.sh TASK [options]      cut if need be, then run; TASK is
#                                                 inference, precision or performance
#   bash cut_model_and_run.sh --recut [TASK …]    replace a cut that is there
#
# The three settings below may be edited here or exported; config.ini speaks where they are empty.
# A --model_path among the options goes before input_dir.
input_dir=${input_dir:-}       # checkpoint; else [model] model_path, else weights/neox-mini
output_dir=${output_dir:-}     # cut weights; else ${input_dir}/part_model
world_size_=${world_size_:-}   # parts; else the number of [model] device_ids above one, else 2
#
# Environment besides; whatever is exported wins: see run_pa.sh, and the switches
# of CANN and ATB in gptneox/devices/switches.py.
# Exit status: main.py's; 1 something is missing or the cut does not fit, 2 wrong usage, such as a
#   path that is not there.
# A POSIX shell has to be able to read these four lines, and an old bash too.
case ${BASH_VERSION:-none} in
  none | [123].* | 4.[0-3].*) echo "$0 needs bash, 4.4 or later; type: bash $0" >&2 && exit 2 ;;
esac
set -euo pipefail +o posix

repo=$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  sed -n '2,/^# Exit/{s/^# \{0,1\}//p;s/^\([a-z_]*\)=[^ ]* *# /  \1: /p}' "${BASH_SOURCE[0]}"
  exit 0
fi
launch=("$repo/gptneox/launch.py" flash "$0" "$input_dir" "$output_dir" "$world_size_" "$@")
# shellcheck source=scripts/env.sh disable=SC1091
source "$repo/scripts/env.sh" runtime
exec "$PYTHON" "${launch[@]}"
