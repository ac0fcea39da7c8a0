"""What starting costs: CPU seconds of `surgery --help`, against importing torch in the same run."""

import subprocess
import sys

from measure import SURGERY, finish, median, row

HEAVY = ("torch", "numpy", "pydantic", "rich", "yaml", "transformers", "diffusers")


def main() -> None:
    show = median([*SURGERY, "--help"])
    torch = median([sys.executable, "-c", "import torch"], runs=3)
    code = (
        "import sys; sys.argv = ['surgery', '--help']\n"
        "try:\n    from surgery.cli.main import main; main()\n"
        "except SystemExit: pass\n"
        f"print(sum(m in sys.modules for m in {HEAVY}), file=sys.stderr)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr.strip()
    finish(
        "startup",
        [
            row("surgery --help", show.cpu, "CPU s", 0.25, f"import torch takes {torch.cpu:.2f} s in the same run"),
            row("heavy packages imported by --help", int(loaded), "packages", 0),
        ],
    )


if __name__ == "__main__":
    main()
