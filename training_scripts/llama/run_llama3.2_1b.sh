#!/usr/bin/env bash
# Llama-3.2-1B, all weights, on every GPU of one node (8 of them: 64 samples a step; one GPU works too). The
# weights are small, the logits of 128k words are not: gradient checkpointing makes room for them on
# middling cards.
# The model is gated: accept its licence on the hub and log in, or pass --model_name_or_path a local folder.
#
# usage: bash training_scripts/llama/run_llama3.2_1b.sh [OUTPUT] [ZERO_STAGE] [further main.py arguments]
set -euo pipefail
OUTPUT=./output_llama3.2_1b ZERO_STAGE=2
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

deepspeed "$ROOT/main.py" \
    --model_name_or_path meta-llama/Llama-3.2-1B \
    --data_path Dahoas/rm-static Dahoas/full-hh-rlhf \
        Dahoas/synthetic-instruct-gptj-pairwise yitingxie/rlhf-reward-datasets \
    --data_split 2,4,4 \
    --max_seq_len 512 \
    --per_device_train_batch_size 8 \
    --per_device_eval_batch_size 8 \
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
