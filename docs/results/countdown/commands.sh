# A model of 0.44M parameters on the paths alone, in two parts: 800 of 1,400 steps (the run was
# ended there; runs/countdown/first is its folder), then 250 with a falling rate.
ponder train --data task:countdown:traces=path --out runs/countdown/first --context 96 \
  --n-layer 4 --n-head 3 --n-kv-head 3 --head-dim 32 --n-embd 96 --n-inner 256 \
  --batch-size 64 --lr 2e-3 --full-traces 1 --eval-every 400 --save-every 400 --samples 3 \
  --log-every 20 --steps 1400
ponder train --init runs/countdown/first --data task:countdown:traces=path \
  --out runs/countdown/model2 --context 96 --batch-size 64 --lr 2e-3 --full-traces 1 --steps 250 \
  --decay 1 --warmup 5 --eval-every 0 --save-every 0 --samples 3 --log-every 20

# A verifier of its solutions, by the solver's word on every step: the samples take 15 minutes on
# one core of an AMD EPYC, the training 22.
pool() {
  ponder sweep --model runs/countdown/model2 --task countdown:traces=path --split train --out $1 \
    --samples 2 --budgets --problems $2 --precision fp32 --seed $3
}
pool runs/countdown/pool3 30000 3
pool runs/countdown/pool5 60000 5
ponder train --verifier process --data samples:runs/countdown/pool3 samples:runs/countdown/pool5 \
  --weights 1 2 --init runs/countdown/model2 --context 96 --batch-size 64 --steps 6000 --lr 2e-3 \
  --matrix-lr 0.02 --eval-every 1000 --save-every 1000 --log-every 40 --out runs/countdown/verifier5

# Samples and searches, by the model's own confidence and then by the verifier: 12 minutes.
sweep="ponder sweep --model runs/countdown/model2 --task countdown:traces=path --budgets \
  --out runs/countdown/sweep --samples 1 2 4 8 16 32 64 --problems 400 --precision fp32 \
  --search beam dvts rebase mcts --lines 4 16 --width 4 --step task"
$sweep
$sweep --resume --verifier runs/countdown/verifier5

# verifiers.csv: this one and three that learned less, each on the first 32 samples of the same
# problems. 1 and 2: --verifier value, 700 and 2,400 steps; 3: process, 4,000 steps of pool3 alone.
