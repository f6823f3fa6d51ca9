#!/usr/bin/env bash
# Build the documentation site; a warning is an error.
#
# In: nothing but python3 (>= 3.11); arguments go to `mkdocs build`. Out: site/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh docs
exec .venv/bin/mkdocs build --quiet --strict "$@"
