train="ponder train --data task:multiply:digits=2-2 --context 40 --batch-size 64 --lr 2e-3 \
  --eval-every 0 --save-every 0 --samples 2 --log-every 20 --steps 400"
$train --n-layer 3 --n-head 3 --n-kv-head 3 --head-dim 16 --n-embd 48 --n-inner 128 \
  --out runs/sizes/models/0.1M
$train --n-layer 4 --n-head 3 --n-kv-head 3 --head-dim 32 --n-embd 96 --n-inner 256 \
  --out runs/sizes/models/0.4M
$train --n-layer 6 --n-head 5 --n-kv-head 5 --head-dim 32 --n-embd 160 --n-inner 448 \
  --out runs/sizes/models/1.9M
for size in 0.1M 0.4M 1.9M; do
  ponder sweep --model runs/sizes/models/$size --task multiply:digits=2-2 --out runs/sizes/$size \
    --samples 1 2 4 8 16 --budgets 0 --problems 300 --precision fp32
done
ponder report runs/sizes/0.1M runs/sizes/0.4M runs/sizes/1.9M --out runs/sizes/comparison
