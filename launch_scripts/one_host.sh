#!/usr/bin/env bash
# Trains on several GPUs of this machine in one process; all arguments go to nqf.train:
#   GPUS=0,1,2,3 launch_scripts/one_host.sh --config configs/quickstart.yaml --training.mesh.fsdp 2
# GPUS chooses the devices (default: all), PYTHON the interpreter; DRY_RUN=1 prints the command instead.
# Batches are split over all devices; training.mesh.fsdp and .tensor split parameters too, where one GPU lacks memory.
set -euo pipefail

command=("${PYTHON:-python}" -m nqf.train "$@")
if [[ -n "${GPUS:-}" ]]; then
  command=(env "CUDA_VISIBLE_DEVICES=$GPUS" "${command[@]}")
fi
if [[ -n "${DRY_RUN:-}" ]]; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
