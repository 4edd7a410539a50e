"""Rollouts: prompts -> completions -> rewards. Token ids go in and come out; nothing is tokenised twice."""
