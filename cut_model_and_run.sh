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
input_dir=${input_dir:-}       # checkpoint; else [model] model_path, else weights/neox-mini
output_dir=${output_dir:-}     # cut weights; else ${input_dir}/part_model
world_size_=${world_size_:-}   # parts; else the number of [model] device_ids above one, else 2
#
# Environment besides; whatever is exported wins: see run_pa.sh, and what set_npu_switches sets.
# Exit status: main.py's; 1 something is missing or the cut does not fit, 2 wrong usage.
set -euo pipefail

repo=$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")
# shellcheck source=scripts/launch.sh disable=SC1091
source "$repo/scripts/launch.sh"

recut=()
if [[ ${1:-} == --recut ]]; then
  recut=(--recut)
  shift
fi
task=${1:-}
case $task in
  "" | inference | precision | performance) shift $(($# > 0)) ;;
  -h | --help)
    sed -n '2,/^set -e/{s/^# \{0,1\}//p;s/^\([a-z_]*\)=[^ ]* *# /  \1: /p}' "${BASH_SOURCE[0]}"
    exit 0
    ;;
  *) die 2 "'$task' is no task; use inference, precision or performance, or none to cut only" ;;
esac

# shellcheck source=scripts/env.sh disable=SC1091
source "$repo/scripts/env.sh" runtime

# What config.ini says: model_path (absolute) and the number of device_ids.
mapfile -t ini < <("$PYTHON" "$repo/cut_model_util.py" --print_config "$repo/config.ini") || true
((${#ini[@]} == 2)) || die 2 "config.ini cannot be read; see the line above"
: "${input_dir:=${ini[0]}}"
if [[ -z $world_size_ ]]; then
  world_size_=$((ini[1] > 1 ? ini[1] : 2))
fi
[[ $world_size_ =~ ^[1-9][0-9]{0,3}$ ]] ||
  die 2 "world_size_='$world_size_' is not a whole number from 1 on; use 2, 4 or 8"
input_dir=$(require_dir "$input_dir" "input_dir" "set input_dir, or [model] model_path in config.ini")
[[ $(basename -- "$input_dir") != part_model ]] || input_dir=$(dirname -- "$input_dir")
: "${output_dir:=$input_dir/part_model}"

cut_model() {
  "$PYTHON" "$repo/cut_model_util.py" --input_path "$input_dir" --output_path "$output_dir" \
    --world_size "$world_size_" "$@"
}

# is_unused PATH: nothing is there, an empty folder, or only what an interrupted cut left.
is_unused() {
  [[ -e $1 ]] || return 0
  [[ -d $1 && -z $(find "$(realpath -- "$1")" -mindepth 1 -maxdepth 1 \
    ! -name .gptneox-unfinished -print -quit) ]]
}

needs_cut=0
if is_unused "$output_dir" || ((${#recut[@]} > 0)); then
  needs_cut=1
fi
if [[ $needs_cut == 0 || -n $task ]]; then
  # It will run: settings that are wrong are found before the long cut, not after it.
  # One rank per part; the list of devices, where there is one, has to agree.
  read_nodes
  if [[ -z ${TP_WORLD_SIZE:-} ]]; then
    export TP_WORLD_SIZE=$((world_size_ / ${NNODES:-1}))
  fi
  read_launch_settings 20001
  ((NUM_PROCESSES * ${NNODES:-1} == world_size_)) ||
    die 2 "world_size_ is $world_size_, but $((NUM_PROCESSES * ${NNODES:-1})) ranks would start"
  set_npu_switches
fi

if [[ $needs_cut == 1 ]]; then
  printf 'The gpt-neox-20b part model is not exists, Now begin to cut ...\n'
  cut_model "${recut[@]}"
  if [[ -z $task ]]; then
    printf 'Next: bash %s inference\n' "${BASH_SOURCE[0]}"
    exit 0
  fi
else
  status=0
  reason=$(cut_model --check) || status=$?
  case $status in
    0) ;;
    3) die 1 "$reason; to replace it: bash ${BASH_SOURCE[0]} --recut $task" ;;
    *) die 1 "${reason:-"$output_dir cannot be checked"}" ;;
  esac
fi
printf '**********************The gpt-neox-20b part model exists, Now begin to run ...**********************\n'

# The flash path finds part_model beside the weights; parts elsewhere have to be named.
model_dir=$input_dir
[[ $output_dir -ef $input_dir/part_model ]] || model_dir=$(realpath -- "$output_dir")
exec_main --task "${task:-inference}" --auto_attention flash --model_path "$model_dir" "$@"
