#!/usr/bin/env bash
# Starts the recipe with torchrun, from the repository's root:
#   recipes/ddp_fsdp_torchrun.sh strategy=fsdp
#   PROCESSES=8 recipes/ddp_fsdp_torchrun.sh strategy=fsdp trainer.accelerator=gpu
# On several nodes, type the same line on each; HEAD is a port of one of them:
#   NODES=2 PROCESSES=8 HEAD=node1:29500 recipes/ddp_fsdp_torchrun.sh trainer.accelerator=gpu
set -euo pipefail
NODES=${NODES:-1} PROCESSES=${PROCESSES:-2}

exec torchrun --nnodes "$NODES" --nproc-per-node "$PROCESSES" \
  --rdzv-backend c10d --rdzv-endpoint "${HEAD:-localhost:0}" --rdzv-id ddp_fsdp \
  -m recipes.ddp_fsdp trainer.num_nodes="$NODES" trainer.devices="$PROCESSES" "$@"
