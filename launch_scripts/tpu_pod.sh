#!/usr/bin/env bash
# Trains on all hosts of a Cloud TPU pod slice; all arguments go to nqf.train:
#   TPU=my-pod ZONE=us-central2-b launch_scripts/tpu_pod.sh --config configs/quickstart.yaml --run /mnt/shared/quickstart
# nqf has to be installed on every host (pip install 'nqf[tpu]'), FOLDER (default: nqf) has to hold the files that the
# arguments name, and the run folder has to be on storage that all hosts mount.
# PYTHON chooses the interpreter on the hosts; DRY_RUN=1 prints the command instead.
set -euo pipefail

printf -v remote '%q ' "${PYTHON:-python}" -m nqf.train --training.distributed "$@"
printf -v folder '%q' "${FOLDER:-nqf}"
command=(
  gcloud compute tpus tpu-vm ssh "${TPU:?name of the TPU slice}" --zone "${ZONE:?its zone}" --worker=all
  --command "cd $folder && $remote"
)
if [[ -n "${DRY_RUN:-}" ]]; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
