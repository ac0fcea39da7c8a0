#!/usr/bin/env bash
# A positive control for attention patches: a model whose attention was flattened must gain from sharpening it, and a
# healthy one must not. Two minutes on two cores.
# Usage: examples/adaptvis_control.sh [OUTPUT FOLDER] [SETS OF QUESTIONS]
set -euo pipefail
out=${1:-out/control}
sets=${2:-250}
mkdir -p "$out"

# 1. Questions about one thing: the row that answers has to look once, and its alpha is what AdaptVis changes.
surgery adaptvis data make -o "$out/one" --questions one --groups "$sets" --seed 1

# 2. The damage: query weights of the text model times 0.3. Every attention logit is 0.3 of what it was.
flat=$(surgery scale llava-scenes --by 0.3 --only '*language_model*q_proj.weight' -o "$out/flat")

# 3. Tune on the validation sets, attach, and ask the held-out questions: plainly, with one alpha, and adaptively.
for model in "$flat" llava-scenes; do
    name=$(basename "$model")
    surgery adaptvis tune "$model" "$out/one/val.jsonl" --alphas 0.5,0.8,1,1.2,1.5,2,3 -o "$out/$name.tune.json"
    patched=$(surgery adaptvis attach "$model" --from "$out/$name.tune.json" -o "$out/$name-patched")
    surgery adaptvis eval "$patched" "$out/one/test.jsonl" --method base,scaling,adapt --batch 32 \
        --from "$out/$name.tune.json" --json > "$out/$name.json"
done

# 4. What came of it. Intervals are 95 %, over items; one training seed and one split stand behind them.
python - "$out"/flat.json "$out"/llava-scenes.json << 'END'
import json
import sys

for path in sys.argv[1:]:
    result = json.load(open(path))
    print(result["model"], "with", result["n"], "held-out questions")
    for name, m in result["methods"].items():
        low, high = m["interval"]
        line = f"  {name:8} {m['accuracy']:.3f} [{low:.3f}, {high:.3f}]"
        if "gain" in m:
            low, high = m["gain"]["interval"]
            line += f"   gain {m['gain']['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
            line += "" if m["gain"]["reliable"] else "   no reliable gain"
        print(line)
END
surgery adaptvis verify "$out/flat-patched"
