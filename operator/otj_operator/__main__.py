"""`python -m otj_operator`."""

from otj_operator.main import main

main()
