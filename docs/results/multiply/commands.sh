# 0.44M parameters; one core of an AMD EPYC, shared with others
ponder train --data task:multiply:digits=3-3 --out runs/multiply/model --context 64 \
  --n-layer 4 --n-head 3 --n-kv-head 3 --head-dim 32 --n-embd 96 --n-inner 256 \
  --batch-size 64 --lr 2e-3 --eval-every 0 --save-every 0 --samples 2 --log-every 20 --steps 600
ponder sweep --model runs/multiply/model --task multiply:digits=3-3 --out runs/multiply/sweep \
  --samples 1 2 4 8 16 32 --budgets --problems 400 --precision fp32
