#!/usr/bin/env bash
# Test other versions of transformers, accelerate and peft than those of constraints.txt.
#
# In: `lowest` (what pyproject.toml asks for), `newest` (what the package index has) or requirements
# such as accelerate==1.6.0; further arguments go to pytest after `--`. Everything else, torch
# included, is that of .venv. Out: the versions and the exit status of the tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh dev

packages="transformers|accelerate|peft"
wanted=()
while (($#)) && [[ $1 != -- ]]; do
    case $1 in
        lowest) mapfile -t found < <(grep -oE "\"($packages)>=[0-9.]+" pyproject.toml | sed 's/"//; s/>=/==/') ;;
        newest) IFS='|' read -ra found <<< "$packages" ;;
        *) found=("$1") ;;
    esac
    wanted+=("${found[@]}")
    shift
done
[[ ${1:-} != -- ]] || shift
((${#wanted[@]})) || { echo "Name versions: lowest, newest or PACKAGE==VERSION." >&2; exit 2; }

# An environment of its own in front of .venv: only what has to differ is installed.
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
.venv/bin/python -m venv "$environment"
site=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$site/behind.pth"
"$environment/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade \
    -c <(grep '^torch==' constraints.txt) "${wanted[@]}"
"$environment/bin/python" -m pip list --path "$site" --disable-pip-version-check

export PATH="$environment/bin:$PWD/.venv/bin:$PATH" PYTHONPATH="$PWD" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
export DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR="$PWD/.venv/torch_extensions"
python -m pytest -o addopts=-q tests/unit/routing tests/unit/test_config.py tests/unit/commands/test_cli.py \
    tests/integration/test_{names,trainer,adapters_roundtrip,lora}.py \
    tests/distributed/test_trainer_launches.py -m "not full" "$@"
