"""`python -m hf_efficient.cli`."""

from . import main

main()
