"""How the policy gets from the training ranks into the generator, and how that is proven.

    training ranks --write--> mailbox (shared memory) --staged while it decodes, installed between two steps--> generator
    rank 0 --HTTP on loopback--> update, install;  afterwards a probe is scored on both sides, beside decoding

`sync.WeightSync` is the way in. Only `vllm_plugin` and `vllm_install` need vLLM; only the trainer's side needs transformers models.
"""
