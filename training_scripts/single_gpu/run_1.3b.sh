#!/usr/bin/env bash
# OPT-1.3b on one GPU: the place to start. LoRA of rank 128 in the decoder, embeddings, norms and biases
# train too; 8 accumulated micro-batches of 16 make one step of 128. A data-centre card is comfortable; on a
# small card lower --per_device_train_batch_size, raise --gradient_accumulation_steps by the same factor,
# add --gradient_checkpointing.
# --learning_rate is the rate of everything but the LoRA weights, --lora_learning_rate that of the LoRA
# weights.
#
# usage: bash training_scripts/single_gpu/run_1.3b.sh [OUTPUT] [ZERO_STAGE] [further main.py arguments]
set -euo pipefail
OUTPUT=./output_1.3b ZERO_STAGE=0
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

deepspeed --num_gpus 1 "$ROOT/main.py" \
    --model_name_or_path facebook/opt-1.3b \
    --data_path Dahoas/rm-static \
    --data_split 2,4,4 \
    --max_seq_len 512 \
    --per_device_train_batch_size 16 \
    --per_device_eval_batch_size 16 \
    --learning_rate 1e-3 \
    --lora_learning_rate 5e-4 \
    --weight_decay 0. \
    --num_train_epochs 1 \
    --gradient_accumulation_steps 8 \
    --lr_scheduler_type cosine \
    --num_warmup_steps 0 \
    --seed 1234 \
    --lora_dim 128 \
    --lora_module_name decoder.layers. \
    --enable_tensorboard \
    --tensorboard_path "$OUTPUT" \
    --zero_stage "$ZERO_STAGE" \
    --deepspeed \
    --output_dir "$OUTPUT" \
    "$@" 2>&1 | tee -i ${APPEND:+-a} "$OUTPUT/training.log"
