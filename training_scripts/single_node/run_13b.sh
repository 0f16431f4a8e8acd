#!/usr/bin/env bash
# OPT-13b with LoRA on every GPU of one node (8 of them: 32 samples a step). Stage 3 splits the frozen weights
# too, so each card holds an eighth of them. If it does not fit: add --only_optimize_lora, then --offload.
# --lora_learning_rate is for the LoRA weights, --learning_rate for embeddings, norms and biases.
#
# usage: bash training_scripts/single_node/run_13b.sh [OUTPUT] [ZERO_STAGE] [further main.py arguments]
set -euo pipefail
OUTPUT=./output_13b ZERO_STAGE=3
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

deepspeed "$ROOT/main.py" \
    --model_name_or_path facebook/opt-13b \
    --data_path Dahoas/rm-static Dahoas/full-hh-rlhf \
        Dahoas/synthetic-instruct-gptj-pairwise yitingxie/rlhf-reward-datasets \
    --data_split 2,4,4 \
    --max_seq_len 512 \
    --per_device_train_batch_size 4 \
    --per_device_eval_batch_size 4 \
    --learning_rate 1e-4 \
    --lora_learning_rate 5e-4 \
    --weight_decay 0. \
    --num_train_epochs 16 \
    --gradient_accumulation_steps 1 \
    --lr_scheduler_type cosine \
    --num_warmup_steps 0 \
    --seed 1234 \
    --gradient_checkpointing \
    --lora_dim 128 \
    --lora_module_name decoder.layers. \
    --zero_stage "$ZERO_STAGE" \
    --deepspeed \
    --output_dir "$OUTPUT" \
    "$@" 2>&1 | tee -i ${APPEND:+-a} "$OUTPUT/training.log"
