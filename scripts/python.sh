#!/usr/bin/env bash
# Runs a Python program in the environment that the launchers would choose; makes none.
#
# Usage: bash scripts/python.sh INTERPRETER LACKING PROGRAM [arguments]
# main.py and its like become this when INTERPRETER, which runs them, lacks something.
# Exit status: the program's; 1 there is no such environment.
set -euo pipefail +o posix

here=$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")
# The process stays the same, whatever it becomes: so this is its second time here.
if [[ ${GPTNEOX_WENT_ON:-} == "$$" ]]; then
  printf 'error: %s lacks %s, though it passed for complete; repair it, or set PYTHON to another\n' \
    "$1" "$2" >&2
  exit 1
fi
# shellcheck source=scripts/env.sh disable=SC1091
source "$here/env.sh" find "$1"
printf '%s lacks %s; going on in %s\n' "$1" "$2" "$PYTHON" >&2
export GPTNEOX_WENT_ON=$$
exec "$PYTHON" "${@:3}"
