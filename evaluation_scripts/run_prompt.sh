#!/usr/bin/env bash
# Show the answers of two models to the same prompts, side by side: BASELINE (a hub name or a folder, by default
# facebook/opt-1.3b) and FINETUNED (the --output_dir of a training run). Both may be environment variables instead.
#
# usage: bash evaluation_scripts/run_prompt.sh [BASELINE] [FINETUNED] [further prompt_eval.py arguments]
set -euo pipefail
ROOT=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ $# -gt 0 && $1 != -* ]]; then BASELINE=$1; shift; fi
if [[ $# -gt 0 && $1 != -* ]]; then FINETUNED=$1; shift; fi
if [[ -z ${FINETUNED:-} ]]; then
    echo "FINETUNED is missing: give the folder of the fine-tuned model, the run's --output_dir" >&2
    echo "usage: bash evaluation_scripts/run_prompt.sh [BASELINE] [FINETUNED] [prompt_eval.py arguments]" >&2
    exit 2
fi

python "$ROOT/prompt_eval.py" \
    --model_name_or_path_baseline "${BASELINE:-facebook/opt-1.3b}" \
    --model_name_or_path_finetune "$FINETUNED" \
    "$@"
