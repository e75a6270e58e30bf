#!/usr/bin/env bash
# The HTTP service: OpenAI's API over a GPT-NeoX model. docs/serving.md says more.
#
# Usage, from any folder:
#   bash serve.sh                                  model_path of config.ini, else weights/neox-mini
#   bash serve.sh WEIGHT_DIR [main.py options]
#   bash serve.sh [main.py options]                the first word starts with "-"
#   bash serve.sh --help                           the options of main.py
# It listens at 127.0.0.1 port 8000; --host and --port choose others. SIGTERM or Ctrl-C ends it when
# the running requests are done, a second one at once.
#
# Environment, besides that of run_pa.sh, which counts here too:
#   GPTNEOX_API_KEY            keys that clients may send, joined by commas    (none is needed)
#   NNODES, NODE_RANK, MASTER_ADDR   an engine over several hosts: the same command on each; only
#                              host 0 listens
# Exit status: 0 ended by a signal; 1 something is missing, or an engine died; 2 wrong usage.
# A POSIX shell has to be able to read these four lines, and an old bash too.
case ${BASH_VERSION:-none} in
  none | [123].* | 4.[0-3].*) echo "$0 needs bash, 4.4 or later; type: bash $0" >&2 && exit 2 ;;
esac
set -euo pipefail +o posix

repo=$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")
launch=("$repo/gptneox/launch.py" serve "$0" "$@")
# shellcheck source=scripts/env.sh disable=SC1091
source "$repo/scripts/env.sh" serve
exec "$PYTHON" "${launch[@]}"
