# README's chain: 0.45M parameters, two cores of an AMD EPYC with AVX-512 and bf16: 2.5 minutes, half a
# minute, 1.5 and 2. A word of the chain is six tokens with its `;`, hence the budgets.
ponder train demo --data task:permute:length=2-6 --context 96 --out runs/permute
budgets="0 6 12 18 24 30"
ponder sweep --model runs/permute --task permute:length=2-6 --split train --budgets $budgets \
  --out runs/pool
ponder train --verifier value --data samples:runs/pool --init runs/permute --context 96 \
  --out runs/verifier
ponder sweep --model runs/permute --task permute:length=2-6 --verifier runs/verifier \
  --budgets $budgets --search beam dvts rebase --lines 4 16 --out runs/searched
