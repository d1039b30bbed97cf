"""A cached teacher of a tiny case.

torchrun --nproc_per_node 2 -m tests.distillation.caching FOLDER          # both write one cache
"""

import sys

import datasets
import torch
from accelerate import PartialState

from hf_efficient.distillation.cache.write import cache_teacher
from hf_efficient.training.ranks import leave_processes

from .tiny import collate, examples, make_pair


def rows_of(case, count=16, seed=0):
    return datasets.Dataset.from_list(
        [{k: v.numpy() if torch.is_tensor(v) else v for k, v in row.items()} for row in examples(case, count, seed)]
    )


def collate_rows(rows):
    """As the tests' collator, from the lists of a `Dataset`."""
    names = {"pixel_values": torch.float64}
    return collate([{k: torch.tensor(v, dtype=names[k]) if k in names else v for k, v in row.items()} for row in rows])


def make_cache(case, folder, teacher, **options):
    parts = [rows_of(case), rows_of(case, 11, seed=1)]
    return cache_teacher(teacher, parts, folder, data_collator=collate_rows, **{"shard_size": 10} | options)


if __name__ == "__main__":
    processes = PartialState(cpu=True)
    assert processes.num_processes == 2
    make_cache("bert", sys.argv[1], make_pair("bert")[1])
    leave_processes(processes)
