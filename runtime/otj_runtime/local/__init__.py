"""`otj run`: the pod of a job as processes of this machine.

    job.yaml -> build_job (the operator's own) -> containers -> model, then generator and trainer beside each other
                                                  one shim each, as a container runtime has, so that a container ends as a whole
    metrics.jsonl, /progress -> follow -> live view or plain lines -> summary and result file

What a pod would have and a process has not is replaced once, in `containers`: volumes by folders, devices by CUDA_VISIBLE_DEVICES,
ports by free ones. Nothing else differs, so what runs here runs there.
"""
