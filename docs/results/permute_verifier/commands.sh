# README's chain: 0.45M parameters, two cores of an AMD EPYC with AVX-512 and bf16: 4.5 minutes, half a
# minute, 1.5 and 2. Budgets are the task's own, the ends of its words.
ponder train demo --data task:permute:length=2-6 --context 96 --out runs/permute
ponder sweep --model runs/permute --task permute:length=2-6 --split train --out runs/pool
ponder train --verifier value --data samples:runs/pool --init runs/permute --context 96 \
  --out runs/verifier
ponder sweep --model runs/permute --task permute:length=2-6 --verifier runs/verifier \
  --search beam dvts rebase --lines 4 16 --out runs/searched
