#!/usr/bin/env bash
# OPT-1.3b, LoRA weights only, on every GPU of one node (8 of them: 64 samples a step). So little is trained
# that nothing needs splitting (stage 0): small cards do.
# LoRA wants a larger rate than full fine-tuning: --lora_learning_rate. --learning_rate would be the rate of
# the other weights and counts as soon as --only_optimize_lora is taken away.
#
# usage: bash training_scripts/single_node/run_1.3b_lora.sh [OUTPUT] [ZERO_STAGE] [further main.py arguments]
set -euo pipefail
OUTPUT=./output_1.3b_lora ZERO_STAGE=0
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

deepspeed "$ROOT/main.py" \
    --model_name_or_path facebook/opt-1.3b \
    --data_path Dahoas/rm-static Dahoas/full-hh-rlhf \
        Dahoas/synthetic-instruct-gptj-pairwise yitingxie/rlhf-reward-datasets \
    --data_split 2,4,4 \
    --max_seq_len 512 \
    --per_device_train_batch_size 8 \
    --per_device_eval_batch_size 8 \
    --learning_rate 1e-3 \
    --lora_learning_rate 1e-3 \
    --weight_decay 0.1 \
    --num_train_epochs 16 \
    --gradient_accumulation_steps 1 \
    --lr_scheduler_type cosine \
    --num_warmup_steps 0 \
    --seed 1234 \
    --lora_dim 128 \
    --lora_module_name decoder.layers. \
    --only_optimize_lora \
    --zero_stage "$ZERO_STAGE" \
    --deepspeed \
    --output_dir "$OUTPUT" \
    "$@" 2>&1 | tee -i ${APPEND:+-a} "$OUTPUT/training.log"
