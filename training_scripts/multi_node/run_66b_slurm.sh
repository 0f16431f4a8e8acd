#!/usr/bin/env bash
#SBATCH --job-name=sft-66b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@600
# OPT-66b with LoRA as a Slurm job that outlives preemption, its time limit and lost nodes. It is run_66b.sh with srun
# in place of a host file: one task per GPU, which finds its rank in Slurm's variables.
# Ten minutes before the time limit Slurm sends SIGUSR1, and SIGTERM where it takes the nodes away: the run writes a
# checkpoint, ends with status 75 ("try again"), the job goes back into the queue, and the same command goes on
# from the newest checkpoint. Ten minutes must be enough for a checkpoint; a job preempted without GraceTime, or whose
# node is lost, goes on from the last one of --save_steps. Any other status ends the job.
# Where the queue, the account or the number of nodes is another, say so to sbatch; its options win over those above.
# OUTPUT must lie on a disk the nodes share; NCCL_SOCKET_IFNAME names the network where a node has several.
#
# usage: sbatch [options of sbatch] training_scripts/multi_node/run_66b_slurm.sh \
#        [OUTPUT] [ZERO_STAGE] [further main.py arguments]
set -euo pipefail
OUTPUT=./output_66b ZERO_STAGE=3
# Slurm runs a copy of this file that lies elsewhere: then the repository is where sbatch was called.
here=$(dirname "${BASH_SOURCE[0]}")
[[ -f $here/../common.sh ]] || here=${SLURM_SUBMIT_DIR:-.}/training_scripts/multi_node
if [[ ! -f $here/../common.sh ]]; then
    echo "call sbatch in the repository's own folder, not in ${SLURM_SUBMIT_DIR:-$PWD}" >&2
    exit 2
fi
source "$here/../common.sh"
# The signals are meant for the ranks: this shell waits for what they do.
trap : TERM USR1

# When one rank has ended, however, the others have a minute: enough to end by themselves, and none hangs for ever.
status=0
srun --kill-on-bad-exit=0 --wait=60 python "$ROOT/main.py" \
    --model_name_or_path facebook/opt-66b \
    --data_path Dahoas/rm-static Dahoas/full-hh-rlhf \
        Dahoas/synthetic-instruct-gptj-pairwise yitingxie/rlhf-reward-datasets \
    --data_split 2,4,4 \
    --max_seq_len 512 \
    --per_device_train_batch_size 4 \
    --per_device_eval_batch_size 4 \
    --learning_rate 1e-4 \
    --lora_learning_rate 5e-4 \
    --weight_decay 0. \
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
    --save_steps 500 \
    --resume_from_checkpoint latest \
    "$@" 2>&1 | (trap '' TERM INT USR1; exec tee -a "$OUTPUT/training.log") || status=${PIPESTATUS[0]}

if [[ $status == 75 ]]; then
    echo "status 75: back into the queue, to go on from the newest checkpoint" | tee -a "$OUTPUT/training.log"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
