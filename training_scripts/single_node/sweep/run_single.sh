#!/usr/bin/env bash
# One run of the sweep: OPT-1.3b on every GPU of one node. OFFLOAD and LORA are true or false and say whether optimizer
# and parameters lie in host memory, and whether LoRA weights alone are trained; both are false if left out.
# 16 epochs as in the original; --num_train_epochs 1 after the others is enough to see what fits and how fast it is.
# LoRA has its own rate, --lora_learning_rate; --learning_rate counts there as soon as --only_optimize_lora is taken
# away.
#
# usage: bash training_scripts/single_node/sweep/run_single.sh \
#        ZERO_STAGE [OFFLOAD] [LORA] [OUTPUT] [further main.py arguments]
#    or: bash training_scripts/single_node/sweep/run_single.sh \
#        [OUTPUT] [ZERO_STAGE] [further main.py arguments]
set -euo pipefail
OUTPUT=./output_sweep_single ZERO_STAGE=2 OFFLOAD=false LORA=false
if [[ ${1:-} =~ ^[0-9]$ ]]; then
    for name in ZERO_STAGE OFFLOAD LORA OUTPUT; do
        if [[ $# -eq 0 || $1 == -* ]]; then break; fi
        printf -v "$name" %s "$1"
        shift
    done
    if ! [[ $OFFLOAD =~ ^(true|false)$ && $LORA =~ ^(true|false)$ ]]; then
        echo "OFFLOAD and LORA must be true or false, not $OFFLOAD and $LORA" >&2
        exit 2
    fi
    set -- "$OUTPUT" "$ZERO_STAGE" "$@"
fi
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
CHOICES=()
if [[ $OFFLOAD == true ]]; then CHOICES+=(--offload); fi
if [[ $LORA == true ]]; then
    CHOICES+=(--learning_rate 1e-3 --lora_learning_rate 1e-3 --weight_decay 0.1)
    CHOICES+=(--lora_dim 128 --lora_module_name decoder.layers. --only_optimize_lora)
else
    CHOICES+=(--learning_rate 9.65e-6 --weight_decay 0.)
fi

deepspeed "$ROOT/main.py" \
    --model_name_or_path facebook/opt-1.3b \
    --data_path Dahoas/rm-static Dahoas/full-hh-rlhf \
        Dahoas/synthetic-instruct-gptj-pairwise yitingxie/rlhf-reward-datasets \
    --data_split 2,4,4 \
    --max_seq_len 512 \
    --per_device_train_batch_size 8 \
    --per_device_eval_batch_size 8 \
    --num_train_epochs 16 \
    --gradient_accumulation_steps 1 \
    --lr_scheduler_type cosine \
    --num_warmup_steps 0 \
    --seed 1234 \
    --zero_stage "$ZERO_STAGE" \
    "${CHOICES[@]}" \
    --deepspeed \
    --output_dir "$OUTPUT" \
    "$@" 2>&1 | tee -i ${APPEND:+-a} "$OUTPUT/training.log"
