# shellcheck shell=bash
# Finds, or makes, the Python environment. Sourced by every launcher, never run.
#
#   source scripts/env.sh runtime    what the toolkit needs to run
#   source scripts/env.sh serve      that, and what the service needs
#   source scripts/env.sh dev        that, and what tests/run_tests.sh needs
#   source scripts/env.sh find INTERPRETER   finds that of runtime, INTERPRETER first; makes nothing
#
# Always give the word: `source` without one passes on the caller's own $1.
#
# Sets PYTHON (absolute path). Takes, in this order:
#   1. PYTHON, when the user set it: this interpreter or none
#   2. python3 or python on PATH, when it has the packages: it is used untouched, for an Ascend
#      container brings its own torch and torch_npu
#   3. .venv in the repository, when it is complete; else .venv is made, or brought up to date
# .venv/.gptneox-ascend says what was installed there. It reads "incomplete" until the last step is
# done, so an interrupted installation is done again by the next launcher, never taken for whole.
#
# A launcher sets `launch`, the array that it starts PYTHON with. Where no environment is ready, what
# is wrong with the launcher's own arguments is said first, and ends it.
#
# On failure: one line on stderr that names the remedy, and status 1.

env_say() {
  printf 'scripts/env.sh: %s\n' "$1" >&2
}

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

# env_requirements KEY: the requirement strings of one list in pyproject.toml, one per line.
env_requirements() {
  sed -n "/^$1 = \\[\$/,/^]/s/^ *\"\\(.*\\)\",\$/\\1/p" "$ENV_ROOT/pyproject.toml"
}

# env_needed WORD: the requirement strings of what `source` was told, one per line.
env_needed() {
  env_requirements dependencies
  [[ $1 != serve && $1 != dev ]] || env_requirements serve
  [[ $1 != dev ]] || env_requirements dev
}

# env_lacks INTERPRETER REQUIREMENT…: true when something is missing; ENV_LACKING then names it, and
# ENV_REMEDY says what to do.
env_lacks() {
  local status=0 answer
  answer=$("$1" -c "$ENV_CHECK_CODE" "${@:2}" 2>/dev/null) || status=$?
  ENV_LACKING=${answer%%$'\n'*} ENV_REMEDY="install that there"
  case $status in
    0) return 1 ;;
    3) [[ $answer != *$'\n'* ]] || ENV_REMEDY="type: $1 -m pip install ${answer#*$'\n'}" ;;
    *) ENV_LACKING="a working interpreter" ;;
  esac
}

# env_venv_is_ready NEED CHECKSUM REQUIREMENT…: .venv can be used as it is. One without our note
# was made by the user and is judged by its packages alone, as the active interpreter is.
env_venv_is_ready() {
  local need=$1 checksum=$2 note
  note=$(env_note)
  [[ $need != find ]] || need=runtime
  case "$need $note" in
    "$need " | "$need $need $checksum" | "runtime serve $checksum" | "$need dev $checksum") ;;
    *) return 1 ;;
  esac
  [[ -x $ENV_VENV/bin/python ]] && ! env_lacks "$ENV_VENV/bin/python" "${@:3}"
}

# Prints the first interpreter that is new enough to make .venv with.
env_base_python() {
  local name
  for name in python3 python3.13 python3.12 python3.11 python3.10 python; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      type -P "$name"
      return 0
    fi
  done
  env_say "no Python >= 3.10 on PATH; install one, or set PYTHON to one that has the packages"
  return 1
}

# Any Python can look at the launcher's arguments, or explain them: no package is needed for that.
env_check_launch() {
  local base word
  [[ -n ${launch[*]+set} ]] && base=$(env_base_python 2>/dev/null) || return 0
  for word in "${launch[@]:2}"; do
    [[ $word != -h && $word != --help ]] || PYTHON=$base exec "$base" "${launch[@]}"
  done
  "$base" "${launch[0]}" --check "${launch[@]:1}" || exit "$?"
}

# Prints what .venv/.gptneox-ascend says; nothing for an environment that the user made.
env_note() {
  [[ ! -e $ENV_NOTE ]] || cat -- "$ENV_NOTE"
}

# env_make_venv NEED CHECKSUM: makes .venv, or brings our own up to date. An interrupted one is made
# anew: pip takes a package it was killed in the middle of for installed.
env_make_venv() {
  local need=$1 checksum=$2 base log="$ENV_VENV/pip.log" reason wanted=()
  mapfile -t wanted < <(env_needed "$need")
  if [[ $(env_note) == incomplete ]] || {
    ! "$ENV_VENV/bin/python" -m pip --version >/dev/null 2>&1 &&
      ! "$ENV_VENV/bin/python" -m ensurepip >/dev/null 2>&1
  }; then
    base=$(env_base_python) || return 1
    # The note stays, so that what is killed here is known for ours.
    mkdir -p -- "$ENV_VENV" && printf 'incomplete\n' >"$ENV_NOTE" || return 1
    find "$ENV_VENV/" -mindepth 1 ! -name "${ENV_NOTE##*/}" -delete || return 1
    if ! reason=$("$base" -m venv "$ENV_VENV" 2>&1); then
      env_say "$base could not make .venv (${reason##*$'\n'}); install its venv module (Debian: \
apt install python3-venv), or set PYTHON to an interpreter that has the packages"
      return 1
    fi
  fi
  printf 'incomplete\n' >"$ENV_NOTE" || return 1
  if ! PIP_USER=0 "$ENV_VENV/bin/python" -m pip install --disable-pip-version-check \
    -c "$ENV_ROOT/constraints.txt" "${wanted[@]}" >"$log" 2>&1; then
    reason=$(grep -m 1 '^ERROR' "$log" || tail -n 1 "$log")
    env_say "pip could not fill .venv: ${reason#ERROR: } (all of it: .venv/pip.log). Check the \
network or pip's index and start again, or set PYTHON to an interpreter that has the packages"
    return 1
  fi
  printf '%s %s\n' "$need" "$checksum" >"$ENV_NOTE"
}

# env_check_owner: fails when .venv does not bear our note, and so is the user's: such a one is used
# where it is complete, and never changed.
env_check_owner() {
  [[ -z $(env_note) && -e $ENV_VENV ]] || return 0
  [[ -d $ENV_VENV && -z $(find "$ENV_VENV/" -mindepth 1 -print -quit) ]] && return 0
  [[ -x $ENV_VENV/bin/python ]] ||
    ENV_LACKING="a working interpreter" ENV_REMEDY="install that there"
  env_say "$ENV_VENV was not made by this toolkit, so it is not changed, but it lacks $ENV_LACKING; \
$ENV_REMEDY, move it away, or set PYTHON to another interpreter"
  return 1
}

# env_use_venv NEED CHECKSUM REQUIREMENT…: sets PYTHON to a complete .venv. Two launchers started
# at once take turns: the second finds the work done.
env_use_venv() {
  if ! env_venv_is_ready "$@"; then
    env_check_launch
    if [[ $1 == find ]]; then
      env_say "$ENV_REASON, and there is no complete .venv; type: bash $ENV_ROOT/run_pa.sh, which \
makes it once, or set PYTHON to an interpreter that has the packages"
      return 1
    fi
    if [[ ! -w $ENV_ROOT ]]; then
      env_say "$ENV_REASON, and $ENV_ROOT is not writable, so no .venv can be made there; set \
PYTHON to an interpreter that has the packages"
      return 1
    fi
    (
      if ! lock_fd 9 "$ENV_ROOT"; then
        env_say "another launcher is setting up .venv; waiting for it"
        flock 9
      fi
      env_venv_is_ready "$@" && exit 0
      env_check_owner || exit 1
      env_say "$ENV_REASON: setting up $ENV_VENV with pip."
      env_say "Once only, about a minute (longer on a slow network); progress in .venv/pip.log"
      env_make_venv "$1" "$2" || exit 1
      if ! env_venv_is_ready "$@"; then
        env_say "pip is content with .venv, yet it lacks $ENV_LACKING; remove .venv and start again"
        exit 1
      fi
      # Now rather than in the middle of the first run. It says itself what it does, and what is
      # lost without it: no reason to stop.
      (cd -- "$ENV_ROOT" && .venv/bin/python -m gptneox.devices.cpu.build) >&2 || true
    ) 9>"$ENV_ROOT/.venv.lock" || return 1
  fi
  PYTHON=$ENV_VENV/bin/python
}

# env_setup NEED [INTERPRETER]: the whole of the above.
env_setup() {
  local need=$1 checksum needed=() name active="" container_python=""
  ENV_ROOT=$(realpath -- "$(dirname -- "${BASH_SOURCE[0]}")/..") || return 1
  ENV_CHECK_CODE=$(<"$ENV_ROOT/gptneox/interpreter.py") || return 1
  ENV_VENV=$ENV_ROOT/.venv
  ENV_NOTE=$ENV_VENV/.gptneox-ascend
  # sentencepiece serves old tokenizers alone; an environment without it is used all the same
  mapfile -t needed < <(env_needed "$need" | grep -v '^sentencepiece')

  if [[ -n ${PYTHON:-} ]]; then
    active=$(type -P -- "$PYTHON") || active=$PYTHON
    if env_lacks "$active" "${needed[@]}"; then
      env_check_launch
      env_say "PYTHON=$PYTHON lacks $ENV_LACKING; $ENV_REMEDY, or unset PYTHON"
      return 1
    fi
    # absolute, but not resolved: the python of a virtual environment is a link
    PYTHON=$(realpath -s -- "$active") || return 1
    return 0
  fi

  ENV_REASON=""
  for name in "${@:2}" python3 python; do
    active=$(type -P -- "$name") || continue
    # beside a container's own, one without torch_npu would run on the CPU without a word
    if ! env_lacks "$active" ${container_python:+torch_npu} "${needed[@]}"; then
      PYTHON=$active
      return 0
    fi
    : "${ENV_REASON:="$active lacks $ENV_LACKING"}"
    env_lacks "$active" torch_npu || : "${container_python:=$active}"
  done
  : "${ENV_REASON:="there is no python3 on PATH"}"

  checksum=$({
    env_needed dev
    cat -- "$ENV_ROOT/constraints.txt"
  } | sha256sum) || return 1
  checksum=${checksum%% *}
  if [[ -n $container_python ]]; then
    # A fresh .venv would have no torch_npu and run on the CPU without a word.
    if ! env_venv_is_ready "$need" "$checksum" torch_npu "${needed[@]}"; then
      env_check_launch
      env_lacks "$container_python" "${needed[@]}"
      env_say "$container_python has torch_npu but lacks $ENV_LACKING; $ENV_REMEDY"
      return 1
    fi
    PYTHON=$ENV_VENV/bin/python
  else
    env_use_venv "$need" "$checksum" "${needed[@]}" || return 1
  fi
}

# Any other word is the caller's own $1, inherited: see the top.
case ${1:-} in
  dev | serve) env_setup "$1" || return 1 ;;
  find) env_setup find "$2" || return 1 ;;
  *) env_setup runtime || return 1 ;;
esac
