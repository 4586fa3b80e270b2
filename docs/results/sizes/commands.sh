# train NAME STEPS SHAPE…, then its sweep; 0.4M and 1.9M see 400 steps, 0.1M 400 to 1,500
run() {
  name=$1 steps=$2; shift 2
  ponder train --data task:multiply:digits=2-2 --context 40 --batch-size 64 --lr 2e-3 \
    --eval-every 0 --save-every 0 --samples 2 --log-every 20 --steps $steps "$@" \
    --out runs/sizes/models/$name
  ponder sweep --model runs/sizes/models/$name --task multiply:digits=2-2 \
    --out runs/sizes/$name --samples 1 2 4 8 16 --budgets 0 --problems 300 --precision fp32
}
small="--n-layer 3 --n-head 3 --n-kv-head 3 --head-dim 16 --n-embd 48 --n-inner 128"
run 0.1M 400 $small
run 0.1M-700 700 $small
run 0.1M-1000 1000 $small
run 0.1M-1500 1500 $small
run 0.4M 400 --n-layer 4 --n-head 3 --n-kv-head 3 --head-dim 32 --n-embd 96 --n-inner 256
run 1.9M 400 --n-layer 6 --n-head 5 --n-kv-head 5 --head-dim 32 --n-embd 160 --n-inner 448
at=runs/sizes
ponder report $at/0.1M $at/0.4M $at/1.9M --out $at/frontier
ponder report $at/0.1M $at/0.1M-700 $at/0.1M-1000 $at/0.1M-1500 $at/0.4M $at/1.9M --out $at/exchange
