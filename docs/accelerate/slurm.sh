#!/bin/bash
# sbatch docs/accelerate/slurm.sh: two nodes with eight GPUs. SLURM sends SIGTERM five minutes before the time is over; the run then
# saves a checkpoint, and the same script goes on from it.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
set -euo pipefail
address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun bash -c "accelerate launch --config_file docs/accelerate/two_nodes.yaml \
    --machine_rank \$SLURM_NODEID --main_process_ip $address \
    hub_scripts/train.py --zoo $ZOO --output-dir $OUTPUT --preset resnet18 --resume-from-checkpoint latest"
