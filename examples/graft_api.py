"""The same from Python: open, graft, load, run. Usage: python examples/graft_api.py [OUTPUT FOLDER]"""

import sys
from pathlib import Path

import torch

import surgery


def main(out: Path) -> None:
    base = surgery.open("dit-digits")
    print(f"{base.name}: {len(base.tensors)} tensors, digest {base.digest[:12]}")

    # A warm start needs no data: a window that sees every token computes what full attention does.
    result = surgery.apply("graft", base, replace=["attn=swa:w=15"], layers="all", init="copy", out=out / "window")
    model, grafted = surgery.load(base), surgery.load(result.path)

    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t, labels = torch.tensor([10, 900]), torch.tensor([3, 7])
    with torch.no_grad():
        before, after = (m(x, timestep=t, class_labels=labels).sample for m in (model, grafted))
    print(f"largest difference after the graft: {(before - after).abs().max():.1e}")

    spec = surgery.OPERATORS["hyena-x"]
    print(f"hyena-x at the width of DiT-XL/2: {spec.params(dim=1152, heads=16, n_tokens=256):,} parameters")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/example-api"))
