#!/usr/bin/env bash
# Writes requirements.lock: every package that requirements.txt brings, with version and hashes, for Linux and Python 3.11.
# It needs uv (pip install uv) and a package registry. Run it after a change of requirements.txt:
#   bash tools/lock.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

command -v uv >/dev/null || { echo "tools/lock.sh: uv is needed and not there: pip install uv" >&2; exit 2; }
uv pip compile --quiet --generate-hashes --no-annotate --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
    --custom-compile-command "bash tools/lock.sh" --output-file requirements.lock requirements.txt "$@"
echo "requirements.lock: $(grep -c '^[a-z].*==' requirements.lock) packages"
