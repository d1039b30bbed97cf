"""`python -m hf_efficient COMMAND`, and `accelerate launch -m hf_efficient COMMAND` on several processes."""

from .cli import main

main()
