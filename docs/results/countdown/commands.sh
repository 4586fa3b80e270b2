# A model of 0.44M parameters on the paths alone, in two parts: 800 of 1,400 steps (the run was
# ended there; runs/countdown/first is its folder), then 250 with a falling rate.
ponder train --data task:countdown:traces=path --out runs/countdown/first --context 96 \
  --n-layer 4 --n-head 3 --n-kv-head 3 --head-dim 32 --n-embd 96 --n-inner 256 \
  --batch-size 64 --lr 2e-3 --full-traces 1 --eval-every 400 --save-every 400 --samples 3 \
  --log-every 20 --steps 1400
ponder train --init runs/countdown/first --data task:countdown:traces=path \
  --out runs/countdown/model2 --context 96 --batch-size 64 --lr 2e-3 --full-traces 1 --steps 250 \
  --decay 1 --warmup 5 --eval-every 0 --save-every 0 --samples 3 --log-every 20

# Two verifiers of its solutions: by the solver's word on every step, by what became of the whole.
ponder sweep --model runs/countdown/model2 --task countdown:traces=path --split train \
  --out runs/countdown/pool --samples 8 --budgets --problems 1500 --precision fp32 --seed 1
ponder train --verifier process --data samples:runs/countdown/pool --init runs/countdown/model2 \
  --context 96 --batch-size 64 --steps 400 --lr 1e-3 --matrix-lr 0.01 --eval-every 200 \
  --save-every 0 --log-every 20 --out runs/countdown/verifier
ponder sweep --model runs/countdown/model2 --task countdown:traces=path --split train \
  --out runs/countdown/pool2 --samples 4 --budgets --problems 4500 --precision fp32 --seed 2
ponder train --verifier value --data samples:runs/countdown/pool2 --init runs/countdown/model2 \
  --context 96 --batch-size 64 --steps 700 --lr 1e-3 --matrix-lr 0.01 --eval-every 350 \
  --save-every 350 --log-every 20 --out runs/countdown/verifier2

# Samples and searches. With the first verifier as the judge (ended after beam and dvts), then by
# the model's own confidence, then the samples scored by the second verifier.
sweep="ponder sweep --model runs/countdown/model2 --task countdown:traces=path --budgets \
  --out runs/countdown/sweep --samples 1 2 4 8 16 32 64 --problems 200 --precision fp32 \
  --search beam dvts rebase mcts --lines 4 16 --width 4 --step 12"
$sweep --verifier runs/countdown/verifier
$sweep --resume
$sweep --resume --verifier runs/countdown/verifier2
