"""The one table of stages: what a recipe calls them. A new one is a file beside this one, and an entry here.

STAGES["prune"].read({"ratio": 0.75, "importance": "taylor"}, "stages[1].prune")
"""

from .attention import AttentionStage
from .base import Stage
from .distill import DistillStage
from .export import ExportStage
from .merge_kv_heads import MergeStage
from .prune import PruneStage
from .quantize import QuantizeStage
from .vocabulary import VocabularyStage

STAGES: dict[str, type[Stage]] = {
    "attention": AttentionStage,
    "merge_kv_heads": MergeStage,
    "prune": PruneStage,
    "distill": DistillStage,
    "vocabulary": VocabularyStage,
    "quantize": QuantizeStage,
    "export": ExportStage,
}
