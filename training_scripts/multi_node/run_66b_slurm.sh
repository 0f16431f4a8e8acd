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
# run_66b.sh as a Slurm job that outlives preemption, its time limit and lost nodes: one task per GPU, which finds its
# rank in Slurm's variables.
# Ten minutes before the time limit Slurm sends SIGUSR1, and SIGTERM where it takes the nodes away: the run writes a
# checkpoint and ends with status 75 ("try again"), the job goes back into the queue, and the same command goes on
# from the newest checkpoint. Ten minutes must be enough for a checkpoint; a job preempted without GraceTime, or whose
# node is lost, goes on from the last one of --save_steps. Any other status ends the job, and so does scancel.
# Where the queue, the account or the number of nodes is another, say so to sbatch; its options win over those above.
# OUTPUT must lie on a disk the nodes share; NCCL_SOCKET_IFNAME names the network where a node has several.
#
# usage: sbatch [options of sbatch] training_scripts/multi_node/run_66b_slurm.sh \
#        [OUTPUT] [ZERO_STAGE] [further main.py arguments]
set -euo pipefail
OUTPUT=./output_66b ZERO_STAGE=3
# Slurm runs a copy of this file that lies elsewhere: then the repository is where sbatch was called.
here=$(dirname "${BASH_SOURCE[0]}")
[[ -f $here/run_66b.sh ]] || here=${SLURM_SUBMIT_DIR:-.}/training_scripts/multi_node
if [[ ! -f $here/run_66b.sh ]]; then
    echo "call sbatch in the repository's own folder, not in ${SLURM_SUBMIT_DIR:-$PWD}" >&2
    exit 2
fi
source "$here/../common.sh"

# The signals are meant for the ranks, which get them from Slurm: this shell, srun and tee wait for what those do.
trap '' TERM USR1
status=0
LAUNCHER=srun bash "$here/run_66b.sh" "$OUTPUT" "$ZERO_STAGE" \
    --save_steps 500 --resume_from_checkpoint latest "$@" || status=$?

# A preempted job is put back by Slurm itself; a cancelled one must not come again.
if [[ $status == 75 && $(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T) == RUNNING ]]; then
    echo "status 75: back into the queue, to go on from the newest checkpoint" | tee -a "$OUTPUT/training.log"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
