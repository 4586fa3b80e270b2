# A model of 0.44M parameters on the paths alone (--data task:countdown:traces=path), in two parts:
# 800 of 1,400 steps (the run was ended there), then 250 with a falling rate.
ponder train --data task:countdown:traces=path --out runs/countdown/first --context 96 \
  --n-layer 4 --n-head 3 --n-kv-head 3 --head-dim 32 --n-embd 96 --n-inner 256 \
  --batch-size 64 --lr 2e-3 --full-traces 1 --eval-every 400 --save-every 400 --samples 3 \
  --log-every 20 --steps 1400
ponder train --init runs/countdown/first --data task:countdown:traces=path \
  --out runs/countdown/model2 --context 96 --batch-size 64 --lr 2e-3 --full-traces 1 --steps 250 \
  --decay 1 --warmup 5 --eval-every 0 --save-every 0 --samples 3 --log-every 20

# A verifier of its solutions, by the solver's word on every step.
ponder sweep --model runs/countdown/model2 --task countdown:traces=path --split train \
  --out runs/countdown/pool --samples 8 --budgets --problems 1500 --precision fp32 --seed 1
ponder train --verifier process --data samples:runs/countdown/pool --init runs/countdown/model2 \
  --context 96 --batch-size 64 --steps 400 --lr 1e-3 --matrix-lr 0.01 --eval-every 200 \
  --save-every 0 --log-every 20 --out runs/countdown/verifier

# Samples and searches; the second command judges by the model's own confidence.
ponder sweep --model runs/countdown/model2 --task countdown:traces=path \
  --out runs/countdown/sweep --samples 1 2 4 8 16 32 64 --budgets --problems 200 --precision fp32 \
  --verifier runs/countdown/verifier --search beam dvts rebase mcts --lines 4 16 --width 4 --step 12
