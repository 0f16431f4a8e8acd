#!/usr/bin/env bash
# The demo: a tiny OPT, trained from random weights on the shipped data. No GPU, no network, about a minute on
# two cores.
# The base model is made first, in $OUTPUT/base; started with plain python, so this is one process without a
# launcher.
# Threads that wait give their core away: with another program on the machine, spinning ones took up to
# several times as long.
#
# usage: bash training_scripts/single_cpu/run_tiny.sh [OUTPUT] [ZERO_STAGE] [further main.py arguments]
set -euo pipefail
OUTPUT=./output_tiny ZERO_STAGE=0
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

{
    python "$ROOT/demo/make_tiny_opt.py" "$OUTPUT/base"
    python "$ROOT/main.py" \
        --model_name_or_path "$OUTPUT/base" \
        --data_path local/jsonfile \
        --data_split 10,0,0 \
        --max_seq_len 64 \
        --per_device_train_batch_size 32 \
        --per_device_eval_batch_size 32 \
        --learning_rate 2e-3 \
        --weight_decay 0. \
        --num_train_epochs 7 \
        --gradient_accumulation_steps 1 \
        --lr_scheduler_type cosine \
        --num_warmup_steps 40 \
        --seed 1234 \
        --dtype fp32 \
        --zero_stage "$ZERO_STAGE" \
        --deepspeed \
        --output_dir "$OUTPUT" \
        "$@"
} 2>&1 | tee -i ${APPEND:+-a} "$OUTPUT/training.log"
