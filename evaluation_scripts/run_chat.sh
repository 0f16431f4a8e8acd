#!/usr/bin/env bash
# Talk to a fine-tuned model in the terminal and, with BASELINE, to the model before fine-tuning at the same time.
# FINETUNED and BASELINE may be environment variables instead.
#
# usage: bash evaluation_scripts/run_chat.sh [FINETUNED] [BASELINE] [further prompt_eval.py arguments]
set -euo pipefail
ROOT=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ $# -gt 0 && $1 != -* ]]; then FINETUNED=$1; shift; fi
if [[ $# -gt 0 && $1 != -* ]]; then BASELINE=$1; shift; fi
if [[ -z ${FINETUNED:-} ]]; then
    echo "FINETUNED is missing: give the folder of the fine-tuned model, the run's --output_dir" >&2
    echo "usage: bash evaluation_scripts/run_chat.sh [FINETUNED] [BASELINE] [prompt_eval.py arguments]" >&2
    exit 2
fi
models=(--model_name_or_path_finetune "$FINETUNED")
if [[ -n ${BASELINE:-} ]]; then models+=(--model_name_or_path_baseline "$BASELINE"); fi

python "$ROOT/prompt_eval.py" --interactive "${models[@]}" "$@"
