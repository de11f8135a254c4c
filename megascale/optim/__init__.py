"""AdamW, and its learning rate as a pure function of the tokens seen."""
