"""How the policy gets from the training ranks into the generator, and how that is proven.

    training ranks --write--> mailbox (shared memory) --vLLM's weight transfer--> generator
    rank 0 --HTTP on loopback--> pause, update, resume;  afterwards a probe is scored on both sides

`sync.WeightSync` is the way in. Only `vllm_plugin` needs vLLM; only the trainer's side needs transformers models.
"""
