#!/usr/bin/env bash
# OPT-6.7b with LoRA on one GPU with a large memory: the model is not partitioned, so all its half-precision
# weights stay on the card; gradient checkpointing keeps the activations small. If it does not fit: add
# --only_optimize_lora (embeddings and norms then need no optimizer state), a smaller batch, or stage 3 with
# --offload.
# LoRA wants a larger rate than full fine-tuning: --lora_learning_rate; --learning_rate is for the weights
# beside LoRA.
#
# usage: bash training_scripts/single_gpu/run_6.7b_lora.sh [OUTPUT] [ZERO_STAGE] [further main.py arguments]
set -euo pipefail
OUTPUT=./output_6.7b_lora ZERO_STAGE=0
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

deepspeed --num_gpus 1 "$ROOT/main.py" \
    --model_name_or_path facebook/opt-6.7b \
    --data_path Dahoas/rm-static Dahoas/full-hh-rlhf \
        Dahoas/synthetic-instruct-gptj-pairwise yitingxie/rlhf-reward-datasets \
    --data_split 2,4,4 \
    --max_seq_len 512 \
    --per_device_train_batch_size 8 \
    --per_device_eval_batch_size 8 \
    --learning_rate 1e-3 \
    --lora_learning_rate 1e-3 \
    --weight_decay 0. \
    --num_train_epochs 16 \
    --gradient_accumulation_steps 16 \
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
