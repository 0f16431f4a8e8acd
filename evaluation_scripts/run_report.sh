#!/usr/bin/env bash
# Write a report to share: answers of two models by every decoding strategy, side by side, with figures, as report.html,
# report.md and results.jsonl in REPORT (by default FINETUNED/report). BASELINE is a hub name or a folder (by default
# facebook/opt-1.3b), FINETUNED the --output_dir of a training run; all three may be environment variables instead.
# With --data_path and the other data arguments of training, the report has both perplexities.
#
# usage: bash evaluation_scripts/run_report.sh [BASELINE] [FINETUNED] [REPORT] [further prompt_eval.py arguments]
set -euo pipefail
ROOT=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ $# -gt 0 && $1 != -* ]]; then BASELINE=$1; shift; fi
if [[ $# -gt 0 && $1 != -* ]]; then FINETUNED=$1; shift; fi
if [[ $# -gt 0 && $1 != -* ]]; then REPORT=$1; shift; fi
if [[ -z ${FINETUNED:-} ]]; then
    echo "FINETUNED is missing: give the folder of the fine-tuned model, the run's --output_dir" >&2
    echo "usage: bash evaluation_scripts/run_report.sh [BASELINE] [FINETUNED] [REPORT] [prompt_eval.py arguments]" >&2
    exit 2
fi

python "$ROOT/prompt_eval.py" \
    --model_name_or_path_baseline "${BASELINE:-facebook/opt-1.3b}" \
    --model_name_or_path_finetune "$FINETUNED" \
    --strategies all \
    --report "${REPORT:-$FINETUNED/report}" \
    "$@"
