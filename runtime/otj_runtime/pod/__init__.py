"""The contract of one pod: names, ports, paths, exit codes, the resolved configuration, and the Job that carries it. No torch."""
