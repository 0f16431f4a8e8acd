#!/usr/bin/env bash
# Runs the core of the tests under the oldest versions that requirements.txt claims (requirements-floor.txt):
#
#     bash tools/floor.sh FOLDER [PYTEST_ARGUMENTS]
#
# FOLDER gets the environment, about 6 GB: torch of that age comes as its CUDA build alone, and runs on a CPU too. A
# second call uses it again. With PYTEST_ARGUMENTS those tests run in place of the core. What fails decides the floor.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ $# -lt 1 ]]; then
  echo "usage: bash tools/floor.sh FOLDER [PYTEST_ARGUMENTS]" >&2
  exit 2
fi
folder=$1
shift
if [[ ! -x "$folder/bin/pytest" ]]; then
  "${PYTHON:-python3}" -m venv "$folder"
  rest=$(mktemp)
  trap 'rm -f "$rest"' EXIT
  floors=$(sed -n 's/^\([A-Za-z0-9_-]*\)==.*/\1/p' requirements-floor.txt | paste -sd '|')
  cat requirements.txt requirements-dev.txt | grep -vE "^(-r|#)|^($floors)==" > "$rest"
  "$folder/bin/pip" install -q --disable-pip-version-check -r requirements-floor.txt -r "$rest"
fi
core=(
  tests/module tests/engine tests/machine tests/train tests/model/test_families.py tests/export/test_saving.py
  tests/prompt_eval/test_generation.py tests/benchmarks tests/test_utils.py tests/test_perf.py
)
if [[ $# -gt 0 ]]; then
  core=("$@")
fi
exec "$folder/bin/python" -m pytest -q "${core[@]}"
