#!/usr/bin/env bash
# Build the documentation site; a warning is an error.
#
# In: nothing but python3 (>= 3.11); arguments go to `mkdocs build`. Out: site/, and how to look at it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh docs
.venv/bin/mkdocs build --quiet --strict "$@"
echo "Built site/. To look at it: python3 -m http.server --directory site, then http://localhost:8000"
