# 0.45M parameters; one core of an AMD EPYC, shared with other work
ponder train --data task:countdown:traces=path --retries 0.5 --out runs/retries/model --context 256 \
  --n-layer 4 --n-head 3 --n-kv-head 3 --head-dim 32 --n-embd 96 --n-inner 256 --batch-size 64 \
  --lr 2e-3 --full-traces 1 --eval-every 400 --save-every 400 --samples 3 --log-every 20 --steps 2000
ponder sweep --model runs/retries/model --task countdown:traces=path --out runs/retries/sweep \
  --samples 1 2 4 8 16 --budgets 0 30 60 90 120 180 --extend 1 2 4 --search revise --lines 2 4 \
  --problems 300 --precision fp32
python docs/results/retries/noticed.py runs/retries/sweep/sweep/samples.sqlite > noticed.csv
