#!/usr/bin/env bash
# The checks of tests/npu on a real card, without the emulator, the riskiest operators first.
#
# Usage, from any folder, on a machine with CANN and torch_npu:
#   bash tests/npu/run_on_card.sh [pytest options]
#
# Environment: PYTHON (interpreter with torch_npu), ASCEND_RT_VISIBLE_DEVICES (0).
# Exit status: 0 when everything passed; 1 something failed or the machine is not ready.
# A POSIX shell has to be able to read these four lines, and an old bash too.
case ${BASH_VERSION:-none} in
  none | [123].* | 4.[0-3].*) echo "$0 needs bash, 4.4 or later; type: bash $0" >&2 && exit 2 ;;
esac
set -euo pipefail +o posix

cd -- "$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")/../.."
# shellcheck source=scripts/env.sh disable=SC1091
source scripts/env.sh dev
export ASCEND_RT_VISIBLE_DEVICES="${ASCEND_RT_VISIBLE_DEVICES:-0}" TORCH_DEVICE_BACKEND_AUTOLOAD=0

"$PYTHON" main.py doctor --device npu || exit 1

check() {
  printf '\n== %s\n' "$1"
  "$PYTHON" -m pytest -q --tb=short -m '' -o 'python_files=check_*.py' "${@:2}" || failed=1
}
failed=0
# One twin has head_dim 96 and 24 rotated dimensions: prefill, chunks, decoding, prefix cache.
check "logits of the 20B twin against Hugging Face" \
  tests/npu/on_device/check_parity.py -k gpt-neox-20b "$@"
check "shape rules of every operator" \
  tests/npu/on_device/check_operators.py "$@"
check "decode steps as graphs (Atlas A2)" tests/npu/on_device/check_graphs.py "$@"
check "logits of every twin" tests/npu/on_device/check_parity.py -k "not gpt-neox-20b" "$@"
exit "$failed"
