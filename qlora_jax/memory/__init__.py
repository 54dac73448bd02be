"""How much memory a run takes, known before it begins."""
