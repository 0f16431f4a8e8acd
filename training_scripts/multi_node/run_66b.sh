#!/usr/bin/env bash
# OPT-66b with LoRA on several nodes. Stage 3 splits everything over all GPUs of all nodes: two nodes of
# large cards hold it, more make it faster. HOSTFILE names the machines, one a line ("worker-1 slots=8"),
# all reachable by ssh without a password and with this repository in the same place; OUTPUT should lie on a
# disk they share.
# With --dry_run 64x80 the plan for 64 GPUs of 80 GB is made on this machine alone, without a host file; a folder with
# config.json and tokenizer is model enough for it.
# --lora_learning_rate is for the LoRA weights, --learning_rate for embeddings, norms and biases.
# run_66b_slurm.sh runs it within a Slurm job, with LAUNCHER=srun in place of the host file.
#
# usage: [HOSTFILE=/job/hostfile] bash training_scripts/multi_node/run_66b.sh \
#        [OUTPUT] [ZERO_STAGE] [further main.py arguments]
set -euo pipefail
OUTPUT=./output_66b ZERO_STAGE=3
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
HOSTFILE=${HOSTFILE:-/job/hostfile}
# Without the file the launcher would go on with this machine alone, and run out of memory much later.
START=(deepspeed --hostfile "$HOSTFILE")
if [[ " $* " == *" --dry_run"* ]]; then
    START=(python)
elif [[ ${LAUNCHER:-} == srun ]]; then
    # When one rank has ended the others have a minute to end by themselves, and none hangs for ever. (Killed at once
    # they could not end with their own status.)
    START=(srun --kill-on-bad-exit=0 --wait=60 python)
elif [[ ! -f $HOSTFILE ]]; then
    echo "no host file at $HOSTFILE: set HOSTFILE to a file with a line \"name slots=GPUs\" per machine" >&2
    exit 2
fi

"${START[@]}" "$ROOT/main.py" \
    --model_name_or_path facebook/opt-66b \
    --data_path Dahoas/rm-static Dahoas/full-hh-rlhf \
        Dahoas/synthetic-instruct-gptj-pairwise yitingxie/rlhf-reward-datasets \
    --data_split 2,4,4 \
    --max_seq_len 512 \
    --per_device_train_batch_size 4 \
    --per_device_eval_batch_size 4 \
    --learning_rate 1e-4 \
    --lora_learning_rate 5e-4 \
    --weight_decay 0.1 \
    --num_train_epochs 2 \
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
