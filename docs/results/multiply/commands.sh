# One way to a product: 0.44M parameters, 600 steps.
ponder train --data task:multiply:digits=3-3 --out runs/multiply/rising/model --context 64 \
  --n-layer 4 --n-head 3 --n-kv-head 3 --head-dim 32 --n-embd 96 --n-inner 256 \
  --batch-size 64 --lr 2e-3 --eval-every 0 --save-every 0 --samples 2 --log-every 20 --steps 600
ponder sweep --model runs/multiply/rising/model --task multiply:digits=3-3 \
  --out runs/multiply/rising --samples 1 2 4 8 16 32 --budgets --problems 400 --precision fp32

# Twelve ways: the same, 1,000 steps.
ponder train --data task:multiply:digits=3-3,order=any --out runs/multiply/any/model --context 64 \
  --n-layer 4 --n-head 3 --n-kv-head 3 --head-dim 32 --n-embd 96 --n-inner 256 \
  --batch-size 64 --lr 2e-3 --eval-every 0 --save-every 0 --samples 2 --log-every 20 --steps 1000
ponder sweep --model runs/multiply/any/model --task multiply:digits=3-3,order=any \
  --out runs/multiply/any --samples 1 2 4 8 16 32 --budgets --problems 400 --precision fp32
