#!/usr/bin/env bash
# Graft, sample, measure, explain: the whole path on the shipped digits model. About two minutes on two cores.
# Usage: examples/graft_digits.sh [OUTPUT FOLDER]
set -euo pipefail
out=${1:-out/example}
mkdir -p "$out"

# 1. What would it do? From config and headers alone.
surgery graft --replace attn=hyena dit-digits --layers 50% --dry-run

# 2. Half of the attention becomes Hyena-X: distilled, then finetuned.
graft=$(surgery graft --replace attn=hyena dit-digits --layers 50% --data digits --finetune-steps 200 -o "$out/hyena")

# 3. Look at it and measure it, with the same noise as the original.
for model in dit-digits "$graft"; do
    name=$(basename "$model")
    surgery sample "$model" --n 500 --sampler ddim --steps 20 -o "$out/$name.npz" --grid "$out/$name.png"
    surgery eval images "$out/$name.npz" --ref digits
done

# 4. How did it come to be, and is it still what was written?
surgery log "$graft"
surgery verify "$graft"
