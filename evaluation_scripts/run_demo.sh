#!/usr/bin/env bash
# Run the closing part of the demo: ask the tiny model before and after training eight held-out questions by every
# decoding strategy (run_report.sh), then print the greedy answers side by side, both perplexities and the path of the
# report. OUTPUT is the folder that training_scripts/single_cpu/run_tiny.sh wrote.
#
# usage: bash evaluation_scripts/run_demo.sh [OUTPUT] [further prompt_eval.py arguments]
set -euo pipefail
OUTPUT=./output_tiny
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} # as in run_tiny.sh
ROOT=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ $# -gt 0 && $1 != -* ]]; then OUTPUT=$1; shift; fi

mapfile -t prompts < <(python "$ROOT/evaluation_scripts/demo_report.py" --prompts)
arguments=()
for prompt in "${prompts[@]}"; do arguments+=(--prompt "$prompt"); done
echo "asking both models ${#prompts[@]} held-out questions of data/eval.json ..."
bash "$ROOT/evaluation_scripts/run_report.sh" "$OUTPUT/base" "$OUTPUT" "$OUTPUT/report" \
    --max_new_tokens 32 --data_path local/jsonfile --data_split 10,0,0 --max_seq_len 64 \
    "${arguments[@]}" "$@" >"$OUTPUT/answers.txt"
python "$ROOT/evaluation_scripts/demo_report.py" "$OUTPUT"
