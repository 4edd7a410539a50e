"""What a run starts from: the model's folder, the prompts of a dataset, and the token ids they become."""
