"""Training scripts of the user's own, unmodified, in our pod: `spec.trainer.command`.

    launcher --accelerate launch--> python -m otj_runtime.compat SCRIPT ARGUMENTS      one per training rank
      hook      waits for the script to import what is adapted, so a script that uses none of it pays nothing
        transformers.trainer              report: every Trainer gets the built-in trainer's reporter (metrics.jsonl, progress)
        trl.generation.vllm_generation    trl: weight updates go through the mailbox, requests to the pod's generator
      runner    runs the script as `python SCRIPT` would, and leaves its failure where the launcher looks for it

What is replaced is named in `trl`, with the range of versions that have it in that shape. Everything else is the script's own.
"""
