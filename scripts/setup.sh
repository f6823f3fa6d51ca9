#!/usr/bin/env bash
# Make or refresh .venv: torch first, then hf_muon with the extras that are named.
#
# In: extras, e.g. `scripts/setup.sh recipes dev`. Out: .venv/bin/python. A second call with nothing
# changed installs nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=$(IFS=,; echo "$*")
stamp=.venv/.installed-${extras//,/-}
if [[ -e $stamp && ! pyproject.toml -nt $stamp && ! constraints.txt -nt $stamp ]]; then
    exit 0
fi

if [[ ! -x .venv/bin/python ]]; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { echo "error: $(python3 --version) is too old: Python 3.11 or newer is needed." >&2; exit 1; }
    python3 -m venv .venv
fi

# What pip does, and for how long already, in a line that moves; in a log, one every ten seconds.
follow() {
    local seconds=0 doing
    while sleep 1; do
        seconds=$((seconds + 1))
        doing=$(tail -n 1 .venv/pip.log 2>/dev/null || true)
        if [[ -t 1 ]]; then
            printf '\r\033[K  %3d s  %.70s' "$seconds" "${doing#"${doing%%[! ]*}"}"
        elif ((seconds % 10 == 0)); then
            printf '  %3d s  %.110s\n' "$seconds" "${doing#"${doing%%[! ]*}"}"
        fi
    done
}
follower=
quiet() {
    [[ -z $follower ]] || kill "$follower" 2>/dev/null || true
    follower=
    [[ ! -t 1 ]] || printf '\r\033[K'
}
trap quiet EXIT
install() {
    local status=0
    : > .venv/pip.log
    follow &
    follower=$!
    .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off \
        -c constraints.txt "$@" >> .venv/pip.log 2>&1 || status=$?
    quiet
    if ((status)); then
        tail -n 30 .venv/pip.log >&2
        echo "error: pip could not install $*; all of what it said is in .venv/pip.log." >&2
        exit "$status"
    fi
}
echo "Installing torch and hf_muon[$extras] into .venv, a few minutes the first time:"
install torch==2.13.0 # first, so that the build chosen for this machine is not replaced later
install -e ".[$extras]"
echo "Installed."
touch "$stamp"
