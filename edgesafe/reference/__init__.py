"""The reference model: a small LLaVA-1.5 and the drawn world it lives in."""
