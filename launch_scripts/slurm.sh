#!/usr/bin/env bash
#SBATCH --job-name=nqf
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
# Trains on a SLURM cluster, one process per GPU; all arguments go to nqf.train:
#   sbatch --nodes=4 launch_scripts/slurm.sh --config configs/quickstart.yaml --run /shared/runs/quickstart
# The run folder has to be on storage that all nodes share. Three minutes before its time is up the job is told to
# stop; nqf.train saves, exits with 75, and the job is queued again and continues from there.
# PYTHON chooses the interpreter; DRY_RUN=1 prints the command instead.
set -euo pipefail

command=(srun --kill-on-bad-exit=1 "${PYTHON:-python}" -m nqf.train --training.distributed "$@")
if [[ -n "${DRY_RUN:-}" ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
code=0
"${command[@]}" || code=$?
if [[ $code -eq 75 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
