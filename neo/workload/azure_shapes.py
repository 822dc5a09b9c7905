"""Quantiles of the lengths in the Azure LLM inference traces of 2023, for the ``azure-*`` distributions.

Computed with ``numpy.quantile`` over every row of AzureLLMInferenceTrace_code.csv (8,819 requests) and
AzureLLMInferenceTrace_conv.csv (19,366 requests), rounded to whole tokens. Source of the traces:
github.com/Azure/AzurePublicDataset (CC-BY), described in Patel et al., "Splitwise", ISCA 2024. A test
recomputes this table. Means drawn from it differ from the traces' by at most 2.5 %.
"""

# Denser towards 1: half of all output tokens of the code trace are above the 90th percentile.
LEVELS = (
    0.0, 0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65,
    0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.965, 0.98, 0.985, 0.99, 0.995, 0.9975, 0.999, 1.0,
)  # fmt: skip

QUANTILES = {
    "azure-code": {
        "prompt": (
            3, 17, 75, 147, 232, 386, 578, 770, 939, 1075, 1261, 1469, 1690, 1909, 2164,
            2433, 2744, 3192, 3920, 5188, 6097, 7303, 7435, 7436, 7436, 7436, 7436, 7436, 7437, 7437,
        ),
        "output": (
            6, 6, 6, 7, 7, 8, 9, 9, 10, 11, 12, 13, 14, 16, 18,
            20, 24, 29, 39, 55, 69, 90, 115, 171, 201, 251, 359, 599, 825, 1899,
        ),
    },
    "azure-conv": {
        "prompt": (
            2, 29, 181, 207, 372, 387, 396, 403, 414, 703, 984, 1020, 1045, 1071, 1097,
            1130, 1189, 1315, 1876, 2734, 4075, 4083, 4088, 4098, 4110, 4142, 4831, 5404, 6179, 14050,
        ),
        "output": (
            7, 16, 41, 54, 67, 77, 85, 91, 96, 103, 113, 129, 151, 177, 217,
            384, 395, 400, 411, 424, 430, 451, 490, 540, 571, 601, 643, 719, 954, 1000,
        ),
    },
}  # fmt: skip
