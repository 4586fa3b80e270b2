# A model of 0.45M parameters on the paths alone, the rate falling over the last 250 steps; one core of
# an AMD EPYC with AVX-512 and bf16, shared with other work, here and below: 4.5 minutes.
ponder train --data task:countdown:traces=path --out runs/countdown/model --context 96 \
  --n-layer 4 --n-head 3 --n-kv-head 3 --head-dim 32 --n-embd 96 --n-inner 256 \
  --batch-size 64 --lr 2e-3 --full-traces 1 --eval-every 350 --save-every 350 --samples 3 \
  --log-every 20 --steps 1050 --decay 0.238

# A verifier of its solutions, by the solver's word on every step: the samples take 18 minutes, the
# training 45 on half a core.
pool() {
  ponder sweep --model runs/countdown/model --task countdown:traces=path --split train --out $1 \
    --samples 2 --budgets --problems $2 --precision fp32 --seed $3
}
pool runs/countdown/pool3 30000 3
pool runs/countdown/pool5 60000 5
ponder train --verifier process --data samples:runs/countdown/pool3 samples:runs/countdown/pool5 \
  --weights 1 2 --init runs/countdown/model --context 96 --batch-size 64 --steps 6000 --lr 2e-3 \
  --matrix-lr 0.02 --eval-every 1000 --save-every 1000 --log-every 40 --out runs/countdown/verifier

# Samples and searches, by the model's own confidence and then by the verifier: 3 minutes and 9.
sweep="ponder sweep --model runs/countdown/model --task countdown:traces=path --budgets \
  --out runs/countdown/sweep --samples 1 2 4 8 16 32 64 --problems 400 --precision fp32 \
  --search beam dvts rebase mcts --lines 4 16 --width 4 --step task"
$sweep
$sweep --resume --verifier runs/countdown/verifier

# verifiers.csv: this one and two that learned less, each on the same 64 samples of the same problems.
for labels in process value; do
  ponder train --verifier $labels --data samples:runs/countdown/pool3 --init runs/countdown/model \
    --context 96 --batch-size 64 --steps 700 --lr 2e-3 --matrix-lr 0.02 --eval-every 0 --save-every 0 \
    --log-every 40 --out runs/countdown/$labels
  ponder sweep --model runs/countdown/model --task countdown:traces=path --budgets --samples 16 64 \
    --problems 400 --precision fp32 --verifier runs/countdown/$labels --out runs/countdown/judged/$labels
done
python docs/results/countdown/wrong.py runs/countdown/sweep/sweep/samples.sqlite > wrong.csv
