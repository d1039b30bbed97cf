"""Reports and what is made from them: card, plots, tables. Knows nothing of how a model was compressed.

from hf_efficient.reporting import load_report
report = load_report("out")
"""

from .schema import Comparison, DatasetFacts, LayerStructure, Measurement, Report, StageRecord, load_report

__all__ = ["Comparison", "DatasetFacts", "LayerStructure", "Measurement", "Report", "StageRecord", "load_report"]
