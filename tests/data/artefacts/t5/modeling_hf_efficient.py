"""Loads this checkpoint with `trust_remote_code=True`. It needs the package: pip install hf_efficient"""

import hf_efficient.models


def __getattr__(name):
    return getattr(hf_efficient.models, name)
