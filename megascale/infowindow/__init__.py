"""Equal-Info Windows (arXiv 2404.03626): text as codes of equally many bits, and back."""
