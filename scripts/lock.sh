# shellcheck shell=bash
# The lock of all scripts. Sourced by env.sh and launch.sh, never run.

# lock_fd NUMBER FOLDER: locks the open file NUMBER, which lies in FOLDER, until it is closed; status
# 1 when another process holds the lock. Where there are none (no program flock, a network file
# system without them) that is said once, and the work goes on.
lock_fd() {
  local reason="there is no program flock"
  if command -v flock >/dev/null; then
    reason=$(flock -n "$1" 2>&1) && return 0
    [[ -n $reason ]] || return 1
  fi
  [[ -n ${LOCK_SAID:-} ]] ||
    printf '%s: no file locks in %s (%s): start nothing else like this meanwhile\n' \
      "${0##*/}" "$2" "${reason##*: }" >&2
  LOCK_SAID=1
}
