# 0.33M parameters; one core of an AMD EPYC, shared with others
ponder train --data task:permute:length=2-6 --out runs/permute/model --context 96 \
  --n-layer 3 --n-head 3 --n-kv-head 3 --head-dim 32 --n-embd 96 --n-inner 256 \
  --steps 800 --batch-size 32 --lr 2e-3 --eval-every 400 --save-every 400 --samples 2 --log-every 20
ponder sweep --model runs/permute/model --task permute:length=2-6 --out runs/permute/sweep \
  --samples 1 4 --budgets 0 6 12 18 24 30 36 --problems 500 --precision fp32
