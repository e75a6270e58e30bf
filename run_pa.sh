#!/usr/bin/env bash
# Text generation with paged attention.
#
# Usage, from any folder:
#   bash run_pa.sh                                  model_path of config.ini, else weights/neox-mini
#   bash run_pa.sh WEIGHT_DIR [main.py options]
#   bash run_pa.sh [main.py options]                the first word starts with "-"
#   bash run_pa.sh --help                           the options of main.py
#
# Environment; whatever is exported wins:
#   ASCEND_RT_VISIBLE_DEVICES  devices, like 0,1: one rank on each     (unset: one rank)
#   TP_WORLD_SIZE              ranks on this host, 1: without torchrun (unset: one per device)
#   MASTER_PORT                rendezvous port                         (20014, or the next free one)
#   NNODES, NODE_RANK, MASTER_ADDR   a run over several hosts          (one host)
#   BIND_CPU, IS_QUANT         1 binds each rank to cores; quantized weights   (config.ini, 0)
#   INF_NAN_MODE_ENABLE        0: fp16 overflow saturates              (0 on 310P, else unset)
#   OMP_NUM_THREADS            CPU threads of a rank                   (cores / ranks)
#   PYTHON, TORCHRUN           interpreter and launcher to use         (see scripts/env.sh)
# Exit status: main.py's; 1 something is missing, 2 wrong usage, such as a path that is not there.
# A POSIX shell has to be able to read these four lines, and an old bash too.
case ${BASH_VERSION:-none} in
  none | [123].* | 4.[0-3].*) echo "$0 needs bash, 4.4 or later; type: bash $0" >&2 && exit 2 ;;
esac
set -euo pipefail +o posix

repo=$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")
launch=("$repo/gptneox/launch.py" paged "$0" "$@")
# shellcheck source=scripts/env.sh disable=SC1091
source "$repo/scripts/env.sh" runtime
exec "$PYTHON" "${launch[@]}"
