"""Training: online methods as subclasses of `transformers.Trainer`."""
