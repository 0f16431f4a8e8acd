#!/usr/bin/env bash
# Which choice fits and is fastest on this node, and which learns best? OPT-1.3b is trained with each combination of
# ZeRO stage, optimizer and parameters in host memory or not, and LoRA or all weights; see run_single.sh for the rest.
# That is 8 times 16 epochs, as in the original: for fit and speed alone add --num_train_epochs 1.
# Every run has its own folder and training.log below OUTPUT. A failed one (out of memory, say) does not
# stop the others; OUTPUT/sweep.log tells at the end how each of them went, and the exit status is 1 if any
# failed.
#
# usage: bash training_scripts/single_node/sweep/run_step1_sweep.sh \
#        [OUTPUT] ["ZERO_STAGES"] [further main.py arguments]
set -euo pipefail
OUTPUT=./output_sweep ZERO_STAGE="2 3"
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
trap 'exit 130' INT # Ctrl-C ends the sweep, not only the run it hits

SINGLE=$ROOT/training_scripts/single_node/sweep/run_single.sh
summary=() failures=0
for stage in $ZERO_STAGE; do
    for offload in false true; do
        for lora in false true; do
            name=zero${stage}_offload_${offload}_lora_${lora}
            echo "===== $name"
            status=0
            bash "$SINGLE" "$stage" "$offload" "$lora" "$OUTPUT/$name" "$@" || status=$?
            if ((status == 0)); then
                summary+=("$name: done")
            else
                summary+=("$name: FAILED with status $status, see $OUTPUT/$name/training.log")
                failures=$((failures + 1))
            fi
        done
    done
done
printf '%s\n' "${summary[@]}" "${#summary[@]} runs, $failures failed" | tee "$OUTPUT/sweep.log"
((failures == 0))
