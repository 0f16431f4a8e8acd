#!/usr/bin/env bash
# Qwen3-0.6B (base), all weights, on every GPU of one node (8 of them: 64 samples a step; one GPU works
# too). The weights are small, the logits of 152k words are not: gradient checkpointing makes room for them
# on middling cards.
#
# usage: bash training_scripts/llama/run_qwen3_0.6b.sh [OUTPUT] [ZERO_STAGE] [further main.py arguments]
set -euo pipefail
OUTPUT=./output_qwen3_0.6b ZERO_STAGE=2
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

deepspeed "$ROOT/main.py" \
    --model_name_or_path Qwen/Qwen3-0.6B-Base \
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
