# 0.45M parameters; one core of an AMD EPYC: 2 minutes each
ponder train --data task:multiply:digits=3-3,ways=any --out runs/multiply_any/model --context 96 \
  --n-layer 4 --n-head 3 --n-kv-head 3 --head-dim 32 --n-embd 96 --n-inner 256 \
  --batch-size 64 --lr 2e-3 --full-traces 1 --eval-every 0 --save-every 0 --samples 3 --log-every 20 --steps 470
ponder sweep --model runs/multiply_any/model --task multiply:digits=3-3,ways=any \
  --out runs/multiply_any/sweep --samples 1 2 4 8 16 32 64 --budgets --problems 400 --precision fp32
python docs/results/multiply_any/errors.py runs/multiply_any/sweep/sweep/samples.sqlite > errors.csv
