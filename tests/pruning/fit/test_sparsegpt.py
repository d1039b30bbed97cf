"""Optimal Brain Surgeon, column by column: against its formula, and against what does not update."""

import pytest
import torch

from hf_efficient.pruning.choose.sparsity import keep_n_of_m, lowest, lowest_in_rows
from hf_efficient.pruning.fit.sparsegpt import choose_count, choose_given, choose_n_of_m, inverse_factor, prune_matrix
from tests.helpers import assert_close


def naive_obs(weight: torch.Tensor, hessian: torch.Tensor, removed: torch.Tensor) -> torch.Tensor:
    """Row by row and weight by weight: the inverse of what is left of H is made anew for every column."""
    weight = weight.clone()
    for row, gone in zip(weight, removed, strict=True):
        for j in range(len(row)):
            if gone[j]:
                inverse = torch.linalg.inv(hessian[j:, j:])
                row[j:] -= row[j] / inverse[0, 0] * inverse[:, 0]
                row[j] = 0
    return weight


def correlated(tokens: int, inputs: int) -> torch.Tensor:
    torch.manual_seed(1)
    return (
        torch.randn(tokens, inputs // 4) @ torch.randn(inputs // 4, inputs) + 0.3 * torch.randn(tokens, inputs)
    ).double()


@pytest.mark.parametrize("block", [1, 5, 128])
def test_the_update_is_that_of_optimal_brain_surgeon(block):
    rows, weight = correlated(60, 12), torch.randn(7, 12, dtype=torch.float64)
    gram = rows.T @ rows
    hessian = gram + 0.01 * gram.diagonal().mean() * torch.eye(12).double()
    removed = torch.rand(7, 12) < 0.5
    found = prune_matrix(weight, gram, choose_given(removed), width=block, block=block)
    assert_close(found, naive_obs(weight, hessian, removed), 1e-9)
    assert torch.equal(found == 0, removed)
    upper = inverse_factor(gram)
    assert_close(upper.T @ upper @ hessian, torch.eye(12), 1e-9)


def test_columns_one_by_one_choose_the_least_error():
    """With one column to a block, every choice is that of the smallest w^2 / [H^-1]_jj among the rows."""
    rows, weight = correlated(60, 12), torch.randn(8, 12, dtype=torch.float64)
    gram = rows.T @ rows
    hessian = gram + 0.01 * gram.diagonal().mean() * torch.eye(12).double()
    found = prune_matrix(weight, gram, choose_count(48, weight.shape), width=1, block=1)
    expected, removed = weight.clone(), torch.zeros(8, 12, dtype=torch.bool)
    for j in range(12):
        inverse = torch.linalg.inv(hessian[j:, j:])
        removed[expected[:, j].square().argsort()[:4], j] = True
        for row in removed[:, j].nonzero().flatten():
            expected[row, j:] -= expected[row, j] / inverse[0, 0] * inverse[:, 0]
    assert_close(found, expected.masked_fill(removed, 0), 1e-9)
    assert torch.equal(found == 0, removed)


@pytest.mark.parametrize("structure", [None, (2, 4)])
def test_sparsegpt_errs_less_than_wanda_and_magnitude(structure):
    rows, weight = correlated(500, 64), torch.randn(32, 64, dtype=torch.float64)
    rows *= torch.linspace(0.1, 3, 64)
    gram = rows.T @ rows
    masks = [weight.abs(), weight.abs() * gram.diagonal().sqrt()]
    if structure is None:
        magnitude, wanda = lowest(masks[0].flatten(), 1024).view_as(weight), lowest_in_rows(masks[1], 32)
        ours = prune_matrix(weight, gram, choose_count(1024, weight.shape))
    else:
        magnitude, wanda = (keep_n_of_m(mask, *structure) for mask in masks)
        ours = prune_matrix(weight, gram, choose_n_of_m(*structure), width=4)
    updated = prune_matrix(weight, gram, choose_given(wanda))

    def error(pruned):
        return float((rows @ (pruned - weight).T).square().sum() / (rows @ weight.T).square().sum())

    assert (ours == 0).sum() == 1024
    by_wanda, by_magnitude = error(weight.masked_fill(wanda, 0)), error(weight.masked_fill(magnitude, 0))
    assert error(ours) < error(updated) < 0.8 * by_wanda < 0.8 * by_magnitude
