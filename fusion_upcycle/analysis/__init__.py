"""What the experts of a model do: where tokens go, what experts specialise in, how alike they are.

from fusion_upcycle.analysis import analyze, write_analysis

write_analysis(analyze(model, tokenizer, {"prose": [...], "code": [...]}), "analysis")
"""

from fusion_upcycle.analysis.report import write_analysis
from fusion_upcycle.analysis.run import Analysis, analyze, compare

__all__ = ["Analysis", "analyze", "compare", "write_analysis"]
