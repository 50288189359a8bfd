"""
Metrics for Hugging Face's `evaluate`, loaded from their folders without a network.

```python
evaluate.load(metric_folder("modality_gap")).compute(predictions=scores, tags=tags)
```
"""

from __future__ import annotations

from pathlib import Path


NAMES = ("fusion_gain", "modality_gap", "paired_comparison", "pass_at_k", "tag_accuracy")


def metric_folder(name: str) -> str:
    """
    Return the folder of a metric, for `evaluate.load`.

    `evaluate` is optional: `pip install "maple-trl[judge]"`.

    Args:
        name: `"fusion_gain"`, `"modality_gap"`, `"paired_comparison"`, `"pass_at_k"` or `"tag_accuracy"`.

    Raises:
        ValueError: for another name.
    """
    if name not in NAMES:
        raise ValueError(f"There is no metric {name!r}; the metrics are {', '.join(NAMES)}")
    return str(Path(__file__).parent / name)
