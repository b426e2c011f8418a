#!/usr/bin/env bash
# Trains on one GPU of this machine; all arguments go to nqf.train:
#   launch_scripts/one_gpu.sh --config configs/quickstart.yaml
# GPU chooses the device (default 0), PYTHON the interpreter; DRY_RUN=1 prints the command instead.
set -euo pipefail

command=(env "CUDA_VISIBLE_DEVICES=${GPU:-0}" "${PYTHON:-python}" -m nqf.train "$@")
if [[ -n "${DRY_RUN:-}" ]]; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
