# 0.45M parameters; one core of an AMD EPYC, shared with others
train() {
  ponder train --data task:multiply:digits=3-3 --context 64 \
    --n-layer 4 --n-head 3 --n-kv-head 3 --head-dim 32 --n-embd 96 --n-inner 256 \
    --batch-size 64 --lr 2e-3 --eval-every 0 --save-every 0 --samples 2 --log-every 20 --steps 600 "$@"
}
sweep() {
  ponder sweep --task multiply:digits=3-3 --budgets --problems 400 --precision fp32 "$@"
}
train --out runs/multiply/model
sweep --model runs/multiply/model --out runs/multiply/sweep --samples 1 2 4 8 16 32

# seeds.csv: with two other seeds of the training
for seed in 1 2; do
  train --out runs/seeds/one$seed/model --seed $seed
  sweep --model runs/seeds/one$seed/model --out runs/seeds/one$seed/sweep --samples 1 32
done
head -n 1 runs/multiply/sweep/report/results.csv > seeds.csv
grep -hE ',(greedy|sampling|self-consistency),(1|32),' \
  runs/multiply/sweep/report/results.csv runs/seeds/one?/sweep/report/results.csv >> seeds.csv
