"""The Hugging Face side: a checkpoint folder, read once for align, evaluate and export (torch, transformers)."""
