"""Knowledge distillation: a small student learns from a large teacher inside `transformers.Trainer`.

from hf_efficient import DistillationArguments, DistillationTrainer, build_student
"""
