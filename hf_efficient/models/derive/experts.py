"""The mixture of experts of a layer: tensors with a row for each expert, or a list of modules, and their router.

find_experts(layers, hidden, config)        # layers: one of each sort in a stack

Nothing runs here. That a row is one of the router, and that nothing else has rows for experts, shows the proof: what
is cut must give what the whole model gives where the router's scores of the experts that left are -inf.
"""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..experts import Experts
from ..linears import holds
from ..mixtures import num_experts
from .fields import field_said, find_field
from .roles import NotDerivable

NOT_OF_ROUTERS = ("attn", "attention", "norm")


def find_experts(layers: Iterable[nn.Module], hidden: int, config: PreTrainedConfig) -> Experts | None:
    """That of the layers which have one; None if none has.

    Raises:
        NotDerivable: a layer has several, or layers have unlike ones; no config field says how many experts there are;
            no router is known.
    """
    found = {entry for layer in layers for entry in _of_layer(layer, hidden, config)}
    if len(found) > 1:
        raise NotDerivable("its layers hold several mixtures of experts")
    return next(iter(found), None)


def is_whole(layer: nn.Module, entry: Experts, count: int) -> bool:
    """Whether a layer without the mixture, or with one of so many experts, is as the entry says."""
    if not holds(layer, entry.module):
        return True
    tensors = _tensors(layer)
    rows = all(name in tensors and tensors[name].shape[dim] == count for name, dim in entry.dims.items())
    return rows and num_experts(layer, entry) == count


def _of_layer(layer: nn.Module, hidden: int, config: PreTrainedConfig) -> Iterator[Experts]:
    for module, count, listed in _holders(layer):
        field = find_field(config, "experts", count)
        if field is None:
            raise NotDerivable(f"no config field says that it has {count} experts")
        yield _with_router(layer, Experts(module, "", count=field, listed=listed), count, hidden, config)


def _holders(layer: nn.Module) -> Iterator[tuple[str, int, bool]]:
    """Modules that hold experts: their path, how many, and whether that is a list of modules."""
    for path, module in layer.named_modules():
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            children = list(module.children())
            alike = {(type(one), *((name, *p.shape) for name, p in one.named_parameters())) for one in children}
            if "expert" in path.rpartition(".")[2].lower() and len(children) > 1 and len(alike) == 1:
                yield path, len(children), True
            continue
        own = [one for one in module.parameters(recurse=False) if one.ndim == 3]
        if len(own) > 1 and len({len(one) for one in own}) == 1 and len(own[0]) > 1:
            yield path, len(own[0]), False


def _with_router(layer: nn.Module, entry: Experts, count: int, hidden: int, config: PreTrainedConfig) -> Experts:
    """The entry with all that has a row for each expert, in the smallest module around them that has a router."""
    tensors = _tensors(layer)
    inside = {} if entry.listed else {n: one for n, one in tensors.items() if n.startswith(f"{entry.module}.")}
    if any(one.shape[0] != count for one in inside.values()):
        raise NotDerivable("its experts share some of their tensors")
    block = entry.module
    while block:
        block = block.rpartition(".")[0]
        around = {name: one for name, one in tensors.items() if name.startswith(f"{block}." if block else "")}
        rows = {
            name: dim
            for name, one in around.items()
            if not name.startswith(f"{entry.module}.") and (dim := _row_dim(name, one, count)) is not None
        }
        routers = [name for name in rows if sorted(tensors[name].shape) == sorted((count, hidden))]
        if routers:
            rows |= dict.fromkeys(inside, 0)
            return Experts(
                entry.module,
                block,
                tuple(rows),
                tuple(rows.values()),
                tuple(routers),
                entry.count,
                field_said(config, "experts_per_token"),
                field_said(config, "expert_groups"),
                field_said(config, "active_groups"),
                entry.listed,
            )
    raise NotDerivable("what chooses its experts is no linear with one output for each")


def _tensors(layer: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers."""
    return dict(layer.named_parameters()) | dict(layer.named_buffers())


def _row_dim(name: str, tensor: Tensor, count: int) -> int | None:
    """The dimension with a row for each expert: of the weights of a router, and of what is one number for each."""
    if any(word in name for word in NOT_OF_ROUTERS) or tensor.ndim > 2 or count not in tensor.shape:
        return None
    return list(tensor.shape).index(count)
