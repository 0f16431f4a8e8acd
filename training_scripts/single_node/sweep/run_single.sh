#!/usr/bin/env bash
# One run of the sweep: OPT-1.3b for one epoch on every GPU of one node. run_step1_sweep.sh adds the choices
# under test (--offload, --lora_dim …) as further arguments; it can be started alone with the same ones,
# e.g. to repeat a failed run.
# Both rates are stated: --lora_learning_rate counts where a --lora_dim is given.
#
# usage: bash training_scripts/single_node/sweep/run_single.sh \
#        [OUTPUT] [ZERO_STAGE] [further main.py arguments]
set -euo pipefail
OUTPUT=./output_sweep_single ZERO_STAGE=2
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"

deepspeed "$ROOT/main.py" \
    --model_name_or_path facebook/opt-1.3b \
    --data_path Dahoas/rm-static \
    --data_split 2,4,4 \
    --max_seq_len 512 \
    --per_device_train_batch_size 8 \
    --per_device_eval_batch_size 8 \
    --learning_rate 9.65e-6 \
    --lora_learning_rate 5e-4 \
    --weight_decay 0. \
    --num_train_epochs 1 \
    --gradient_accumulation_steps 1 \
    --lr_scheduler_type cosine \
    --num_warmup_steps 0 \
    --seed 1234 \
    --zero_stage "$ZERO_STAGE" \
    --deepspeed \
    --output_dir "$OUTPUT" \
    "$@" 2>&1 | tee -i ${APPEND:+-a} "$OUTPUT/training.log"
