"""Eight bits in ONNX Runtime and OpenVINO: which ways there are, and what carries them out.

| `quantize` | of | weights | activations |
|---|---|---|---|
| `int8` | onnx | 8 bits, a scale per channel | 8 bits, ranges found for every input (dynamic) |
| `int8_static` | onnx | the same | 8 bits, ranges found once on given rows |
| `int8` | openvino | the same | the same, by NNCF; channels of large numbers smoothed into the weights (SmoothQuant) |
| `int8_accurate` | openvino | the same, but for layers that go back to floats until predictions are the same | |
| `auto` | recipes | the fastest that loses no more than allowed, measured on rows that are no test rows | |

Weights have 7 bits in 8: the sums of all 8 overflow on processors without VNNI, and a file must give the same numbers
wherever it goes. SmoothQuant: Xiao et al. 2022, https://arxiv.org/abs/2211.10438.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

INT8, STATIC, ACCURATE, AUTO = "int8", "int8_static", "int8_accurate", "auto"
QUANTIZE = (INT8, STATIC, ACCURATE, AUTO)
LEAST = 0.99  # of the predictions stay the same, where `int8_accurate` is not told
# In `int8_static`: products with weights and tables of embeddings. Norms, softmax and the two products of attention
# stay in floats.
STATIC_OPERATORS = ["MatMul", "Gemm", "Gather"]


@dataclass(frozen=True)
class Rounding:
    """What an export needs to make numbers of 8 bits.

    Parameters:
        method: of `QUANTIZE`.
        rows: inputs on which ranges of activations are found; none for a method that looks at none.
        agreement: for `int8_accurate`: number of one of the rows and what a program computes of it -> the fraction of
            predictions that are those of PyTorch. least: what it must be.
    """

    method: str
    rows: Sequence[Mapping[str, "Tensor"]] = ()
    agreement: Callable[[int, Any], float] | None = None
    least: float = LEAST


def onnx_quantizer(rounding: Rounding) -> Any:
    """By ONNX Runtime's own tools."""
    from onnxruntime.quantization import QuantType
    from transformers.exporters import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer, OnnxRuntimeStaticConfig

    if rounding.method == INT8:
        return OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig(per_channel=True, reduce_range=True))

    class Static(OnnxRuntimeQuantizer):
        def quantize(self, model: Any, sample_inputs: Any, export_format: Any) -> Any:
            products = [node for node in model.graph if node.op_type == "MatMul"]
            free = [node.name for node in products if node.inputs[1].const_value is None]
            self.config = replace(self.config, nodes_to_exclude=free)
            return super().quantize(model, sample_inputs, export_format)

    config = OnnxRuntimeStaticConfig(
        per_channel=True,
        reduce_range=True,
        activation_type=QuantType.QUInt8,  # with signed ones ONNX Runtime is slower than in floats on x86
        weight_type=QuantType.QInt8,
        op_types_to_quantize=STATIC_OPERATORS,
    )
    return Static(config, calibration_dataset=rounding.rows)


def openvino_quantizer(rounding: Rounding) -> Any:
    """By NNCF, which knows that it is a transformer: SmoothQuant, and no 8 bits where that is known to ruin one."""
    logging.getLogger("nncf").setLevel(logging.ERROR)  # it warns of fewer than 300 rows
    import nncf
    from transformers.exporters import NNCFOpenVINOQuantizer, NNCFQuantizationConfig

    parameters = nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE)
    if rounding.method != ACCURATE:
        config = NNCFQuantizationConfig(advanced_parameters=parameters, subset_size=len(rounding.rows))
        return NNCFOpenVINOQuantizer(config, calibration_dataset=rounding.rows)
    return _accurate(rounding, parameters)


def _accurate(rounding: Rounding, parameters: Any) -> Any:
    import nncf
    from transformers.exporters import NNCFOpenVINOQuantizer
    from transformers.exporters.utils import openvino_feed

    class Accurate(NNCFOpenVINOQuantizer):
        def quantize(self, model: Any, sample_inputs: Any, export_format: Any) -> Any:
            feeds = [openvino_feed(model, dict(row)) for row in rounding.rows]

            def score(program: Any, numbers: Any) -> tuple[float, list[float]]:
                assert rounding.agreement is not None
                same = [rounding.agreement(number, program(feeds[number])[0]) for number in numbers]
                return sum(same) / len(same), same

            return nncf.quantize_with_accuracy_control(
                model,
                nncf.Dataset(feeds),
                nncf.Dataset(range(len(feeds))),
                score,
                max_drop=1 - rounding.least,
                subset_size=len(feeds),
                model_type=nncf.ModelType.TRANSFORMER,
                advanced_quantization_parameters=parameters,
            )

    return Accurate(calibration_dataset=rounding.rows)
