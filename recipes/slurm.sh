#!/usr/bin/env bash
# Trains, or infers, on several machines under Slurm. What follows the file's name is odtk's command:
#
#   sbatch --nodes 2 --gpus-per-node 8 recipes/slurm.sh train model.pth --annotations train.json --images train/ --batch 128
#
# The files and odtk's environment (activate it before sbatch) lie on storage that all nodes see. The job is queued again
# when it is preempted, loses a node, or nears its time limit, and goes on from model.pth; see docs/machines.md.
#SBATCH --job-name=odtk
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:USR1@120
set -euo pipefail

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110  # of the 120 seconds above, until torchrun kills odtk; else 30
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export FIRST_NODE=${nodes[0]} RDZV_PORT=$((20000 + SLURM_JOB_ID % 20000))

# odtk saves on SIGTERM. It goes to the step's processes: an srun that gets it kills them.
again() {
  scancel --signal=TERM "$SLURM_JOB_ID"
  wait "$step" || true
  scontrol requeue "$SLURM_JOB_ID"
  exit 143
}
trap again USR1

# One torchrun on each node, with a process for each of its GPUs, or one on its CPU.
srun bash -c 'exec torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
  --rdzv-backend c10d --rdzv-endpoint "$FIRST_NODE:$RDZV_PORT" --rdzv-id "$SLURM_JOB_ID" \
  --rdzv-conf join_timeout=300 --max-restarts 3 -m odtk "$@"' odtk "$@" &
step=$!
wait "$step" && exit
failed=$?
# A lost node may end the others before Slurm sees it. What fails at once, such as a wrong flag, is not tried again.
if ((SECONDS > ${RETRY_AFTER:-300} && ${SLURM_RESTART_COUNT:-0} < 5)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$failed"
