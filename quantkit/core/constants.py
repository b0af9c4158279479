"""Constants that are also read where torch and transformers must not be imported."""

RELEASE = "0.1.0"
"""Version of quantkit."""
METHOD = "quantkit"
"""The quant_method of packed checkpoints."""
VERSION = 2
"""Version of the checkpoint format. 1, of a pre-release, had scales [out_features, groups]; no reader of it is kept."""
GUARD = "import-quantkit-first.safetensors"
"""A file that is not there, and that transformers asks for where quantkit is not imported."""
SHIM = "quantkit_remote"
"""The module of the code beside a packed checkpoint; see `io.shim`."""
TARGET_SHIFT = 0.7
"""How far a layer aims at the full-precision output, by default."""
HEAD_BITS = 6
"""Of head and embedding, where they are packed without anyone saying how: no loss that can be measured
(evals/results, head-bits)."""
TOWER_BITS = 8
"""Of vision towers and the like, where they are packed without anyone saying how: text says nothing of their inputs."""
