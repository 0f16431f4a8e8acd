#!/usr/bin/env bash
# Score a model with lm-evaluation-harness (pip install -r requirements-eval.txt): MODEL is the --output_dir of a training
# run, any folder with a model, or a hub name; all further arguments go to lm_eval, and a later one replaces an earlier.
# Without --tasks it is scored on demo_answers, the demo's held-out questions, which need no network.
# The log is shown and kept in LOG (by default MODEL/lm_eval.log, or ./lm_eval.log for a hub name).
#
# usage: bash evaluation_scripts/run_lm_eval.sh MODEL [further lm_eval arguments]
set -euo pipefail
ROOT=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ $# -gt 0 && $1 != -* ]]; then MODEL=$1; shift; fi
if [[ -z ${MODEL:-} ]]; then
    echo "MODEL is missing: give the folder of the fine-tuned model, the run's --output_dir" >&2
    echo "usage: bash evaluation_scripts/run_lm_eval.sh MODEL [lm_eval arguments]" >&2
    exit 2
fi
if ! python -c 'import sys, importlib.util; sys.exit(importlib.util.find_spec("lm_eval") is None)'; then
    echo "lm_eval is not installed: pip install -r requirements-eval.txt" >&2
    exit 2
fi
folder=.
if [[ -d $MODEL ]]; then folder=$MODEL; fi

python -m lm_eval run --model hf --model_args "pretrained=$MODEL" --batch_size 8 --tasks demo_answers \
    --include_path "$ROOT/evaluation_scripts/lm_eval_tasks" "$@" 2>&1 | tee "${LOG:-$folder/lm_eval.log}"
