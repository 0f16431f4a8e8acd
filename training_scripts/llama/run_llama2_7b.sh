#!/usr/bin/env bash
# Llama-2-7B, all weights, on every GPU of one node (8 of them: 32 samples a step). Stage 3 splits weights, gradients
# and optimizer state; with gradient checkpointing middling data-centre cards are enough. If it does not fit: add
# --offload.
# The model is gated: accept its licence on the hub and log in, or pass --model_name_or_path a local folder.
#
# usage: bash training_scripts/llama/run_llama2_7b.sh [OUTPUT] [ZERO_STAGE] [further main.py arguments]
set -euo pipefail
OUTPUT=./output_llama2_7b ZERO_STAGE=3
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

deepspeed "$ROOT/main.py" \
    --model_name_or_path meta-llama/Llama-2-7b-hf \
    --data_path Dahoas/rm-static Dahoas/full-hh-rlhf \
        Dahoas/synthetic-instruct-gptj-pairwise yitingxie/rlhf-reward-datasets \
    --data_split 2,4,4 \
    --max_seq_len 512 \
    --per_device_train_batch_size 4 \
    --per_device_eval_batch_size 4 \
    --learning_rate 9.65e-6 \
    --weight_decay 0. \
    --num_train_epochs 4 \
    --gradient_accumulation_steps 1 \
    --lr_scheduler_type cosine \
    --num_warmup_steps 0 \
    --seed 1234 \
    --gradient_checkpointing \
    --zero_stage "$ZERO_STAGE" \
    --deepspeed \
    --output_dir "$OUTPUT" \
    "$@" 2>&1 | tee -i ${APPEND:+-a} "$OUTPUT/training.log"
