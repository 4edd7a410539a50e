"""Online RL training of language models: what the operator, the trainer and the generator share.

Nothing here imports torch at import time, so that the operator can use `otj_runtime.api` and `otj_runtime.pod` from a small image.
"""
