#!/usr/bin/env bash
# mGPT (1.3b; formerly sberbank-ai/mGPT), all weights, on Japanese questions and answers, on every GPU of
# one node (8 of them: 64 samples a step). This data has one answer and no rejected one, so it serves step 1
# alone and all of it goes there: split 10,0,0. The vocabulary is large, and so are the logits: on small
# cards lower --per_device_train_batch_size.
#
# usage: bash training_scripts/other_language/run_japanese.sh \
#        [OUTPUT] [ZERO_STAGE] [further main.py arguments]
set -euo pipefail
OUTPUT=./output_japanese ZERO_STAGE=2
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

deepspeed "$ROOT/main.py" \
    --model_name_or_path ai-forever/mGPT \
    --data_path mkqa-Japanese Cohere/miracl-ja-queries-22-12 lmqg/qg_jaquad lmqg/qag_jaquad \
    --data_split 10,0,0 \
    --max_seq_len 512 \
    --per_device_train_batch_size 8 \
    --per_device_eval_batch_size 8 \
    --learning_rate 9.65e-6 \
    --weight_decay 0. \
    --num_train_epochs 16 \
    --gradient_accumulation_steps 1 \
    --lr_scheduler_type cosine \
    --num_warmup_steps 0 \
    --seed 1234 \
    --zero_stage "$ZERO_STAGE" \
    --deepspeed \
    --output_dir "$OUTPUT" \
    "$@" 2>&1 | tee -i ${APPEND:+-a} "$OUTPUT/training.log"
