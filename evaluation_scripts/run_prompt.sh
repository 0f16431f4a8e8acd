#!/usr/bin/env bash
# Show the answers of two models to the same prompts, side by side: BASELINE (a hub name or a folder) and FINETUNED (the
# --output_dir of a training run). Both may be environment variables instead.
# FINETUNED is by default the newest ./output* folder that holds a model; BASELINE the model in its base folder where
# there is one, as the demo leaves it, and facebook/opt-1.3b otherwise.
#
# usage: bash evaluation_scripts/run_prompt.sh [BASELINE] [FINETUNED] [further prompt_eval.py arguments]
set -euo pipefail
ROOT=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ $# -gt 0 && $1 != -* ]]; then BASELINE=$1; shift; fi
if [[ $# -gt 0 && $1 != -* ]]; then FINETUNED=$1; shift; fi
if [[ -z ${FINETUNED:-} ]]; then
    for folder in ./output*; do
        if [[ -f $folder/config.json && ! $folder/config.json -ot ${FINETUNED:-$folder}/config.json ]]; then
            FINETUNED=$folder
        fi
    done
    if [[ -z ${FINETUNED:-} ]]; then
        echo "FINETUNED is missing, and no ./output* folder holds a model: give the --output_dir of a training run;" \
            "usage: bash evaluation_scripts/run_prompt.sh [BASELINE] [FINETUNED] [prompt_eval.py arguments]" >&2
        exit 2
    fi
    if [[ -z ${BASELINE:-} && -f $FINETUNED/base/config.json ]]; then BASELINE=$FINETUNED/base; fi
    echo "Comparing ${BASELINE:-facebook/opt-1.3b} with $FINETUNED, the newest model in ./output*"
fi

python "$ROOT/prompt_eval.py" \
    --model_name_or_path_baseline "${BASELINE:-facebook/opt-1.3b}" \
    --model_name_or_path_finetune "$FINETUNED" \
    "$@"
