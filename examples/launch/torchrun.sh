#!/usr/bin/env bash
# Train an MoE folder on the GPUs of one machine, each holding its part of the model.
#
#   examples/launch/torchrun.sh ./moe ./trained
#
# GPUS (all of the machine), EXPERT_PARALLEL (1) and further options of `train` may be given:
#
#   GPUS=8 EXPERT_PARALLEL=8 examples/launch/torchrun.sh ./moe ./trained --activation-checkpointing
#
# Killed? The same command goes on. Does it fit? python -m fusion_upcycle inspect ./moe \
#   --gpus 8 --memory 80GB
set -euo pipefail

model=${1:?folder of the MoE}
output=${2:?folder to make}
shift 2
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}

exec torchrun --nproc-per-node "$gpus" -m fusion_upcycle train "$model" "$output" \
    --devices "$gpus" --strategy fsdp --expert-parallel "${EXPERT_PARALLEL:-1}" \
    --precision bf16-mixed "$@"
