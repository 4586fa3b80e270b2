# 0.45M parameters; one core of an AMD EPYC, shared with others
train() {
  ponder train --data task:multiply:digits=3-3,ways=any --context 96 \
    --n-layer 4 --n-head 3 --n-kv-head 3 --head-dim 32 --n-embd 96 --n-inner 256 \
    --batch-size 64 --lr 2e-3 --full-traces 1 --eval-every 0 --save-every 0 --samples 3 \
    --log-every 20 --steps 470 "$@"
}
sweep() {
  ponder sweep --task multiply:digits=3-3,ways=any --budgets --problems 400 --precision fp32 "$@"
}
train --out runs/multiply_any/model
sweep --model runs/multiply_any/model --out runs/multiply_any/sweep --samples 1 2 4 8 16 32 64
python docs/results/multiply_any/errors.py runs/multiply_any/sweep/sweep/samples.sqlite > errors.csv

# seeds.csv: with two other seeds of the training
for seed in 1 2; do
  train --out runs/seeds/any$seed/model --seed $seed
  sweep --model runs/seeds/any$seed/model --out runs/seeds/any$seed/sweep --samples 1 32
done
head -n 1 runs/multiply_any/sweep/report/results.csv > seeds.csv
grep -hE ',(greedy|sampling|self-consistency),(1|32),' \
  runs/multiply_any/sweep/report/results.csv runs/seeds/any?/sweep/report/results.csv >> seeds.csv
