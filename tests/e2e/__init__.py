"""What a user does with a cluster, done by a test: README's kubectl lines, the samples, and mistakes.

`kubectl` is the binary that users type; assertions are about API objects, never about logs, unless a log is what was promised.
Each module works in a namespace of its own that enforces the Pod Security Standard `restricted`, and removes it at the end.
"""
