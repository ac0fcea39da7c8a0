"""The files that travel with a Chain-of-Experts checkpoint: they import torch and transformers and nothing of ours."""
