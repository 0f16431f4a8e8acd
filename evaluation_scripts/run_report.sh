#!/usr/bin/env bash
# A report to share: answers of two models with every decoding strategy, side by side, with numbers, as report.html,
# report.md and results.jsonl in REPORT. BASELINE is a hub name or a folder, FINETUNED the --output_dir of a training
# run. All three may come from the environment instead; BASELINE is facebook/opt-1.3b and REPORT is FINETUNED/report
# unless given. With --data_path and the other data arguments of training both perplexities are in it.
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
