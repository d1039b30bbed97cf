"""What else removes parts of a decoder without training, for `llm.py`: each method of others in its own words.

    PEERS["flap"](model, remove=20_000_000, batches=batches)      # so many parameters gone

Those of libraries call them (`pip install --no-deps torch-pruning==1.6.1 optipfair==0.4.2`). The rest is written here,
from their papers:

- `shortgpt`: layers by block influence (Men 2024); `consecutive`: the run of layers over which the states turn
  least (Gromov 2024, "The Unreasonable Ineffectiveness of the Deeper Layers"; PruneMe). As many whole layers leave as
  fit into what is asked for, so never more than of the other methods.
- `flap`: units by how much what they hand on fluctuates, compared over layers as z-scores; their mean becomes a bias
  (An 2024, equations 5 to 8).
- `wanda`: Wanda's score summed over the columns of a unit, as many from every layer. `magnitude`, `random`.
- `llm-pruner`: first-order Taylor of the loss of the texts, over the whole network (Ma 2023), without its training.
- `rotation`: the states projected onto their principal components before each norm (SliceGPT, Ashkboos 2024). Nothing
  is cut here: the projected model computes what the sliced one would. Its parameters are counted as if the
  embeddings stayed tied and the rotations between the blocks cost nothing, which favours it.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_efficient import PruningConfig, PruningPlan, prune
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.models.groups import Group
from hf_efficient.pruning.choose.allocation import allocate_global
from hf_efficient.pruning.cut.surgery import apply_plan
from hf_efficient.pruning.price.costs import Costs, make_costs
from hf_efficient.pruning.score.handing import Batch
from hf_efficient.pruning.score.layers import block_influence

Batches = Sequence[Batch]
Peer = Callable[[PreTrainedModel, int, Batches], tuple[PreTrainedModel, int]]  # the model, and its parameters


def _costs(model: PreTrainedModel) -> Costs:
    return make_costs(Anatomy.of(model), "parameters", 1)


def _counted(model: PreTrainedModel) -> tuple[PreTrainedModel, int]:
    return model, model.num_parameters()


def _ours_without(**settings) -> Peer:
    """A score of others in our cutter: no least squares."""

    def run(model: PreTrainedModel, remove: int, batches: Batches) -> tuple[PreTrainedModel, int]:
        ratio = remove / _costs(model).total
        config = PruningConfig(ratio, metric="parameters", reconstruct=False, **settings)
        if config.importance == "taylor":
            batches = [{**batch, "labels": batch["input_ids"]} for batch in batches]
        return _counted(prune(model, config, batches))

    return run


def shortgpt(model: PreTrainedModel, remove: int, batches: Batches) -> tuple[PreTrainedModel, int]:
    anatomy, costs = Anatomy.of(model), _costs(model)
    scores = block_influence(anatomy, batches)
    gone: set[int] = set()
    for (_, layer), _ in sorted(scores.items(), key=lambda item: item[1]):
        if costs.layers["decoder", layer] <= remove:
            gone.add(layer)
            remove -= costs.layers["decoder", layer]
    return _without(anatomy, gone)


def consecutive(model: PreTrainedModel, remove: int, batches: Batches) -> tuple[PreTrainedModel, int]:
    anatomy, costs = Anatomy.of(model), _costs(model)
    depth = len(anatomy.stacks[0].layers)
    count = int(remove // costs.layers["decoder", 0])
    states = _mean_angles(model, batches, depth, count)
    start = int(states.argmin())
    return _without(anatomy, set(range(start, start + count)))


@torch.no_grad()
def _mean_angles(model: PreTrainedModel, batches: Batches, depth: int, count: int) -> Tensor:
    """Of each run of `count` layers: the angle between the states before and after it, at the last tokens."""
    sums = torch.zeros(depth - count + 1)
    for batch in batches:
        states = model.base_model(**batch, output_hidden_states=True, use_cache=False).hidden_states
        for start in range(len(sums)):
            cosine = torch.cosine_similarity(states[start][:, -1], states[start + count][:, -1], dim=-1)
            sums[start] += cosine.clamp(-1, 1).arccos().sum()
    return sums


def _without(anatomy: Anatomy, gone: set[int]) -> tuple[PreTrainedModel, int]:
    if not gone:
        return _counted(anatomy.model)
    depth = len(anatomy.stacks[0].layers)
    kept = tuple(layer for layer in range(depth) if layer not in gone)
    return _counted(apply_plan(anatomy, PruningPlan(layers={"decoder": kept})))


@torch.no_grad()
def flap(model: PreTrainedModel, remove: int, batches: Batches) -> tuple[PreTrainedModel, int]:
    anatomy, costs = Anatomy.of(model), _costs(model)
    means, variances = _moments(model, anatomy.groups, batches)
    scores = {}
    for group in anatomy.groups:
        weight = _reader(model, group).weight
        column = variances[group] * weight.square().sum(0)  # equation 5
        score = column.view(group.units, -1).mean(1)
        scores[group] = (score - score.mean()) / score.std(correction=0).clamp(min=1e-30)  # equation 6
    lowest = min(float(score.min()) for score in scores.values())
    # Per parameter, as the authors do: a head's score counts for all that it owns.
    scores = {group: (score - lowest) * costs.of(group, 1) for group, score in scores.items()}
    kept = allocate_global(scores, costs.of, remove, 8)
    small = apply_plan(anatomy, PruningPlan(units={group.name: units for group, units in kept.items()}))
    for group, mine in zip(anatomy.groups, Anatomy.of(small).groups, strict=True):
        gone = torch.ones(group.units, dtype=torch.bool)
        gone[list(kept[group])] = False
        dense, linear = _reader(model, group), _reader(small, mine)
        columns = gone.repeat_interleave(dense.in_features // group.units)
        linear.bias = nn.Parameter(dense.weight[:, columns] @ means[group][columns])  # equation 8
    return _counted(small)


def _reader(model: PreTrainedModel, group: Group) -> nn.Linear:
    [member] = group.members
    return model.get_submodule(f"{member.prefix}.{member.output.name}".rpartition(".")[0])


def _moments(
    model: PreTrainedModel, groups: Sequence[Group], batches: Batches
) -> tuple[dict[Group, Tensor], dict[Group, Tensor]]:
    """Mean and variance of each number that the readers of units read."""
    sums = {group: [0.0, 0.0, 0] for group in groups}

    def add(group: Group) -> Callable:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            states = args[0].flatten(0, -2).double()
            total = sums[group]
            total[0], total[1] = total[0] + states.sum(0), total[1] + states.square().sum(0)
            total[2] += len(states)

        return hook

    handles = [_reader(model, group).register_forward_pre_hook(add(group)) for group in groups]
    for batch in batches:
        model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    means = {group: (first / count).float() for group, (first, _, count) in sums.items()}
    return means, {group: (sums[group][1] / sums[group][2]).float() - means[group].square() for group in groups}


class _Projected(nn.Module):
    """A layer whose states are projected before each of its two norms: x <- P x."""

    def __init__(self, layer: nn.Module, bases: tuple[Tensor, Tensor]):
        super().__init__()
        self.layer, self.bases = layer, bases

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        states = self.project(hidden_states, 0)
        attended, _ = self.layer.self_attn(self.layer.input_layernorm(states), *args, **kwargs)
        states = self.project(states + attended, 1)
        return states + self.layer.mlp(self.layer.post_attention_layernorm(states))

    def project(self, states: Tensor, place: int) -> Tensor:
        return states @ self.bases[place] @ self.bases[place].T


@torch.no_grad()
def rotation(model: PreTrainedModel, remove: int, batches: Batches) -> tuple[PreTrainedModel, int]:
    whole, width = model.num_parameters(), model.config.hidden_size
    left = width - round(remove / whole * width)  # every matrix has this width on one side
    small = copy.deepcopy(model)
    states = [small.get_input_embeddings()(batch["input_ids"]) for batch in batches]
    rotary = model.base_model.rotary_emb
    for index, layer in enumerate(small.base_model.layers):
        bases = []
        for place in (0, 1):
            bases.append(_principal(states, left))
            states = [x @ bases[-1] @ bases[-1].T for x in states]
            for number, x in enumerate(states):
                if place == 0:
                    positions = rotary(x, torch.arange(x.shape[1])[None])
                    part, _ = layer.self_attn(
                        layer.input_layernorm(x), position_embeddings=positions, attention_mask=None
                    )
                else:
                    part = layer.mlp(layer.post_attention_layernorm(x))
                states[number] = x + part
        small.base_model.layers[index] = _Projected(layer, (bases[0], bases[1]))
    last = _principal(states, left)
    small.base_model.norm.register_forward_pre_hook(lambda module, args: (args[0] @ last @ last.T,))
    return small, round(whole * left / width)


def _principal(states: Sequence[Tensor], count: int) -> Tensor:
    """The directions `[width, count]` in which the states are largest; each token counts alike."""
    gram = sum((x.flatten(0, 1).double().T @ x.flatten(0, 1).double()) for x in _normed(states))
    return torch.linalg.eigh(gram).eigenvectors[:, -count:].float()


def _normed(states: Sequence[Tensor]) -> list[Tensor]:
    return [x * x.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt() for x in states]


def torch_pruning(model: PreTrainedModel, remove: int, batches: Batches) -> tuple[PreTrainedModel, int]:
    """Neurons by its Taylor importance of the loss, compared over the network; a bisection finds its ratio."""
    import torch_pruning as tp

    source = copy.deepcopy(model).requires_grad_(True)
    for batch in batches:
        source(**batch, labels=batch["input_ids"]).loss.backward()
    low, high, best = 0.0, 1.0, model
    for _ in range(7):
        middle, small = (low + high) / 2, copy.deepcopy(source)
        for mine, theirs in zip(small.parameters(), source.parameters(), strict=True):
            mine.grad = theirs.grad
        stay = [small.lm_head, small.get_input_embeddings()]
        stay += [linear for layer in small.base_model.layers for linear in layer.self_attn.children()]
        stay += [layer.mlp.down_proj for layer in small.base_model.layers]
        pruner = tp.pruner.BasePruner(
            small,
            {"input_ids": torch.arange(1, 9)[None]},
            importance=tp.importance.GroupTaylorImportance(),
            global_pruning=True,
            pruning_ratio=middle,
            ignored_layers=[module for module in stay if isinstance(module, nn.Linear | nn.Embedding)],
            round_to=8,
            output_transform=lambda output: output.logits.sum(),
        )
        pruner.step()
        if model.num_parameters() - small.num_parameters() >= remove:
            high, best = middle, small
        else:
            low = middle
    return _counted(best.requires_grad_(False))


def optipfair(model: PreTrainedModel, remove: int, batches: Batches) -> tuple[PreTrainedModel, int]:
    """Its MAW scores of gate and up, with the activations of the batches."""
    from optipfair import prune_model

    config = model.config
    neurons = sum(1 for _ in model.base_model.layers) * config.intermediate_size
    percent = 100 * remove / (neurons * 3 * config.hidden_size)
    small = prune_model(
        copy.deepcopy(model),
        pruning_type="MLP_GLU",
        neuron_selection_method="MAW",
        pruning_percentage=percent,
        dataloader=batches,
        show_progress=False,
    )
    return _counted(small)


PEERS: dict[str, Peer] = {
    "shortgpt": shortgpt,
    "consecutive": consecutive,
    "flap": flap,
    "wanda": _ours_without(importance="activation", allocation="uniform"),
    "llm-pruner": _ours_without(importance="taylor"),
    "magnitude": _ours_without(importance="magnitude", allocation="uniform"),
    "random": _ours_without(importance="random", allocation="uniform"),
    "rotation": rotation,
    "torch-pruning": torch_pruning,
    "optipfair": optipfair,
}
