"""What a model gives its layers is recorded without running them, where it does not depend on what layers give."""

import pytest
import torch

from hf_efficient.models.anatomy import Anatomy
from hf_efficient.pruning.score.handing import NotAlone, find_layers, forward, watching
from hf_efficient.pruning.score.stream import Stream
from tests.families import make_inputs, make_model


def inputs_of(case: str, count: int) -> list[dict]:
    torch.manual_seed(0)
    return [make_inputs(case, padding="right") for _ in range(count)]


def streamed(case: str, stack: str, count: int = 3):
    """How often the last layer was run while the stream of some batches was recorded; its end, and the model's."""
    model = make_model(case)
    anatomy, batches, runs = Anatomy.of(model), inputs_of(case, count), []
    layers = anatomy.stack(stack).layers
    handle = layers[-1].register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        stream = Stream(anatomy, stack, batches)
        handle.remove()
        for index in range(len(layers)):
            stream.advance(index)
        expected = []
        hook = layers[-1].register_forward_hook(lambda layer, args, output: expected.append(output))
        for batch in batches:
            forward(model, batch)
        hook.remove()
    ends = [one[0] if isinstance(one, tuple) else one for one in expected]
    return len(runs), stream.states, ends


def test_only_the_first_batch_runs_the_layers():
    runs, states, ends = streamed("llama", "decoder")
    assert runs == 1
    assert all(torch.equal(one, other) for one, other in zip(states, ends, strict=True))


@pytest.mark.parametrize(("case", "stack"), [("t5", "encoder"), ("t5", "decoder"), ("bert", "encoder")])
def test_the_stream_is_that_of_the_model(case, stack):
    _, states, ends = streamed(case, stack)
    assert all(torch.equal(one, other) for one, other in zip(states, ends, strict=True))


def test_layers_that_hand_something_on_are_run():
    """T5's first layer makes the position bias that the others read."""
    model, (batch,) = make_model("t5"), inputs_of("t5", 1)
    layers = Anatomy.of(model).stack("encoder").layers
    with torch.no_grad(), watching(layers) as seen:
        forward(model, batch)
    with pytest.raises(NotAlone, match="makes something for those behind it"):
        find_layers(model, layers, batch, seen)


@pytest.mark.parametrize("part", [0.0, 1.0])
def test_arguments_made_of_states_are_noticed(part):
    model, (batch,) = make_model("llama"), inputs_of("llama", 1)
    layers = Anatomy.of(model).stack("decoder").layers

    def changed(layer, args, kwargs):
        shift = part * (args[0] if args else kwargs["hidden_states"]).mean()
        return args, kwargs | {"position_embeddings": tuple(one + shift for one in kwargs["position_embeddings"])}

    layers[-1].register_forward_pre_hook(changed, with_kwargs=True)
    with torch.no_grad(), watching(layers) as seen:
        forward(model, batch)
    if part:
        with pytest.raises(NotAlone, match="depends on those before it"):
            find_layers(model, layers, batch, seen)
    else:
        assert len(find_layers(model, layers, batch, seen).record(batch)[1]) == len(layers)
