#!/bin/bash
# sbatch yamls/launch/slurm.sh: one launcher a node, which starts one rank a GPU. Explained in README.md.
#SBATCH --job-name=tst-1b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=29500
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export NCCL_DEBUG=WARN
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK   # which srun does not take from sbatch since Slurm 22.05
# export NCCL_SOCKET_IFNAME=eth0          # the network that nodes find each other on
# export NCCL_IB_HCA=mlx5                 # the InfiniBand adapters
# export S3_ENDPOINT_URL=https://...      # an S3 server other than AWS
CACHE=/tmp/streaming
TOKENIZER=${TOKENIZER:-$PWD/tokenizer}    # on a file system that all nodes see

# A killed run may have left shared memory and half a shard behind: begin with an empty cache.
srun --ntasks-per-node=1 bash -c "rm -rf $CACHE && mkdir -p $CACHE && cp -r $TOKENIZER $CACHE/tokenizer && \
  python -c 'from streaming.base.util import clean_stale_shared_memory as clean; clean()'"

srun --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c 'composer \
  -n $SLURM_GPUS_ON_NODE --world_size $((SLURM_NNODES * SLURM_GPUS_ON_NODE)) --node_rank $SLURM_NODEID \
  --master_addr $MASTER_ADDR --master_port $MASTER_PORT \
  -c llmfoundry train yamls/launch/train.yaml'
