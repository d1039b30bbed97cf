"""The processes of one run: how they share its work out, and how one that fails ends all.

    with together("prune"):                            # every process comes here, or none goes on
        for batch in share(batches):                   # those of this process
            sums[name] += ...
        sums = total(sums, names)                      # over all processes, added up in float64
        table = from_main(measure)                     # done once, while the others wait and leave the machine alone

With one process, and outside of `together`, all of them do what would be done without them, to the last bit.

Processes meet in the key-value store behind torch.distributed before they exchange tensors (`meetings`). Who waits
there sleeps, for as long as it takes, and is told when another one has failed: so nobody enters an exchange that not
all will join.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import ConfigError
from .meetings import ENTRY, Session, part, said, tell, wait, watch

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState
    from torch import Tensor

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


class Numbered(dict):
    """A batch that knows its place: its number, and that of its first row, among those of all processes."""

    def __init__(self, batch: Mapping[str, Any], number: int, first_row: int):
        super().__init__(batch)
        self.number, self.first_row = number, first_row


_session: Session | None = None
_sessions = 0
_alone = False


def count() -> int:
    """How many processes share the work here."""
    return 1 if _session is None or _alone else _session.size


def index() -> int:
    return 0 if count() == 1 or _session is None else _session.rank


def is_main() -> bool:
    """Whether this is the one process that writes and measures."""
    return index() == 0


@contextmanager
def alone() -> Iterator[None]:
    """Within it this process works by itself: the others wait for it, or do the same."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def begin() -> None:
    """Make the process group where `accelerate launch` or torchrun started several of this program.

    Raises:
        ConfigError: shards of a student that no other stage could work with.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0")
    if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true" or (
        os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true" and stage == "3"
    ):
        raise ConfigError(
            "Under FSDP and ZeRO-3 no process has a whole model, which pruning, exports and measurements need. Run "
            "the recipe under DDP or DeepSpeed ZeRO-2; a student too large for these is distilled under FSDP2 by "
            "scripts/distill.py."
        )
    from accelerate import PartialState

    state = PartialState(cpu=on_cpu())
    if state.num_processes == 1:
        raise ConfigError(
            "accelerate takes this for one process of one, though WORLD_SIZE says that there are several."
        )


def on_cpu() -> bool:
    """Whether processes exchange tensors on the CPU, which accelerate wants to be told."""
    import torch

    return not torch.accelerator.is_available() or torch.accelerator.current_accelerator().type == "mps"


@contextmanager
def together(what: str, ends: bool = False) -> Iterator[None]:
    """Within it the processes of the process group, if there is one, share their work; what one raises, all raise.

    Parameters:
        what: for the message where not all of them come.
        ends: end the process where it cannot be got out of an exchange that another one will not join any more.
    """
    global _session, _sessions
    store = None if _session is not None else _find_store()
    if store is None:
        yield
        return
    from torch import distributed

    _sessions += 1
    own = distributed.PrefixStore(f"hf_efficient/{_sessions}", store)
    session = _session = Session(own, distributed.get_rank(), distributed.get_world_size())
    threading.Thread(target=watch, args=(session, ends), daemon=True).start()
    try:
        wait(session, "0", limit=ENTRY, what=what)
        yield
        meet()
    except BaseException as error:
        told = tell(session, error)
        if told is error:
            raise
        raise told from error
    finally:
        part(session)
        session.over.set()
        _session = None


def meet(value: Any = None) -> list[Any]:
    """Wait for all processes; what each of them brings (plain values, which travel as JSON), in their order.

    Raises:
        HfEfficientError: another process has failed; the class is that of its error.
    """
    if count() == 1:
        return [value]
    session = _here()
    session.meetings += 1
    name = str(session.meetings)
    session.store.set(f"{name}/{session.rank}", json.dumps(value))
    wait(session, name)
    values = [said(session, f"{name}/{rank}") for rank in range(session.size)]
    if session.meetings > 2:  # all have read what was said before the last meeting
        session.store.delete_key(f"{session.meetings - 2}/{session.rank}")
    return values


def from_main(work: Callable[[], T]) -> T:
    """What `work` returns in the main process, as plain values; the others wait."""
    if count() == 1:
        return work()
    return meet(on_main(work, waits=False))[0]


def on_main(work: Callable[[], T], waits: bool = True) -> T | None:
    """Do it in the main process alone; None elsewhere. Afterwards all see what it wrote."""
    result = None
    if is_main():
        with alone():
            result = work()
    if waits:
        meet()
    return result


def share(items: Sequence[T]) -> list[T]:
    """The items of this process: every so many-th. Batches come as `Numbered`."""
    if count() == 1:
        return list(items)
    own, rows = list[Any](), 0
    for number, item in enumerate(items):
        if number % count() == index():
            own.append(Numbered(item, number, rows) if isinstance(item, Mapping) else item)
        if isinstance(item, Mapping):
            rows += len(item["input_ids"] if "input_ids" in item else next(iter(item.values())))
    return own


def total(sums: Mapping[K, "Tensor"], names: Sequence[K]) -> dict[K, "Tensor"]:
    """The sums of all processes together, added up in float64; each has the dtype and device that it came with.

    `names`: all that there may be, in one order everywhere. What no process has is not in the result.
    """
    if count() == 1:
        return dict(sums)
    import torch
    from torch import distributed

    mine = {place: sums[name] for place, name in enumerate(names) if name in sums}
    forms = {place: (list(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for place, tensor in mine.items()}
    known = {int(place): form for forms in meet(forms) for place, form in forms.items()}
    result = {}
    for place in sorted(known):
        shape, dtype = known[place]
        own = mine.get(place)
        tensor = torch.zeros(shape, dtype=getattr(torch, dtype), device=_device()) if own is None else own
        wide = tensor.detach().to(_device(), torch.float64, copy=True).contiguous()
        distributed.all_reduce(wide)
        result[names[place]] = wide.to(tensor)
    return result


def gather(parts: Sequence["Tensor"], numbers: Sequence[int]) -> list["Tensor"]:
    """The tensors of all processes, in the order of their numbers: what one process would have, to the last bit."""
    if count() == 1:
        return in_order(parts, numbers)
    import torch
    from torch import distributed

    kinds = [str(part.dtype).removeprefix("torch.") for part in parts[:1]]
    told = meet([[list(part.shape) for part in parts], list(numbers), kinds])
    sizes = [sum(_numel(shape) for shape in shapes) for shapes, _, _ in told]
    dtypes = [getattr(torch, kind) for _, _, kinds in told for kind in kinds]
    if not dtypes:
        return []
    flat = torch.zeros(max(sizes), dtype=dtypes[0], device=_device())
    if parts:
        flat[: sizes[_here().rank]] = torch.cat([part.detach().reshape(-1).to(flat) for part in parts])
    everything = [torch.empty_like(flat) for _ in told]
    distributed.all_gather(everything, flat)
    found: dict[int, torch.Tensor] = {}
    for (shapes, theirs, _), row, size in zip(told, everything, sizes, strict=True):
        pieces = row[:size].cpu().split([_numel(shape) for shape in shapes]) if shapes else ()
        found |= {number: piece.reshape(shape) for number, piece, shape in zip(theirs, pieces, shapes, strict=True)}
    return [found[number] for number in sorted(found)]


def gather_rows(rows: Sequence[tuple["Tensor", ...]], numbers: Sequence[int]) -> list[tuple["Tensor", ...]]:
    """The same of rows of several tensors, of which the n-th ones have one dtype."""
    if count() == 1:
        return in_order(rows, numbers)
    columns = [
        [part.long() if part.dtype.itemsize == 1 else part for part in each] for each in zip(*rows, strict=True)
    ]
    width = max(meet(len(columns)))
    return list(zip(*(gather(column, numbers) for column in columns or [()] * width), strict=True))


def in_order(items: Sequence[T], numbers: Sequence[int]) -> list[T]:
    """The items by their numbers, which are all different."""
    return [items[place] for place in sorted(range(len(items)), key=numbers.__getitem__)]


def same_everywhere(tensors: Iterable["Tensor"]) -> None:
    """Give all processes the numbers that these tensors have in the main one."""
    if count() == 1:
        return
    from torch import distributed

    meet()
    for tensor in tensors:
        wide = tensor.detach().to(_device(), copy=True).contiguous()
        distributed.broadcast(wide, 0)
        tensor.data.copy_(wide)


def check_same(what: Mapping[str, str]) -> None:
    """ConfigError that names what is not alike in all processes; `what`: a digest of each thing."""
    everybody = meet(dict(what))
    for rank, theirs in enumerate(everybody):
        different = [name for name, digest in theirs.items() if digest != everybody[0].get(name)]
        if different:
            raise ConfigError(
                f"Process {rank} was given another {' and another '.join(different)} than process 0. All processes "
                "need the same, and share the work out by themselves."
            )


def leave() -> None:
    """Close the process group, if there is one, at the end of a program."""
    if _find_store() is not None:
        from accelerate import PartialState

        leave_processes(PartialState())


def leave_processes(state: "Accelerator | PartialState") -> None:
    """Close the process group, whose threads may else abort the interpreter; of an accelerator, end its trackers too.

    On a CPU a thread of gloo lets go of the last barrier a moment after it, and needs the interpreter for that: where
    the group is destroyed in that moment, both wait for each other without end (torch 2.13; seen on a busy machine).
    """
    from accelerate import Accelerator

    state.wait_for_everyone()
    if state.num_processes > 1:
        time.sleep(0.2)
    if isinstance(state, Accelerator):
        state.end_training()
    else:
        state.destroy_process_group()


def _numel(shape: Sequence[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _find_store() -> Any:
    """The store of a process group of several; None without one."""
    from torch import distributed

    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return None
    return distributed.distributed_c10d._get_default_store()


def _here() -> Session:
    assert _session is not None
    return _session


def _device() -> Any:
    """Where tensors of the process group must be."""
    import torch
    from torch import distributed

    return torch.device("cuda", torch.cuda.current_device()) if distributed.get_backend() == "nccl" else "cpu"
