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
install() { .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$@"; }
echo "Installing torch and hf_muon[$extras] into .venv (a few minutes the first time)"
install torch==2.13.0 # first, so that the build chosen for this machine is not replaced later
install -e ".[$extras]"
touch "$stamp"
