"""Single weights become zero: unstructured, or n of every m consecutive inputs.

    sparse = prune_weights(anatomy, PruningConfig(ratio=0.5, granularity="weight", importance="obs"), batches)
    count_zeros(sparse)                                                         # (zeros, all) of the linears

The result has the class, the config and the size of the given model. Dense kernels multiply zeros like any number, so
nothing gets faster by itself; on a CUDA GPU each 2:4 weight can be handed to `torch.sparse.to_sparse_semi_structured`.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..errors import ConfigError, DataError
from ..models.anatomy import Anatomy
from ..models.rebuild import rebuild
from .choose.sparsity import Masks, check_structure, choose_masks
from .config import PruningConfig
from .cut.linears import Linear, find_linears, matrix
from .fit.sparsegpt import sparsegpt, update_kept
from .methods import WEIGHT_IMPORTANCES
from .score.handing import Batch


def prune_weights(anatomy: Anatomy, config: PruningConfig, batches: Sequence[Batch]) -> PreTrainedModel:
    """A copy of the model in which the fraction `config.weight_ratio` of the linears' weights is zero.

    Parameters:
        anatomy: of a stock or efficient model; it stays as it is.
        config: with `"weight"` in its granularity. `steps` rescore the already pruned model.
        batches: of model inputs. With `reconstruct` they also serve to update the weights that stay.

    Raises:
        ConfigError: a matrix does not consist of whole groups of m inputs.
        DataError: the importance needs batches and there are none; scores or inputs are not finite.
    """
    check_data(config, batches)
    check_structure(anatomy, config)
    sparse = rebuild(anatomy.model, anatomy.config)
    linears = find_linears(anatomy)  # those of the copy have the same names
    for step in range(1, config.steps + 1):
        ratio = 1 - (1 - config.weight_ratio) ** (step / config.steps)
        if config.importance == "obs":
            sparsegpt(sparse, linears, batches, ratio, config.structure)
            continue
        masks = _masks(sparse, linears, config, batches, ratio)
        if config.reconstruct and batches:
            update_kept(sparse, linears, batches, masks)
        else:
            for linear, mask in masks.items():
                weight = matrix(sparse, linear)
                weight.masked_fill_(mask.to(weight.device), 0)
    return sparse


def check_data(config: PruningConfig, batches: Sequence[Batch]) -> None:
    """Refuse to score without data what can only be scored with it."""
    check_learned(config)
    if WEIGHT_IMPORTANCES[config.importance].needs_data and not batches:
        raise DataError(
            f"importance={config.importance!r} needs calibration batches: prune(model, config, calibration=batches). "
            "Without data use importance='magnitude'."
        )


def check_learned(config: PruningConfig) -> None:
    """Refuse what only training can score."""
    if config.importance == "movement":
        raise ConfigError(
            "importance='movement' is learned while training, and prune does not train. Give a Trainer "
            "PruningCallback(config), or choose importance='fisher'."
        )


def _masks(
    model: PreTrainedModel, linears: Sequence[Linear], config: PruningConfig, batches: Sequence[Batch], ratio: float
) -> Masks:
    scores = WEIGHT_IMPORTANCES[config.importance](model, linears, batches=batches, seed=config.seed)
    for linear, score in scores.items():
        if not torch.isfinite(score).all():
            raise DataError(
                f"The {config.importance} scores of {linear.name} are not finite. Check the calibration data and the "
                "weights for NaN."
            )
        score.masked_fill_(matrix(model, linear).cpu() == 0, -1)  # what is zero already counts, and leaves first
    return choose_masks(
        scores,
        ratio,
        allocation=config.allocation,
        structure=config.structure,
        by_row=config.importance == "activation",
    )
