# shellcheck shell=bash
# Sourced by every training script, after it has set its own default OUTPUT and ZERO_STAGE.
# Takes both from the script's $1 and $2 where they are given and leaves the further arguments in "$@".
# An argument that begins with "-" is neither a folder nor a stage: `run_x.sh --print_loss` keeps both.

# main.py is found from wherever the script is started; a relative OUTPUT is the caller's.
# shellcheck disable=SC2034 # ROOT is for the scripts
ROOT=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ $# -gt 0 && $1 != -* ]]; then
    OUTPUT=${1:-$OUTPUT}
    shift
fi
if [[ $# -gt 0 && $1 != -* ]]; then
    ZERO_STAGE=${1:-$ZERO_STAGE}
    shift
fi
# A run that goes on continues its log.
# shellcheck disable=SC2034 # for the scripts' `tee`
if [[ " $* " == *" --resume_from_checkpoint"* ]]; then APPEND=yes; else APPEND=; fi
mkdir -p "$OUTPUT"
