"""What packing is expected to cost where nothing is measured: a law of precision, and the constants in it.

Kumar et al. (arXiv 2411.04330, section 3) find that the loss of post-training quantization grows with the tokens that a
model has read and falls with its parameters and, exponentially, with its bits:

    loss = C D^a / N^b exp(-bits / c)

The exponents are near theirs. Where rounding errors are small, a bit divides a squared error by four, which is what we
find from 2 to 4 bits (1 / c = log 4); and C is fitted to KL of untuned trellis codes of two models of other sizes:
SmolLM2-135M (2e12 tokens; .436 nats at 2 bits, .122 at 3, measured here) and Llama-3.1-8B (15e12; .312, .053, .013 at
2, 3, 4, exllamav3's published chart). It meets these five within a factor of 1.3.
"""

import math

TOKENS_EXPONENT, PARAMETERS_EXPONENT = 0.5068, 0.3439
"""a and b."""
FACTOR = 0.0023
"""C, of trellis codes."""
LOST_BITS = {"trellis": 0.0, "pyramid": 0.25, "vptq": 0.35, "gptq": 0.6, "rtn": 2.0}
"""By how many bits methods fall behind trellis codes, roughly."""
TOKENS = 10e12
"""That a model is taken to have read where nobody says how many."""
UNCERTAINTY = 3.0
"""The factor within which the law is taken to hold."""


def expected_kl(method: str, bits: float, parameters: int, tokens: float | None = None) -> float:
    """KL to the full model, in nats a token, within a factor of `UNCERTAINTY` or so.

    Args:
        method: by its name; an unknown one counts as "gptq".
        bits: of a weight's codes.
        parameters: of the model.
        tokens: that it was trained on; None for `TOKENS`.
    """
    scale = FACTOR * (tokens or TOKENS) ** TOKENS_EXPONENT / parameters**PARAMETERS_EXPONENT
    return scale * math.exp(-math.log(4) * (bits - LOST_BITS.get(method, LOST_BITS["gptq"])))
